"""The processes that torchrun started for one command, and what they tell each other. One process
alone is rank 0 of 1 and talks to nobody.

Launching, rendezvous and the end of a job whose process died are torchrun's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from quantkit.errors import FollowerStopped, QuantkitError

if TYPE_CHECKING:
    from torch import Tensor

# Ranks wait for each other at the end of each block, which may take long for the slowest; a rank
# that dies is noticed at once.
TIMEOUT = timedelta(hours=12)


def rank_of_environment() -> int:
    return int(os.environ.get("RANK", "0")) if "WORLD_SIZE" in os.environ else 0


@dataclass(frozen=True)
class Ranks:
    """rank: this process's number; count: how many there are; device: where it computes."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def all_gather(self, content: Any) -> list[Any]:
        """Every rank's object, by rank."""
        if self.count == 1:
            return [content]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.count
        with _peers_alive():
            dist.all_gather_object(gathered, content)
        return gathered

    def first_decides(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 makes of `decide`, on every rank; its error ends them all, and only rank 0
        says it.
        """
        if self.count == 1:
            return decide()
        content, error = None, None
        if self.is_first:
            try:
                content = decide()
            except QuantkitError as refusal:
                error = refusal
        content, exit_code = self.all_gather((content, error.exit_code if error else None))[0]
        if error is not None:
            raise error
        if exit_code is not None:
            raise FollowerStopped(exit_code)
        return content

    def after_first(self, work: Callable[[], Any]) -> Any:
        """What each rank makes of `work`, which isn't sent; rank 0's error ends them all, and only
        rank 0 says it.
        """
        made: list[Any] = []
        self.first_decides(lambda: made.append(work()))
        return made[0] if made else work()

    def told_once(self, error: QuantkitError) -> QuantkitError:
        """What to raise for an error that every rank finds: only rank 0 says it."""
        return error if self.is_first else FollowerStopped(error.exit_code)

    def from_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, on every rank; what others give is not looked at."""
        if self.count == 1:
            return dict(tensors)
        import torch
        import torch.distributed as dist

        described = self.first_decides(
            lambda: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        )
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in described.items():
            empty = None if self.is_first else torch.empty(shape, dtype=dtype, device=self.device)
            found[name] = tensors[name].to(self.device).contiguous() if self.is_first else empty
            if found[name].numel():
                with _peers_alive(), torch.inference_mode():
                    # as bytes: gloo doesn't know every dtype
                    dist.broadcast(found[name].reshape(-1).view(torch.uint8), 0)
        return found

    def reduce(self, tensors: Sequence[Tensor], operation: str) -> list[Tensor]:
        """Each tensor's sum or maximum over the ranks. Tensors of one dtype, in the same order and
        shapes on every rank. operation: "sum" or "max".
        """
        import torch
        import torch.distributed as dist

        if self.count == 1 or not tensors:
            return list(tensors)
        # nccl reduces on GPUs only
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self.device)
        with _peers_alive():
            dist.all_reduce(flat, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
        parts = flat.to(tensors[0].device).split([tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors)]


@contextmanager
def _peers_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise QuantkitError(
            "another process of this job has ended, for the reason that it gave"
            f" ({str(error).splitlines()[0][:80]}); --resume continues"
        ) from None


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of this job, joined for as long as the context lasts. device: "cpu" or "cuda"; with
    torchrun each rank takes its own GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks(device=device)
        return
    import torch
    import torch.distributed as dist

    # Imported later, by transformers, its functions' default arguments would hold this job's group:
    # gloo's threads would outlive it and could abort the exit.
    import torch.distributed.nn.functional  # noqa: F401

    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
