"""Running batches on several threads, one thread for each batch, and stateful modules on one thread
at a time. torch's settings of threads are what they were when a context ends.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import nn

# How many contexts of `one_thread` are open, in any thread, and torch's number of threads before
# the first of them: a second caller finds 1, and must not leave that behind.
_COUNTING = Lock()
_inside = 0
_threads_before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch's operations use one thread, also in threads that are started in
    it.
    """
    global _inside, _threads_before
    with _COUNTING:
        if not _inside:
            _threads_before = torch.get_num_threads()
        _inside += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _COUNTING:
            _inside -= 1
            # torch keeps a number for each thread, and the last one set for new threads.
            torch.set_num_threads(_threads_before)


@contextmanager
def pool_of_single_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which torch uses one thread. When the context ends, what was not
    begun is cancelled, and no thread is left.
    """
    with (
        one_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """A context in which this thread computes with zero in place of denormal numbers (below 1e-38),
    which slow arithmetic down a hundredfold.
    """
    # torch sets it, but has nothing to tell how it is set; it applies to Python's numbers too.
    were_zero = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(were_zero)


def each_batch(
    work: Callable[[int], Any], numbers: Sequence[int], device: torch.device, threads: int
) -> Generator[Any, None, None]:
    """work(number) for each number; yields the results in order.

    Wrap it in contextlib.closing if the loop over it may raise: its threads run and torch's number
    of threads is changed until it is closed.

    threads: on a CPU, how many calls run at once, each on one thread.
    """
    if device.type != "cpu" or threads < 2 or len(numbers) < 2:
        with one_thread() if device.type == "cpu" else nullcontext():
            for number in numbers:
                with torch.inference_mode():
                    result = work(number)
                yield result
        return

    def run(number: int) -> Any:
        with torch.inference_mode():
            return work(number)

    with pool_of_single_threads(threads) as pool:
        waiting: deque[Any] = deque()
        for number in numbers:
            waiting.append(pool.submit(run, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class StatefulModuleLock:
    """Lets threads run modules at once, except modules whose forward changes the module
    (RecurrentGemma's recurrent state). Those run one at a time.

    The first run of each kind of module is exclusive, and shows whether it is stateful: whether an
    attribute or a buffer is a different object afterwards.
    """

    def __init__(self) -> None:
        self._writes: dict[frozenset[type], bool] = {}
        self._lock = Lock()

    @contextmanager
    def held_for(self, module: nn.Module) -> Iterator[None]:
        """A context for one run of a module."""
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
