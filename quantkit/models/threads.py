"""Work on several threads: batches at once, each on one thread of its own, and stateful modules one
at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import nn


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's operations on one thread, also those that new threads call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def each_batch(
    work: Callable[[int], Any], numbers: Sequence[int], device: torch.device, threads: int
) -> Iterator[Any]:
    """work(number) for each, its results in this order. On a CPU `threads` of them run at once,
    each on one thread of its own.
    """
    if device.type != "cpu" or threads < 2 or len(numbers) < 2:
        with one_thread() if device.type == "cpu" else nullcontext():
            for number in numbers:
                with torch.inference_mode():
                    result = work(number)
                yield result
        return

    def run(number: int) -> Any:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return work(number)

    with one_thread(), ThreadPoolExecutor(threads) as pool:
        waiting: deque[Any] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(run, number))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class StatefulModuleLock:
    """Lets threads run modules at once, except modules whose forward writes to the module itself,
    as RecurrentGemma keeps its recurrent state. Those run one at a time.

    The first run of each kind of module is alone and shows whether it is stateful: whether an
    attribute or a buffer is another object after it than before.
    """

    def __init__(self) -> None:
        self._writes: dict[frozenset[type], bool] = {}
        self._lock = Lock()

    @contextmanager
    def held_for(self, module: nn.Module) -> Iterator[None]:
        """Around each run of a module."""
        kind = frozenset(type(part) for part in module.modules())
        if self._writes.get(kind) is False:
            yield
            return
        with self._lock:
            before = _attributes(module)
            yield
            if not self._writes.get(kind):
                after = _attributes(module)
                self._writes[kind] = before.keys() != after.keys() or any(
                    value is not after[name] for name, value in before.items()
                )


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (path, name): value
        for path, part in module.named_modules()
        for name, value in (vars(part) | part._buffers).items()
    }
