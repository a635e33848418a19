"""Statistics of the scores per token: means with intervals, distributions, counts."""

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

# Bins of the base model's confidence: the probability of its most likely token.
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
POSITION_BINS = 8
# Bins of log10(KL in nats). Values outside of all bins count in the first or the last.
HISTOGRAM_EDGES = tuple(round(exponent / 4, 2) for exponent in range(-32, 9))


def per_window(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over the tokens of each window, [windows].

    values: [tokens].
    counts: tokens of each window, [windows], none of them 0.
    """
    return np.add.reduceat(values.astype(np.float64), np.concatenate([[0], np.cumsum(counts)[:-1]]))


@dataclass(frozen=True)
class Divergence:
    """The distribution of KL(base‖quant) over tokens, nats.

    mean: mean over tokens.
    mean_low, mean_high: its 95 % interval; None if there is only one window.
    method: method of the interval: "bootstrap", "t" or "none".
    median, p90, p99, p99_9, max: quantiles.
    max_at: the token with the largest KL.
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
        """The mean with its interval."""
        return Interval(self.mean, self.mean_low, self.mean_high, self.method)


def divergence(kld: np.ndarray, counts: np.ndarray) -> Divergence:
    """The distribution of KL over tokens, without `max_at`.

    kld: [tokens], nats.
    counts: tokens of each window, [windows].
    """
    mean = paired_interval(per_window(kld, counts), counts)
    median, p90, p99, p99_9 = (float(each) for each in np.quantile(kld, [0.5, 0.9, 0.99, 0.999]))
    return Divergence(
        mean.value, mean.low, mean.high, mean.method, median, p90, p99, p99_9, float(kld.max())
    )


@dataclass(frozen=True)
class Histogram:
    """Counts of tokens by log10 of their KL.

    log10_edges: edges of the bins, [bins + 1].
    counts: tokens in each bin, [bins].
    zero: tokens with a KL of exactly 0, which are in no bin.
    """

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    zero: int


def histogram(kld: np.ndarray) -> Histogram:
    """kld: [tokens], nats."""
    positive = kld[kld > 0]
    inside = np.clip(np.log10(positive), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts = np.histogram(inside, HISTOGRAM_EDGES)[0]
    return Histogram(HISTOGRAM_EDGES, tuple(counts.tolist()), int((kld == 0).sum()))


@dataclass(frozen=True)
class ProbabilityChange:
    """Δp: the change of the true token's probability, quant − base.

    mean: mean over tokens.
    rms: root mean square over tokens.
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
    """base_nll, nll: of the base and the quantized model, [tokens], nats."""
    change = np.exp(-nll) - np.exp(-base_nll)
    quantiles = np.quantile(change, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    return ProbabilityChange(
        float(change.mean()),
        float(np.sqrt((change**2).mean())),
        *(float(value) for value in quantiles),
    )


@dataclass(frozen=True)
class Flips:
    """Tokens that only one of the two models predicts correctly.

    to_wrong: number that only the base model predicts correctly.
    to_right: number that only the quantized model predicts correctly.
    mcnemar_p: p-value of McNemar's exact test that both numbers differ by chance only.
    """

    to_wrong: int
    to_right: int
    mcnemar_p: float


def flips(base_hit: np.ndarray, hit: np.ndarray) -> Flips:
    """base_hit, hit: whether base and quantized model predict the true token, [tokens]."""
    to_wrong, to_right = int((base_hit & ~hit).sum()), int((~base_hit & hit).sum())
    return Flips(to_wrong, to_right, mcnemar_p(to_wrong, to_right))


@dataclass(frozen=True)
class ConfidenceBin:
    """The tokens in one bin of the base model's confidence.

    low, high: edges of the bin, probabilities.
    tokens: number of tokens.
    kld_mean: their mean KL, nats; None if there are none.
    """

    low: float = field(metadata=key("from"))
    high: float = field(metadata=key("to"))
    tokens: int
    kld_mean: float | None


def by_confidence(kld: np.ndarray, confidence: np.ndarray) -> tuple[ConfidenceBin, ...]:
    """Mean KL by the base model's confidence.

    kld: [tokens], nats.
    confidence: probability of the base model's most likely token, [tokens].
    """
    rows = []
    for low, high in zip(CONFIDENCE_EDGES, CONFIDENCE_EDGES[1:]):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        mean = float(kld[inside].mean()) if inside.any() else None
        rows.append(ConfidenceBin(low, high, int(inside.sum()), mean))
    return tuple(rows)


@dataclass(frozen=True)
class PositionBin:
    """The tokens at some positions of their windows.

    low: first position.
    high: position after the last one.
    tokens: number of tokens.
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
    """Mean KL and ΔNLL by position in the window: does the error grow with the context?

    kld: [tokens], nats.
    difference: NLL, quant − base, [tokens], nats.
    positions: position of each token in its window, [tokens].
    length: length of the longest window, tokens.
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
    """ΔPPL estimated from the first windows only.

    windows: number of windows.
    interval: ΔPPL with its interval, %.
    """

    windows: int
    interval: Interval


def running_estimate(
    differences: Sequence[float],
    counts: Sequence[int],
    tokens_per_unit: float = 1.0,
    points: int = 40,
) -> list[RunningEstimate]:
    """How the estimate of ΔPPL settles as the text grows, at up to `points` numbers of windows.

    differences: Σ nll_quant − Σ nll_base of each window, nats.
    counts: tokens of each window.
    tokens_per_unit: tokens per word if perplexity is per word, else 1.
    """
    sums, tokens = np.asarray(differences, np.float64), np.asarray(counts)
    if len(tokens) < 2:
        return []
    places = np.unique(np.linspace(2, len(tokens), points).round().astype(int))
    return [
        RunningEstimate(int(end), perplexity_change_pct(sums[:end], tokens[:end], tokens_per_unit))
        for end in places
    ]
