"""The text of an evaluation, as metrics need it: which tokens are scored, where they are, and in
which units perplexity is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.data.windows import Window, Windows
from quantkit.models.task import SEQ2SEQ

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.evaluation.masked_lm import Masking


@dataclass(frozen=True)
class Place:
    """The place of a token in the text.

    window: number of its window, from 0.
    position: its position in the window, from 0.
    context: text of up to 16 tokens before it.
    token: its own text.
    """

    window: int
    position: int
    context: str
    token: str


@dataclass(frozen=True)
class ScoredText:
    """The scored tokens of all windows, in order.

    windows: the windows of all ranks.
    tokenizer: the base model's tokenizer.
    counts: scored tokens of each window, [windows], none of them 0.
    units: the number that perplexity is divided by: words with the protocol lmeval, else tokens.
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
        """Tokens per word if perplexity is per word, else 1."""
        return self.windows.tokens_scored / self.units

    @property
    def longest_window(self) -> int:
        """Tokens of the longest window."""
        return max(len(window.tokens) for window in self.windows.windows)

    @property
    def positions(self) -> np.ndarray:
        """The position of each scored token in its window, [tokens]."""
        return np.concatenate(
            [np.arange(window.first_scored, len(window.tokens)) for window in self.windows.windows]
        )

    def place(self, token: int) -> Place:
        """Where a token is. token: its index among all scored tokens."""
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
    """UTF-8 bytes of the scored text. Unless the protocol knows them, they are counted in the
    decoded windows, where a character that is split between windows counts as its replacement.
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


def scored_states(
    states: Tensor, window: Window, task: str, masking: Masking | None = None
) -> Tensor:
    """The final hidden states that predict a window's scored tokens, [scored, hidden size].

    states: those of all of the window's inputs, [rows, tokens, hidden size].
    """
    if masking is not None:
        return masking.scored(states)
    if task == SEQ2SEQ:
        return states[0]
    return states[0, window.first_scored - 1 : len(window.tokens) - 1]
