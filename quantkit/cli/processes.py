"""The processes that torchrun started for one command. It launches and connects them, and ends the
job if one of them dies. The library uses the process group that is made here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_first_of_torchrun() -> bool:
    """Whether this process prints and writes: rank 0 under torchrun, or the only process."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The process group of torchrun's processes while the context lasts; none for a single process.

    device: where the command computes, which decides between nccl and gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch
    import torch.distributed as dist

    # Imported before the group exists. If transformers imported it later, its functions' default
    # arguments would keep the group alive: gloo's threads could then abort the process at exit.
    import torch.distributed.nn.functional  # noqa: F401

    from quantkit.models.distributed import TIMEOUT
    from quantkit.models.skeleton import pick_device

    on_gpu = pick_device(device).startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
