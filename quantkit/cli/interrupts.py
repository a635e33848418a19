"""Signals: the first SIGINT or SIGTERM asks the command to stop after the current step, a second
one ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantkit.checkpoint.run_control import ShouldStop

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[ShouldStop]:
    """Yields a function that tells whether a signal has come.

    Signals are caught from its first call to the end of the context: before, nobody would stop for
    them, and they end the process as usual. Only the main thread can catch signals.
    """
    caught: list[int] = []
    earlier: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: object) -> None:
        caught.append(number)
        restore()

    def should_stop() -> bool:
        if not earlier and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                earlier[number] = signal.signal(number, ask)
        return bool(caught)

    try:
        yield should_stop
    finally:
        restore()
    if caught:
        raise KeyboardInterrupt  # The work ended without being stopped; no other may begin.
