"""Paired intervals: how much of a difference between two models on the same text is real.

The same tokens go through both models, so each window gives one difference d_w = Σ nll_quant − Σ
nll_base; most of the noise (which text it happens to be) cancels. Windows, not tokens, are
resampled, because tokens of one window depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantkit.evaluation.json_values import fields_to_json

BOOTSTRAP_RESAMPLES = 2000
# Below this many windows a bootstrap's intervals come out too narrow; Student's t takes over.
MIN_BOOTSTRAP_WINDOWS = 20
# Two-sided 95 % quantiles of Student's t for 1 … 18 degrees of freedom.
_T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval.

    value: the estimate.
    low: the lower bound, None where one window allows no interval.
    high: the upper bound, None likewise.
    method: "bootstrap", "t" or "none".
    """

    value: float
    low: float | None
    high: float | None
    method: str

    @property
    def half_width(self) -> float | None:
        """Half the interval: about the smallest true effect that this much text tells from zero."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_json(self) -> dict[str, float | str | None]:
        return fields_to_json(self)

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the value."""
        low, high = (
            None if bound is None else float(function(bound)) for bound in (self.low, self.high)
        )
        return Interval(float(function(self.value)), low, high, self.method)

    def text(self, digits: int = 2, unit: str = " %") -> str:
        """+1.23 % [+1.10, +1.36]"""
        value = f"{self.value:+.{digits}f}{unit}"
        if self.low is None:
            return value
        return f"{value} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


@dataclass(frozen=True)
class Difference(Interval):
    """An interval that can be compared with zero.

    smallest_resolvable: about the smallest true difference that this much text tells from zero.
    """

    smallest_resolvable: float | None = None

    @classmethod
    def of(cls, interval: Interval) -> Difference:
        return cls(
            interval.value, interval.low, interval.high, interval.method, interval.half_width
        )


def paired_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> Interval:
    """The mean per token, Σ sums / Σ counts, with its 95 % interval over windows.

    sums, counts: one entry per window, float64 and int. Source: Efron & Tibshirani 1993, percentile
    bootstrap of a ratio.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(sums.sum() / counts.sum())
    windows = len(sums)
    if windows < 2:
        return Interval(value, None, None, "none")
    if windows < MIN_BOOTSTRAP_WINDOWS:
        # The ratio's residuals, so that windows of different lengths weigh by their tokens.
        residuals = (sums - value * counts) / counts.mean()
        error = float(residuals.std(ddof=1) / np.sqrt(windows)) * _T_975[windows - 2]
        return Interval(value, value - error, value + error, "t")
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, windows, size=(BOOTSTRAP_RESAMPLES, windows))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(value, float(low), float(high), "bootstrap")


def perplexity_change_pct(
    differences: np.ndarray, counts: np.ndarray, tokens_per_unit: float = 1.0
) -> Interval:
    """100·(ppl_quant / ppl_base − 1) with its interval. differences: Σ nll_quant − Σ nll_base per
    window.

    tokens_per_unit: tokens per word where perplexity is per word.
    """
    return paired_interval(differences, counts).mapped(
        lambda mean: 100.0 * np.expm1(mean * tokens_per_unit)
    )


def mcnemar_p(first: int, second: int) -> float:
    """The two-sided p of McNemar's exact test: are so unequal counts of disagreement, one way and
    the other, chance?

    Under the hypothesis that neither way is likelier, the smaller count is binomial(n, ½). Tokens
    of one text lean on each other, so a p close to the limit says little.
    """
    total, smaller = first + second, min(first, second)
    if total == 0:
        return 1.0
    # log C(n, k), k = 0 … smaller, from the ratios of neighbours: n of 10⁵ overflow nothing.
    chosen = np.arange(1, smaller + 1)
    logs = np.concatenate(
        [[0.0], np.cumsum(np.log((total - chosen + 1) / chosen))]
    ) - total * math.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))
