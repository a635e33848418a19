"""The numbers of each scored token, in order: what every metric is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

Scores = TypeVar("Scores", bound="TokenScores")


@dataclass(frozen=True)
class TokenScores:
    """Of the base. Each array: [tokens].

    nll: −log of the true token's probability, nats.
    hit: whether the likeliest token is the true one.
    confidence: the probability of the likeliest token.
    """

    nll: np.ndarray
    hit: np.ndarray
    confidence: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Which tokens have no number that is NaN or infinite."""
        return np.isfinite(self.nll)

    @property
    def nonfinite(self) -> int:
        return int((~self.finite).sum())


@dataclass(frozen=True)
class PairedScores(TokenScores):
    """Of the base and of a candidate on the same tokens. Each array: [tokens].

    quant_nll: −log of the true token's probability in the candidate, nats.
    quant_hit: whether the candidate's likeliest token is the true one.
    kld: KL(base‖quant), nats.
    same_top1: whether both find the same token likeliest.
    """

    quant_nll: np.ndarray
    quant_hit: np.ndarray
    kld: np.ndarray
    same_top1: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.nll) & np.isfinite(self.quant_nll) & np.isfinite(self.kld)


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several parts of a text, one after the other."""
    kind = type(parts[0])
    return kind(
        **{
            column.name: np.concatenate([getattr(part, column.name) for part in parts])
            for column in fields(kind)
        }
    )
