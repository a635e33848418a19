"""Detecting evaluation text that was used for calibration: windows are compared by hashes of
32-token pieces.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from quantkit.data.windows import Windows

if TYPE_CHECKING:
    import numpy as np

# Tokens in a piece. Two windows overlap if they share a piece, at any positions.
PIECE = 32


def token_pieces(windows: Windows) -> str:
    """Hashes of the windows' consecutive pieces of PIECE tokens, for `count_known_windows`.

    Returns sorted little-endian 64-bit numbers in base64.
    """
    import numpy as np

    hashes = [_piece_hashes(np.array(window.tokens), PIECE) for window in windows.windows]
    kept = (
        np.unique(np.concatenate([window[::PIECE] for window in hashes]))
        if hashes
        else np.zeros(0, "<u8")
    )
    return base64.b64encode(kept.astype("<u8").tobytes()).decode()


def count_known_windows(windows: Windows, pieces: str) -> int:
    """The number of windows that share a piece with the calibration text.

    pieces: what `token_pieces` returned for that text.
    """
    import numpy as np

    known = np.frombuffer(base64.b64decode(pieces), "<u8")
    return sum(
        bool(np.isin(_piece_hashes(np.array(window.tokens), PIECE), known).any())
        for window in windows.windows
    )


def _piece_hashes(tokens: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """Polynomial hashes modulo 2^64 of every run of `length` tokens, [len(tokens) - length + 1].

    The index is the position at which a run begins. Empty if there are fewer tokens.
    """
    import numpy as np

    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        # Token ids are mixed first: they are small numbers, and sums of their multiples would
        # collide too often.
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        hashes = np.zeros(len(tokens) - length + 1, np.uint64)
        for offset in range(length):
            hashes = hashes * np.uint64(0xBF58476D1CE4E5B9) + mixed[offset : offset + len(hashes)]
        return hashes ^ (hashes >> np.uint64(32))
