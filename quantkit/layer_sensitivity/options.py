"""The options of `sensitivity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.data.sources import DataSource
from quantkit.schemes.recipe import Recipe

KEEP = "keep"  # the choice of keeping a layer group in its stored dtype


@dataclass(frozen=True)
class SensitivityOptions:
    """What to score, and for which budget.

    model: the unquantized checkpoint.
    recipe: how all layer groups are quantized.
    alternatives: other choices of a budget for a group: names of schemes, or "keep".
    calibration: gives static scales, and the weights that algorithms quantized.
    data: text files or datasets; the bundled text if there are none.
    max_tokens: how many tokens each variant runs on.
    seq_len: tokens of a window; None for the default of the model's task.
    max_size: budget, as "150MB", "65%" or "+5%", or None.
    max_kld: budget, mean KL in nats, or None.
    seed: for sampling windows.
    output: the JSON file to write; the resume state is stored next to it while the run lasts.
    resume: continue an interrupted run.
    overwrite: discard an interrupted run and start again.
    """

    model: Path
    recipe: Recipe
    alternatives: tuple[str, ...] = (KEEP,)
    calibration: Path | None = None
    data: tuple[DataSource, ...] = ()
    max_tokens: int = 2048
    seq_len: int | None = None
    max_size: str | None = None
    max_kld: float | None = None
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False

    @property
    def resumable_output(self) -> Path | None:
        """The output, where an interrupted run can be continued: not a device or a pipe."""
        if self.output is None or (self.output.exists() and not self.output.is_file()):
            return None
        return self.output
