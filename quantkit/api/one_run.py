"""One run at a time, and under the settings of torch that its arithmetic expects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# transformers changes torch's default dtype while it builds a model, for the whole process: a run
# in another thread would compute with it.
_RUNNING = threading.RLock()


@contextmanager
def one_run() -> Iterator[None]:
    """A context that runs that build models wait for, so that one of them is inside at a time. In
    it, torch makes tensors in float32 unless it is told otherwise.
    """
    with _RUNNING:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
