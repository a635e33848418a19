"""Masked language models: each token of a window is masked in turn and predicted from all others.

The metric is pseudo-perplexity (Salazar et al. 2020, "Masked Language Model Scoring"): exp of the
mean of −log p(token | the rest of its window). A window of L tokens needs L inputs of L tokens, so
windows are short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.data.windows import Window, Windows
from quantkit.errors import EvaluationError

DEFAULT_LENGTH = 64
# Two for the special tokens around a window, two because RoBERTa's positions start at 2.
RESERVED_POSITIONS = 4


@dataclass(frozen=True)
class Masking:
    """How a tokenizer's model expects masked text.

    mask: the mask token.
    before: special tokens before a text, such as [CLS].
    after: special tokens after it, such as [SEP].
    """

    mask: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Masking:
        """Raises EvaluationError if the tokenizer has no mask token."""
        if tokenizer.mask_token_id is None:
            raise EvaluationError(
                "the tokenizer has no mask token, which the evaluation of a masked language model"
                " needs; copy the model's own tokenizer into its directory"
            )
        around = [
            () if token is None else (token,)
            for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        ]
        return cls(tokenizer.mask_token_id, *around)

    @staticmethod
    def windows(windows: Windows) -> Windows:
        """The same windows with every token scored, including the first."""
        return Windows(
            tuple(Window(window.tokens, 0) for window in windows.windows), windows.source_sha256
        )

    def inputs(self, window: Window) -> Tensor:
        """The inputs of a window, [tokens, tokens + special tokens]; row i has token i masked."""
        rows = torch.tensor([[*self.before, *window.tokens, *self.after]]).repeat(
            len(window.tokens), 1
        )
        places = torch.arange(len(window.tokens))
        rows[places, places + len(self.before)] = self.mask
        return rows

    def scored(self, states: Tensor) -> Tensor:
        """The hidden states at the masked positions, [tokens, hidden size].

        states: those of all inputs of a window, [tokens, tokens + special tokens, hidden size].
        """
        places = torch.arange(states.shape[0])
        return states[places, places + len(self.before)]
