"""From numbers per token to what a reader is told: means with intervals, distributions, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quantkit.evaluation.intervals import (
    Interval,
    mcnemar_p,
    paired_interval,
    perplexity_change_pct,
)
from quantkit.evaluation.json_values import OMIT_NONE, key
from quantkit.evaluation.scored_text import Place

# Edges of the base's confidence: the probability that it gives to its likeliest token.
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
POSITION_BINS = 8
# Of KL in nats, in decades; what is below the first edge or above the last is counted in the bins
# at the ends.
HISTOGRAM_EDGES = tuple(round(exponent / 4, 2) for exponent in range(-32, 9))


def per_window(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over each window's tokens. counts: tokens of each window, none of them 0."""
    return np.add.reduceat(values.astype(np.float64), np.concatenate([[0], np.cumsum(counts)[:-1]]))


@dataclass(frozen=True)
class Divergence:
    """The distribution of KL(base‖quant) over tokens, nats.

    mean: with its 95 % interval mean_low, mean_high; these are None where one window allows none.
    method: of the interval: "bootstrap", "t" or "none".
    median, p90, p99, p99_9, max: quantiles.
    max_at: where the largest is.
    """

    mean: float
    mean_low: float | None
    mean_high: float | None
    method: str
    median: float
    p90: float
    p99: float
    p99_9: float
    max: float
    max_at: Place | None = field(default=None, metadata=OMIT_NONE)

    @property
    def interval(self) -> Interval:
        """Of the mean."""
        return Interval(self.mean, self.mean_low, self.mean_high, self.method)


def divergence(kld: np.ndarray, counts: np.ndarray) -> Divergence:
    """kld: [tokens]; counts: tokens of each window."""
    mean = paired_interval(per_window(kld, counts), counts)
    median, p90, p99, p99_9 = (float(each) for each in np.quantile(kld, [0.5, 0.9, 0.99, 0.999]))
    return Divergence(
        mean.value, mean.low, mean.high, mean.method, median, p90, p99, p99_9, float(kld.max())
    )


@dataclass(frozen=True)
class Histogram:
    """Counts of tokens by log10 of their KL.

    log10_edges: of the bins, [bins + 1].
    counts: tokens in each bin.
    zero: tokens without any divergence.
    """

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    zero: int


def histogram(kld: np.ndarray) -> Histogram:
    positive = kld[kld > 0]
    inside = np.clip(np.log10(positive), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts = np.histogram(inside, HISTOGRAM_EDGES)[0]
    return Histogram(HISTOGRAM_EDGES, tuple(counts.tolist()), int((kld == 0).sum()))


@dataclass(frozen=True)
class ProbabilityChange:
    """Δp: by how much the true token's probability changed, quant − base.

    mean, rms: over tokens.
    p1, p5, p25, median, p75, p95, p99: quantiles.
    """

    mean: float
    rms: float
    p1: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    p99: float


def probability_change(base_nll: np.ndarray, nll: np.ndarray) -> ProbabilityChange:
    change = np.exp(-nll) - np.exp(-base_nll)
    quantiles = np.quantile(change, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    return ProbabilityChange(
        float(change.mean()),
        float(np.sqrt((change**2).mean())),
        *(float(value) for value in quantiles),
    )


@dataclass(frozen=True)
class Flips:
    """Tokens that only one of the two models predicts.

    to_wrong: right in the base, wrong in the candidate.
    to_right: the other way.
    mcnemar_p: the probability that chance alone makes them so unequal.
    """

    to_wrong: int
    to_right: int
    mcnemar_p: float


def flips(base_hit: np.ndarray, hit: np.ndarray) -> Flips:
    to_wrong, to_right = int((base_hit & ~hit).sum()), int((~base_hit & hit).sum())
    return Flips(to_wrong, to_right, mcnemar_p(to_wrong, to_right))


@dataclass(frozen=True)
class ConfidenceBin:
    """Tokens by the base's confidence.

    low, high: edges of the bin, as probabilities.
    tokens: how many are in it.
    kld_mean: their mean KL in nats, None without any.
    """

    low: float = field(metadata=key("from"))
    high: float = field(metadata=key("to"))
    tokens: int
    kld_mean: float | None


def by_confidence(kld: np.ndarray, confidence: np.ndarray) -> tuple[ConfidenceBin, ...]:
    """KL where the base was unsure and where it was sure."""
    rows = []
    for low, high in zip(CONFIDENCE_EDGES, CONFIDENCE_EDGES[1:]):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        mean = float(kld[inside].mean()) if inside.any() else None
        rows.append(ConfidenceBin(low, high, int(inside.sum()), mean))
    return tuple(rows)


@dataclass(frozen=True)
class PositionBin:
    """Tokens by their place in the window.

    low, high: first position, and the one after the last.
    tokens: how many are in it.
    kld_mean: their mean KL, nats.
    delta_nll: their mean NLL, quant − base, nats.
    """

    low: int = field(metadata=key("from"))
    high: int = field(metadata=key("to"))
    tokens: int
    kld_mean: float
    delta_nll: float


def by_position(
    kld: np.ndarray, difference: np.ndarray, positions: np.ndarray, length: int
) -> tuple[PositionBin, ...]:
    """KL and ΔNLL by the place in the window: does the damage grow with the context? positions: of
    each token; length: of the windows.
    """
    rows = []
    edges = np.linspace(0, length, min(POSITION_BINS, length) + 1).round().astype(int)
    for low, high in zip(edges, edges[1:]):
        inside = (positions >= low) & (positions < high)
        if inside.any():
            means = float(kld[inside].mean()), float(difference[inside].mean())
            rows.append(PositionBin(int(low), int(high), int(inside.sum()), *means))
    return tuple(rows)


@dataclass(frozen=True)
class RunningEstimate:
    """ΔPPL % of the first windows.

    windows: how many.
    interval: the estimate with its interval, %.
    """

    windows: int
    interval: Interval


def running_estimate(
    differences: Sequence[float],
    counts: Sequence[int],
    tokens_per_unit: float = 1.0,
    points: int = 40,
) -> list[RunningEstimate]:
    """After the first 2, 3 … windows, at no more than so many places."""
    sums, tokens = np.asarray(differences, np.float64), np.asarray(counts)
    if len(tokens) < 2:
        return []
    places = np.unique(np.linspace(2, len(tokens), points).round().astype(int))
    return [
        RunningEstimate(int(end), perplexity_change_pct(sums[:end], tokens[:end], tokens_per_unit))
        for end in places
    ]
