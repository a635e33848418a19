"""The instruction sets of this processor, for tests of CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantkit.ops import native

LIBRARY = native.cpu_kernels()


def levels_here() -> list[int]:
    if LIBRARY is None:
        return []
    chosen = LIBRARY.qk_cpu_level()
    levels = [
        level for level in range(len(native.LEVELS)) if LIBRARY.qk_select_cpu_level(level) == 0
    ]
    LIBRARY.qk_select_cpu_level(chosen)
    return levels


@contextmanager
def on_level(level: int, threads: int = 1) -> Iterator[None]:
    chosen, before = LIBRARY.qk_cpu_level(), torch.get_num_threads()
    torch.set_num_threads(threads)
    assert LIBRARY.qk_select_cpu_level(level) == 0
    try:
        yield
    finally:
        LIBRARY.qk_select_cpu_level(chosen)
        torch.set_num_threads(before)
