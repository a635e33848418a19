"""Scores per token. Every metric is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

Scores = TypeVar("Scores", bound="TokenScores")


@dataclass(frozen=True)
class TokenScores:
    """The base model's scores of the scored tokens, in order. Each array: [tokens].

    nll: −log of the true token's probability, nats.
    hit: whether the most likely token is the true one.
    confidence: the probability of the most likely token.
    """

    nll: np.ndarray
    hit: np.ndarray
    confidence: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Which tokens have only finite scores, [tokens]."""
        return np.isfinite(self.nll)

    @property
    def nonfinite(self) -> int:
        """The number of tokens with a NaN or infinite score."""
        return int((~self.finite).sum())


@dataclass(frozen=True)
class PairedScores(TokenScores):
    """Scores of the base model and of a quantized model on the same tokens. Each array: [tokens].

    quant_nll: −log of the true token's probability in the quantized model, nats.
    quant_hit: whether the quantized model's most likely token is the true one.
    kld: KL(base‖quant), nats.
    same_top1: whether both models have the same most likely token.
    """

    quant_nll: np.ndarray
    quant_hit: np.ndarray
    kld: np.ndarray
    same_top1: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.nll) & np.isfinite(self.quant_nll) & np.isfinite(self.kld)


def joined(parts: Sequence[Scores]) -> Scores:
    """Concatenate the scores of consecutive parts of a text."""
    kind = type(parts[0])
    return kind(
        **{
            column.name: np.concatenate([getattr(part, column.name) for part in parts])
            for column in fields(kind)
        }
    )
