"""Whether evaluation runs on text that calibration has seen: windows are compared by hashes of
pieces of their tokens.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from quantkit.data.windows import Windows

if TYPE_CHECKING:
    import numpy as np

# Tokens in a piece: two windows overlap where they share one, at any place.
PIECE = 32


def token_pieces(windows: Windows) -> str:
    """Hashes of the windows' successive pieces of PIECE tokens, for `count_known_windows`: sorted
    little-endian 64-bit numbers, base64.
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
    """How many of the windows share a piece with the text that `pieces` were made of."""
    import numpy as np

    known = np.frombuffer(base64.b64decode(pieces), "<u8")
    return sum(
        bool(np.isin(_piece_hashes(np.array(window.tokens), PIECE), known).any())
        for window in windows.windows
    )


def _piece_hashes(tokens: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """A polynomial hash modulo 2^64 of each run of `length` tokens, [len(tokens) - length + 1] by
    the position where the run begins; empty where there are fewer tokens.
    """
    import numpy as np

    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        # Mixed first: token ids are small numbers, and sums of their multiples would collide too
        # often.
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        hashes = np.zeros(len(tokens) - length + 1, np.uint64)
        for offset in range(length):
            hashes = hashes * np.uint64(0xBF58476D1CE4E5B9) + mixed[offset : offset + len(hashes)]
        return hashes ^ (hashes >> np.uint64(32))
