"""How a caller follows and stops a long run: a function that is told of progress, and one that is
asked between two steps whether to stop.

The library catches no signals; the command line does (`cli/interrupts.py`). Ctrl-C in a program
that uses the library raises KeyboardInterrupt as everywhere. Finished work is kept then too.
"""

from __future__ import annotations

from collections.abc import Callable

from quantkit.errors import Interrupted

# progress(what is being done, done, total); `done` and `total` have the same unit, of any kind.
Progress = Callable[[str, float, float], None]
# should_stop() is called between two steps, possibly often; True ends the run with Interrupted.
ShouldStop = Callable[[], bool]

RESUME_HINT = "run it again with `resume=True` to continue"


def silent(what: str, done: float, total: float) -> None:
    """Progress that is told to nobody."""


def never() -> bool:
    """A run that nobody stops."""
    return False


def stop_if_asked(should_stop: ShouldStop, where: str, can_resume: bool = True) -> None:
    """Raise Interrupted if the run should stop.

    where: place of the stop, for the message, such as "after block 3 of 30".
    can_resume: whether a later run continues from here.
    """
    if should_stop():
        raise Interrupted(f"stopped {where}", RESUME_HINT if can_resume else "")
