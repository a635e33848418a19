"""What quantkit refuses or fails at, each a sentence for the user and an exit code.

    QuantkitError            1   failed: what was given, what is allowed, what to do
    ├── CheckpointError      1   a model directory that can't be read or isn't supported
    ├── DownloadError        1   a shard that the hub didn't give; what is done is kept
    ├── RecipeError          1   a scheme, recipe or pattern that makes no sense for this model
    ├── CalibrationError     1   statistics missing, or of another model or recipe
    ├── DataError            1   text that can't be read or is too short
    ├── OutputError          1   a place that can't be written to
    ├── EvaluationError      1   a model that can't be judged
    │   └── NonFiniteError   1   one that computes NaN or infinity
    ├── RuntimeLimitError    1   the named runtime or hardware can't run this
    ├── FaultsFound          3   a gate failed, or `verify` found a fault
    ├── Inconclusive         4   `eval --strict`: the text can't decide a gate
    ├── NotComparableError   5   results of different protocols, tokens or bases
    ├── FollowerStopped      n   a process of several, ended because the first one refused; says
    nothing itself
    └── Interrupted         75   stopped by a signal; `--resume` continues

The command line turns these into one line in one place; every other exception is a bug and keeps
its traceback.
"""


class QuantkitError(Exception):
    exit_code = 1


class CheckpointError(QuantkitError):
    pass


class DownloadError(QuantkitError):
    pass


class RecipeError(QuantkitError):
    pass


class CalibrationError(QuantkitError):
    pass


class DataError(QuantkitError):
    pass


class OutputError(QuantkitError):
    pass


class EvaluationError(QuantkitError):
    pass


class NonFiniteError(EvaluationError):
    """path: of the model."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class RuntimeLimitError(QuantkitError):
    pass


class FaultsFound(QuantkitError):
    exit_code = 3


class Inconclusive(QuantkitError):
    exit_code = 4


class NotComparableError(QuantkitError):
    exit_code = 5


class FollowerStopped(QuantkitError):
    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Interrupted(QuantkitError):
    exit_code = 75
