"""Stopping a run between two steps: the first SIGINT or SIGTERM requests a stop, a second one ends
the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quantkit.errors import Interrupted


@dataclass
class StopRequest:
    """Whether a signal has requested a stop.

    signal_name: name of the signal, or "" if there was none.
    """

    signal_name: str = ""

    def check(self, where: str) -> None:
        """Raise Interrupted (exit code 75) if a stop was requested.

        where: place of the stop, for the message, such as "after block 3 of 30".
        """
        if self.signal_name:
            raise Interrupted(
                f"stopped by {self.signal_name} {where}; run the same command with --resume to"
                " continue"
            )


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM within this context. The caller calls `check` between its steps.

    Only the main thread can install handlers; in other threads nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: object) -> None:
        request.signal_name = signal.Signals(number).name
        for each, handler in earlier.items():
            signal.signal(each, handler)

    for number in earlier:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
