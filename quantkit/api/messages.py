"""What the public functions tell while they work: steps through `logging`, warnings through
`warnings`.

Each step that is done is one line at level INFO of the logger "quantkit". What the user should know
is a QuantkitWarning. Of several processes, only the first speaks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

from quantkit.errors import QuantkitWarning
from quantkit.models.distributed import is_first_process

LOGGER = logging.getLogger("quantkit")


def step_done(text: object) -> None:
    """Log a step that is done, as `str()` of its result describes it."""
    if is_first_process():
        LOGGER.info("%s", text)


def warn(texts: Iterable[str], level: int = 3) -> None:
    """Warn of each text.

    level: frames from here to the user's code; 3 if a public function calls this.
    """
    if is_first_process():
        for text in texts:
            warnings.warn(text, QuantkitWarning, stacklevel=level)
