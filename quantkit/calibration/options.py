"""Options of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.data.sources import DataSource
from quantkit.schemes.recipe import Recipe


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate and how.

    model: directory of the checkpoint.
    output: the CALIB directory to write.
    data: text sources; without any, the bundled text.
    recipe: its algorithms are run; None measures statistics only.
    num_samples: windows of text.
    seq_len: tokens per window; None for 2048, or fewer where the model has fewer positions.
    batch_size: windows per batch; None for one that suits the device.
    seed: for sampling windows and for random rotations.
    device: "auto", "cpu" or "cuda".
    memory: bytes of hidden states kept in memory, the rest goes to a file; None for half of the
        available memory.
    all_experts: show every token to every expert.
    resume: continue an interrupted run.
    overwrite: replace an existing output.
    trust_remote_code: run the model's own Python code.
    """

    model: Path
    output: Path
    data: tuple[DataSource, ...] = ()
    recipe: Recipe | None = None
    num_samples: int = 128
    seq_len: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "auto"
    memory: int | None = None
    all_experts: bool = False
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
