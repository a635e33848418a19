"""The errors of quantkit. Each has a message of one sentence for the user, and an exit code.

    QuantkitError            1   any of the following, or a fault of the machine
    ├── ArgumentError        1   an argument of a function has a value that isn't allowed
    ├── CheckpointError      1   a model directory can't be read or isn't supported
    ├── DownloadError        1   the hub didn't deliver a shard; finished work is kept
    ├── RecipeError          1   a scheme, recipe or pattern makes no sense for this model
    ├── CalibrationError     1   statistics are missing, or belong to another model or recipe
    ├── DataError            1   a text can't be read or is too short
    ├── OutputError          1   an output can't be written, or must not be replaced
    ├── EvaluationError      1   a model can't be evaluated
    │   └── NonFiniteError   1   a model computes NaN or infinity
    ├── RuntimeLimitError    1   the named runtime or hardware can't run this
    ├── FaultsFound          3   a gate failed, or a checkpoint has faults
    ├── Inconclusive         4   the text is too short to decide a gate, which must be
    ├── NotComparableError   5   two results have different protocols, tokens or base models
    ├── FollowerStopped      n   another process of the same run has failed and says why
    └── Interrupted         75   the run was stopped between two steps; finished work is kept

The command line prints them as one line (`cli/console.py`). Any other exception is a bug and keeps
its traceback.
"""

from __future__ import annotations

import re
from typing import Any


class QuantkitError(Exception):
    """The base class. A message says what was given, what is allowed and what to do.

    Messages name parameters as Python has them, in backticks: `seq_len`, `overwrite=True`. The
    command line replaces them by its options (`cli/console.py`).

    message: what is wrong.
    hint: what to do about it; `str()` of the error gives both.
    exit_code: exit code of a command that ends with this error.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.hint = hint


class QuantkitWarning(UserWarning):
    """Something that the caller should know, while the work goes on."""


class ArgumentError(QuantkitError):
    """An argument of a function has a value that isn't allowed."""


class CheckpointError(QuantkitError):
    """A model directory, hub id or GGUF file can't be read, is damaged or isn't supported."""


class DownloadError(QuantkitError):
    """The hub didn't deliver a shard after the work had begun. A resumed run continues it."""


class RecipeError(QuantkitError):
    """A scheme, recipe or pattern doesn't parse, or makes no sense for this model."""


class CalibrationError(QuantkitError):
    """Statistics are missing, or were made from another model or for another recipe."""


class DataError(QuantkitError):
    """A text or tokenizer can't be read, or the text is too short."""


class OutputError(QuantkitError):
    """An output can't be written, or what is in its place must not be replaced or continued."""


class EvaluationError(QuantkitError):
    """A model can't be evaluated, or two can't be compared."""


class NonFiniteError(EvaluationError):
    """A model computes NaN or infinity.

    path: directory of the model.
    """

    def __init__(self, message: str, hint: str = "", path: str = "") -> None:
        super().__init__(message, hint)
        self.path = path


class RuntimeLimitError(QuantkitError):
    """The runtime or hardware that the user named can't run this scheme or model."""


class FaultsFound(QuantkitError):
    """A gate failed, `verify` found a fault, or the sanity check failed. The files are kept.

    result: the result of `quantize`, where it raises this; None elsewhere.
    """

    exit_code = 3

    def __init__(self, message: str, hint: str = "", result: Any = None) -> None:
        super().__init__(message, hint)
        self.result = result


class Inconclusive(QuantkitError):
    """The confidence interval contains the limit of a gate that must be decided."""

    exit_code = 4


class NotComparableError(QuantkitError):
    """Two results have different protocols, tokens or base models."""

    exit_code = 5


class FollowerStopped(QuantkitError):
    """Ends a process of a distributed run after another process has failed. Only the failed process
    prints its error.

    exit_code: exit code of the failed process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Interrupted(QuantkitError):
    """The run was stopped between two steps, as its caller asked. The message tells whether a later
    run can continue it.
    """

    exit_code = 75


def brief(error: Exception, limit: int = 200) -> str:
    """Another library's message, shortened to be part of a sentence: one line of at most `limit`
    characters, cut after a sentence if one fits, else after a word.
    """
    text = " ".join(str(error).split())
    if len(text) <= limit:
        return text
    sentences = re.match(rf".{{1,{limit - 1}}}[.!?](?= )", text)
    return sentences[0] if sentences else text[:limit].rpartition(" ")[0] + " …"
