"""The figures of a comparison: from numbers per token to what a reader is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantkit.evaluation.intervals import (
    Interval,
    mcnemar_p,
    paired_interval,
    perplexity_change_pct,
)

# Edges of the base's confidence: the probability that it gives to its likeliest token.
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
POSITION_BINS = 8
# Of KL in nats, in decades; what is below the first edge or above the last is counted in the bins
# at the ends.
HISTOGRAM_EDGES = tuple(round(exponent / 4, 2) for exponent in range(-32, 9))


def per_window(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over each window's tokens. counts: tokens of each window, none of them 0."""
    return np.add.reduceat(values.astype(np.float64), np.concatenate([[0], np.cumsum(counts)[:-1]]))


def divergence_figures(kld: np.ndarray, counts: np.ndarray) -> tuple[dict[str, Any], Interval]:
    """The distribution of KL over tokens, and its mean with an interval over windows."""
    interval = paired_interval(per_window(kld, counts), counts)
    quantiles = np.quantile(kld, [0.5, 0.9, 0.99, 0.999])
    names = ("median", "p90", "p99", "p99_9")
    figures = {
        "mean": interval.value,
        "mean_low": interval.low,
        "mean_high": interval.high,
        "method": interval.method,
    }
    return (
        figures
        | {name: float(value) for name, value in zip(names, quantiles)}
        | {"max": float(kld.max())},
        interval,
    )


def histogram(kld: np.ndarray) -> dict[str, Any]:
    """Counts of tokens by log10 of their KL; `zero` counts those without any."""
    positive = kld[kld > 0]
    inside = np.clip(np.log10(positive), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return {
        "log10_edges": list(HISTOGRAM_EDGES),
        "counts": np.histogram(inside, HISTOGRAM_EDGES)[0].tolist(),
        "zero": int((kld == 0).sum()),
    }


def probability_change(base_nll: np.ndarray, nll: np.ndarray) -> dict[str, float]:
    """Δp: how much the true token's probability changed, quant − base."""
    change = np.exp(-nll) - np.exp(-base_nll)
    quantiles = np.quantile(change, [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    named = zip(("p1", "p5", "p25", "median", "p75", "p95", "p99"), quantiles)
    return {"mean": float(change.mean()), "rms": float(np.sqrt((change**2).mean()))} | {
        name: float(value) for name, value in named
    }


def flips(base_hit: np.ndarray, hit: np.ndarray) -> dict[str, Any]:
    """Tokens that only one of the two predicts: right before and wrong now, and the other way;
    McNemar's p says whether that is more than chance.
    """
    to_wrong, to_right = int((base_hit & ~hit).sum()), int((~base_hit & hit).sum())
    return {"to_wrong": to_wrong, "to_right": to_right, "mcnemar_p": mcnemar_p(to_wrong, to_right)}


def by_confidence(kld: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
    """KL where the base was unsure and where it was sure."""
    rows = []
    for low, high in zip(CONFIDENCE_EDGES, CONFIDENCE_EDGES[1:]):
        chosen = (confidence >= low) & ((confidence < high) | (high == 1.0))
        rows.append(
            {
                "from": low,
                "to": high,
                "tokens": int(chosen.sum()),
                "kld_mean": float(kld[chosen].mean()) if chosen.any() else None,
            }
        )
    return rows


def by_position(
    kld: np.ndarray, difference: np.ndarray, positions: np.ndarray, length: int
) -> list[dict[str, Any]]:
    """KL and ΔNLL by the place in the window: does the damage grow with the context? positions: of
    each token; length: of the windows.
    """
    rows = []
    edges = np.linspace(0, length, min(POSITION_BINS, length) + 1).round().astype(int)
    for low, high in zip(edges, edges[1:]):
        chosen = (positions >= low) & (positions < high)
        if chosen.any():
            rows.append(
                {
                    "from": int(low),
                    "to": int(high),
                    "tokens": int(chosen.sum()),
                    "kld_mean": float(kld[chosen].mean()),
                    "delta_nll": float(difference[chosen].mean()),
                }
            )
    return rows


def running_estimate(
    differences: Sequence[float],
    counts: Sequence[int],
    tokens_per_unit: float = 1.0,
    points: int = 40,
) -> list[dict[str, Any]]:
    """ΔPPL % after the first 2, 3 … windows with its interval, at no more than so many places."""
    differences, counts = np.asarray(differences, np.float64), np.asarray(counts)
    places = (
        np.unique(np.linspace(2, len(counts), points).round().astype(int))
        if len(counts) > 1
        else []
    )
    return [
        {
            "windows": int(end),
            **perplexity_change_pct(differences[:end], counts[:end], tokens_per_unit).to_json(),
        }
        for end in places
    ]
