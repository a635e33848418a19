"""Facts about checkpoints that need no run: their sizes, the Linears that they skip, and what they
were calibrated on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantkit.checkpoint.finished_output import MANIFEST_FILE
from quantkit.checkpoint.formats import stored_linears
from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.data.text_overlap import count_known_windows
from quantkit.data.windows import Windows
from quantkit.errors import CheckpointError
from quantkit.models.tensor_roles import linears_of


def elements(checkpoint: Checkpoint) -> int:
    """Of all tensors."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def skipped_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Linears of the decoder blocks, and lm_head, that are not quantized."""
    stored = stored_linears(checkpoint.tensors)
    modules = linears_of(checkpoint).modules("linear", "lm_head")
    skipped = [name for name in modules if name not in stored]
    if "lm_head" not in skipped and "lm_head" not in stored:
        skipped.append("lm_head")
    return tuple(skipped)


def calibrated_on(
    checkpoint: Checkpoint, sources: Sequence[str], windows: Windows
) -> tuple[int, tuple[str, ...]]:
    """How many of these windows hold text that the checkpoint's scales were made with, and which
    sources, by its own manifest.

    A source is known by its hash: calibration windows shorter than a piece leave no other trace.
    """
    manifest = checkpoint.path / MANIFEST_FILE
    stored = read_json(manifest, "").get("calibrated_on") if manifest.is_file() else None
    if not stored:
        return 0, ()
    try:
        # files of earlier versions have none
        known = frozenset(stored.get("source_sha256", ()))
        count = count_known_windows(windows, stored["token_pieces"])
        same = zip(sources, windows.source_sha256)
        return count, tuple(name for name, sha256 in same if sha256 in known)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{manifest} is damaged (calibrated_on); export again") from None
