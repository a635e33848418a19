"""Facts about a checkpoint that need no forward pass: its size, its skipped Linears, and the text
that it was calibrated on.
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
    """The number of elements in all tensors."""
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def skipped_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The Linears of the decoder blocks that are not quantized; with lm_head, unless it is."""
    stored = stored_linears(checkpoint.tensors)
    modules = linears_of(checkpoint).modules("linear", "lm_head")
    skipped = [name for name in modules if name not in stored]
    if "lm_head" not in skipped and "lm_head" not in stored:
        skipped.append("lm_head")
    return tuple(skipped)


def calibrated_on(
    checkpoint: Checkpoint, sources: Sequence[str], windows: Windows
) -> tuple[int, tuple[str, ...]]:
    """Which of the evaluation text the checkpoint was calibrated on, according to its manifest.

    Returns the number of windows that share text with the calibration, and the sources that were
    used for it. Sources are recognized by their hash, because calibration windows shorter than a
    piece of text leave no other trace.

    Raises CheckpointError if the manifest is damaged.
    """
    manifest = checkpoint.path / MANIFEST_FILE
    stored = read_json(manifest, "").get("calibrated_on") if manifest.is_file() else None
    if not stored:
        return 0, ()
    try:
        # Manifests of earlier versions have no hashes of sources.
        known = frozenset(stored.get("source_sha256", ()))
        count = count_known_windows(windows, stored["token_pieces"])
        same = zip(sources, windows.source_sha256)
        return count, tuple(name for name, sha256 in same if sha256 in known)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{manifest} is damaged (calibrated_on); export again") from None
