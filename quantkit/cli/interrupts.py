"""Signals: the first SIGINT or SIGTERM asks the command to stop after the current step, a second
one ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from quantkit.checkpoint.run_control import ShouldStop

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[ShouldStop]:
    """Catch signals within this context. Yields a function that tells whether one has come.

    Only the main thread can install handlers; in other threads nothing is caught.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    earlier = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: object) -> None:
        caught.append(number)
        restore()

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda: bool(caught)
    finally:
        restore()
    if caught:
        raise KeyboardInterrupt  # The work ended without being stopped; no other may begin.
