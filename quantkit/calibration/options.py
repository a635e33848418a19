"""What to calibrate, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantkit.schemes.recipe import Recipe


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate and how.

    memory: bytes that hidden states may hold before they go to a file; None is half of what the
    machine has to spare.
    all_experts: show every token to every expert.
    """

    model: Path
    output: Path
    data: tuple[str, ...] = ()
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


# on_progress(done, in all, what is being done)
Progress = Callable[[float, float, str], None]
