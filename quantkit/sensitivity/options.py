"""What `sensitivity` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.schemes.recipe import Recipe

KEEP = "keep"  # the choice of leaving a layer group in its stored dtype


@dataclass(frozen=True)
class SensitivityOptions:
    """model: the unquantized checkpoint.
    recipe: what all layer groups are quantized with.
    alternatives: what a budget may give a single group instead: names of schemes, or "keep".
    calibration: its static scales are used, and weights that algorithms quantized are scored.
    max_tokens: how much text each variant runs on. seq_len: tokens of a window.
    max_size: budget in bytes or percent, or None. max_kld: budget in nats, or None.
    output: the JSON file to write; the resume state is stored next to it while the run lasts.
    resume: continue an interrupted run. overwrite: start an interrupted run again.
    """

    model: Path
    recipe: Recipe
    alternatives: tuple[str, ...] = (KEEP,)
    calibration: Path | None = None
    data: tuple[str, ...] = ()
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
