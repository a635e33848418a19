"""Paired confidence intervals for the difference of two models on the same text.

Both models run over the same tokens, so each window w gives one difference d_w = Σ nll_quant −
Σ nll_base. Most of the variance, which comes from the choice of the text, cancels. The bootstrap
resamples windows, not tokens, because the tokens of a window are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantkit.evaluation.json_values import fields_to_json

BOOTSTRAP_RESAMPLES = 2000
# With fewer windows, bootstrap intervals are too narrow, and Student's t is used instead.
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
    low: lower bound; None if there is only one window.
    high: upper bound; None if there is only one window.
    method: "bootstrap", "t" or "none"; "exact" for a value without uncertainty.
    """

    value: float
    low: float | None
    high: float | None
    method: str

    @property
    def half_width(self) -> float | None:
        """Half the width: about the smallest true effect that this text distinguishes from zero."""
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
        """The value and its interval, such as "+1.23 % [+1.10, +1.36]"."""
        value = f"{self.value:+.{digits}f}{unit}"
        if self.low is None:
            return value
        return f"{value} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


@dataclass(frozen=True)
class Difference(Interval):
    """A difference with its 95 % interval.

    smallest_resolvable: about the smallest true difference that this text distinguishes from zero;
        None if there is only one window.
    """

    smallest_resolvable: float | None = None

    @classmethod
    def of(cls, interval: Interval) -> Difference:
        return cls(
            interval.value, interval.low, interval.high, interval.method, interval.half_width
        )


def paired_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> Interval:
    """The mean per token, Σ sums / Σ counts, with its 95 % interval over windows.

    sums: sums over the tokens of each window, [windows].
    counts: tokens of each window, [windows].
    seed: seed of the bootstrap.

    Source: Efron & Tibshirani 1993, percentile bootstrap of a ratio.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(sums.sum() / counts.sum())
    windows = len(sums)
    if windows < 2:
        return Interval(value, None, None, "none")
    if windows < MIN_BOOTSTRAP_WINDOWS:
        # Residuals of the ratio weight windows of different lengths by their tokens.
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
    """100·(ppl_quant / ppl_base − 1) with its 95 % interval, %.

    differences: Σ nll_quant − Σ nll_base of each window, [windows], nats.
    counts: tokens of each window, [windows].
    tokens_per_unit: tokens per word if perplexity is per word, else 1.
    """
    return paired_interval(differences, counts).mapped(
        lambda mean: 100.0 * np.expm1(mean * tokens_per_unit)
    )


def mcnemar_p(first: int, second: int) -> float:
    """The two-sided p-value of McNemar's exact test.

    first, second: numbers of tokens that only the first, and only the second, model predicts.

    If both models were equally good, the smaller count would be binomial(first + second, ½). Tokens
    of a text are correlated, so a p-value near the significance level says little.
    """
    total, smaller = first + second, min(first, second)
    if total == 0:
        return 1.0
    # log C(n, k) for k = 0 … smaller, from ratios of neighbours, so that n = 10⁵ doesn't overflow.
    chosen = np.arange(1, smaller + 1)
    logs = np.concatenate(
        [[0.0], np.cumsum(np.log((total - chosen + 1) / chosen))]
    ) - total * math.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))
