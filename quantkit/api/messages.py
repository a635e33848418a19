"""What the public functions tell while they work: steps through `logging`, warnings through
`warnings`.

Each step that is done is one line at level INFO of the logger "quantkit". What the user should know
is a QuantkitWarning. Of several processes, only the first speaks.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from quantkit.errors import QuantkitWarning
from quantkit.models.distributed import is_first_process

LOGGER = logging.getLogger("quantkit")


def step_done(text: object) -> None:
    """Log a step that is done, as `str()` of its result describes it."""
    if is_first_process():
        LOGGER.info("%s", text)


def tell_of_new_start(output: Path, resume: bool) -> None:
    """Log that there is nothing to continue: a mistyped output would repeat hours of work."""
    partial = output.with_name(output.name + ".partial")
    if resume and not os.path.lexists(output) and not partial.exists():
        step_done(f"there is no run to continue at {output}; starting a new one")


def warn(texts: Iterable[str]) -> None:
    """Warn of each text, at the line that called quantkit."""
    if is_first_process():
        for text in texts:
            warnings.warn(text, QuantkitWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The number of frames from `warn` to the first one outside of quantkit."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("quantkit."):
        level, frame = level + 1, frame.f_back
    return level
