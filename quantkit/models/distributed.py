"""Communication between the processes of one job: those of the caller's torch.distributed process
group. Without a group, a single process is rank 0 of 1 and communicates with nobody.

The caller makes the group and destroys it; under torchrun the command line does
(`cli/processes.py`). All processes of the group call the same function with the same options.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from quantkit.errors import FollowerStopped, QuantkitError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")

# Ranks wait for each other at the end of each block, which may take the slowest one long. A rank
# that dies is noticed at once.
TIMEOUT = timedelta(hours=12)


def is_first_process() -> bool:
    """Whether this process is alone, or rank 0 of several."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def require_one_process(what: str) -> None:
    """Raise QuantkitError in one of several processes: all would write the same output.

    what: name of the function.
    """
    import torch.distributed as dist

    has_group = dist.is_available() and dist.is_initialized()
    if (dist.get_world_size() if has_group else int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise QuantkitError(
            f"{what} runs in one process, and this is one of several",
            hint="share the work of calibrate, then export in one process",
        )


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    rank: number of this process.
    count: number of processes.
    device: where this process computes.
    group: the process group; None for a single process, or the caller's default group.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    group: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    def all_gather(self, content: Any) -> list[Any]:
        """Every rank's object, in the order of ranks."""
        if self.count == 1:
            return [content]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.count
        with _peers_alive():
            dist.all_gather_object(gathered, content, group=self.group)
        return gathered

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """Do work on rank 0 alone, while the others wait. Returns the result on rank 0, None
        elsewhere.

        An error ends all ranks: rank 0 raises it, the others raise FollowerStopped.
        """
        return self._from_first(work, lambda result: None)[0]

    def broadcast_from_first(self, make: Callable[[], Result]) -> Result:
        """The result of `make` on rank 0, pickled and sent to every rank. Errors as in
        `on_first`.
        """
        return self._from_first(make, lambda result: result)[1]

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Each rank's own result of `work`; the others start after rank 0 has finished. Errors as
        in `on_first`.
        """
        made = self.on_first(work)
        return work() if not self.is_first else cast(Result, made)

    def _from_first(
        self, work: Callable[[], Result], content_of: Callable[[Result], Any]
    ) -> tuple[Result | None, Any]:
        """Rank 0's result on that rank, and on all ranks what `content_of` takes from it.

        One exchange carries that content and the exit code of an error.
        """
        if self.count == 1:
            result = work()
            return result, content_of(result)
        found: Result | None = None
        content, error = None, None
        if self.is_first:
            try:
                found = work()
                content = content_of(found)
            except QuantkitError as raised:
                error = raised
        content, exit_code = self.all_gather((content, error.exit_code if error else None))[0]
        if error is not None:
            raise error
        if exit_code is not None:
            raise FollowerStopped(exit_code)
        return found, content

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, on every rank. The argument is ignored on other ranks."""
        if self.count == 1:
            return dict(tensors or {})
        import torch
        import torch.distributed as dist

        given = tensors or {}
        described = self.broadcast_from_first(
            lambda: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()}
        )
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in described.items():
            found[name] = (
                given[name].to(self.device).contiguous()
                if self.is_first
                else torch.empty(shape, dtype=dtype, device=self.device)
            )
            if found[name].numel():
                with _peers_alive(), torch.inference_mode():
                    # as bytes: gloo doesn't know every dtype
                    dist.broadcast(found[name].reshape(-1).view(torch.uint8), 0, group=self.group)
        return found

    def reduce(self, tensors: Sequence[Tensor], operation: str) -> list[Tensor]:
        """Each tensor's elementwise sum or maximum over the ranks.

        tensors: of one dtype, in the same order and with the same shapes on every rank.
        operation: "sum" or "max".
        """
        import torch
        import torch.distributed as dist

        if self.count == 1 or not tensors:
            return list(tensors)
        # nccl reduces on GPUs only
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(self.device)
        with _peers_alive():
            dist.all_reduce(
                flat,
                dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX,
                group=self.group,
            )
        parts = flat.to(tensors[0].device).split([tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors)]


@contextmanager
def _peers_alive() -> Iterator[None]:
    """Turn torch's RuntimeError about a lost connection into a QuantkitError."""
    try:
        yield
    except RuntimeError as error:
        raise QuantkitError(
            "another process of this job has ended, for the reason that it gave"
            f" ({str(error).splitlines()[0][:80]})",
            hint="`resume=True` continues",
        ) from None


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The ranks of this job: the processes of the caller's process group, or this one alone.

    device: "cpu" or "cuda"; of several processes, each uses its own GPU.

    Raises QuantkitError if several processes were started but have no group: each would do all of
    the work, and write the same output.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise QuantkitError(
                "this is one of several processes (WORLD_SIZE is set), but torch.distributed is not"
                " initialized",
                hint="call torch.distributed.init_process_group() in each of them first",
            )
        yield Ranks(device=device)
        return
    rank, count = dist.get_rank(), dist.get_world_size()
    if count == 1:
        yield Ranks(device=device)
        return
    if not device.startswith("cuda"):
        with _group_for("cpu") as group:
            yield Ranks(rank, count, device, group)
        return
    place = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    # Objects are sent through the current device.
    with torch.cuda.device(place), _group_for("cuda") as group:
        yield Ranks(rank, count, f"cuda:{place}", group)


@contextmanager
def _group_for(kind: str) -> Iterator[ProcessGroup | None]:
    """A group that sends tensors of this kind of device: the caller's, as None, or one of all its
    processes that lasts as long as the context. nccl, for example, sends no CPU tensors.

    kind: "cpu" or "cuda".
    """
    import torch.distributed as dist

    sent = {pair.partition(":")[0] for pair in str(dist.get_backend_config()).split(",")}
    if kind in sent:
        yield None
        return
    group = dist.new_group(timeout=TIMEOUT, backend="gloo" if kind == "cpu" else "nccl")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
