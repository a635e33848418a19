"""Masked language models: every token of a window is hidden in turn and predicted from all
the others.

The figure is a pseudo-perplexity (Salazar et al. 2020, Masked Language Model Scoring): exp of the
mean of −log p(token | the rest of its window). A window of L tokens is L inputs of the model, so
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
# What stands around a window, and positions that such models count from 2 on.
RESERVED_POSITIONS = 4


@dataclass(frozen=True)
class Masking:
    """mask: the token in place of the hidden one. before, after: what the tokenizer puts around a
    text.
    """

    mask: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Masking:
        if tokenizer.mask_token_id is None:
            raise EvaluationError(
                "the tokenizer has no mask token, by which a masked language model is evaluated;"
                " copy the model's own tokenizer into its directory"
            )
        around = [
            () if token is None else (token,)
            for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)
        ]
        return cls(tokenizer.mask_token_id, *around)

    @staticmethod
    def windows(windows: Windows) -> Windows:
        """The same windows with every token scored, the first too."""
        return Windows(
            tuple(Window(window.tokens, 0) for window in windows.windows), windows.source_sha256
        )

    def inputs(self, window: Window) -> Tensor:
        """[tokens, tokens and what stands around them]: row i has token i hidden."""
        rows = torch.tensor([[*self.before, *window.tokens, *self.after]]).repeat(
            len(window.tokens), 1
        )
        places = torch.arange(len(window.tokens))
        rows[places, places + len(self.before)] = self.mask
        return rows

    def scored(self, states: Tensor) -> Tensor:
        """The hidden states of the hidden tokens, [tokens, hidden size]. states: of all inputs of a
        window.
        """
        places = torch.arange(states.shape[0])
        return states[places, places + len(self.before)]
