"""The text of an evaluation as metrics see it: which tokens are scored, where they stand, and in
which units losses are reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.data.windows import Window, Windows


@dataclass(frozen=True)
class Place:
    """Where a token stands.

    window: its number, from 0.
    position: in the window, from 0.
    context: the text before it, of at most 16 tokens.
    token: its own text.
    """

    window: int
    position: int
    context: str
    token: str


@dataclass(frozen=True)
class ScoredText:
    """The scored tokens of all windows, in order.

    windows: of all ranks.
    tokenizer: the base's.
    counts: scored tokens of each window, [windows], none of them 0.
    units: words under the protocol lmeval, else scored tokens; perplexity is per unit.
    utf8_bytes: bytes of the scored text.
    """

    windows: Windows
    tokenizer: Any
    counts: np.ndarray
    units: int
    utf8_bytes: int

    @classmethod
    def of(cls, windows: Windows, tokenizer: Any, protocol: str) -> ScoredText:
        return cls(
            windows,
            tokenizer,
            np.array([window.scored for window in windows.windows]),
            windows.words if protocol == "lmeval" else windows.tokens_scored,
            _scored_bytes(windows, tokenizer, protocol),
        )

    @property
    def tokens_per_unit(self) -> float:
        return self.windows.tokens_scored / self.units

    @property
    def longest_window(self) -> int:
        return max(len(window.tokens) for window in self.windows.windows)

    @property
    def positions(self) -> np.ndarray:
        """Of each scored token in its window, [tokens]."""
        return np.concatenate(
            [np.arange(window.first_scored, len(window.tokens)) for window in self.windows.windows]
        )

    def place(self, token: int) -> Place:
        """token: its number among the scored ones."""
        ends = np.cumsum(self.counts)
        number = int(np.searchsorted(ends, token, side="right"))
        window = self.windows.windows[number]
        position = window.first_scored + token - int(ends[number] - self.counts[number])
        context, own = (
            self.tokenizer.decode(window.tokens[max(0, position - 16) : position]),
            self.tokenizer.decode([window.tokens[position]]),
        )
        return Place(number, position, context, own)


def _scored_bytes(windows: Windows, tokenizer: Any, protocol: str) -> int:
    """UTF-8 bytes of the text whose tokens are scored. Where windows cut it, from the tokens' own
    text: a character that is cut in two counts as it is shown.
    """
    if protocol == "lmeval":
        return windows.utf8_bytes

    def text(window: Window) -> str:
        return tokenizer.decode(
            list(window.tokens[window.first_scored :]),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    return sum(len(text(window).encode("utf-8", "replace")) for window in windows.windows)
