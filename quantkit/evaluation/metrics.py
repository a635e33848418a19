"""The metrics of `eval`. Each is a row of METRICS. The row says how the metric is computed from the
scores per token, how it is shown, whether a gate may test it, and how `compare` pairs it.

To add a metric, add a row. If a gate may test it, also name it in the help of that option
(`cli/evaluate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from quantkit.evaluation import token_statistics
from quantkit.evaluation.intervals import (
    Difference,
    Interval,
    paired_interval,
    perplexity_change_pct,
)
from quantkit.evaluation.json_values import INLINE, from_json
from quantkit.evaluation.scored_text import ScoredText
from quantkit.evaluation.token_scores import PairedScores
from quantkit.evaluation.token_statistics import (
    ConfidenceBin,
    Divergence,
    Flips,
    Histogram,
    PositionBin,
    ProbabilityChange,
    per_window,
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class NoiseFloor:
    """The effect of one more rounding to bfloat16 after each block of the base model.

    kld: KL(base‖base with noise), nats.
    kld_histogram: distribution of that KL over tokens.
    top1_agreement: share of positions whose most likely token stays the same.
    ppl_delta_pct: change of perplexity, %.
    """

    kld: Divergence
    kld_histogram: Histogram
    top1_agreement: float
    ppl_delta_pct: Interval

    @classmethod
    def of(cls, scores: PairedScores, text: ScoredText) -> NoiseFloor:
        """scores: of the base model, and of the base model with noise as the quantized one."""
        return cls(
            token_statistics.divergence(scores.kld, text.counts),
            token_statistics.histogram(scores.kld),
            float(scores.same_top1.mean()),
            perplexity_change_pct(
                per_window(scores.quant_nll - scores.nll, text.counts),
                text.counts,
                text.tokens_per_unit,
            ),
        )


class BaseNumbers(Protocol):
    """The results of the base model that a row may show."""

    @property
    def perplexity(self) -> float: ...

    @property
    def bits_per_byte(self) -> float | None: ...


# ---- The parts of a row.


@dataclass(frozen=True)
class Shown(Generic[Value]):
    """How a report shows a metric, as a column or a row of a table.

    heading: heading of the column or row.
    text: formats the value of a quantized model.
    of_base: formats the base model's value; a row repeats it in parentheses after each cell.
    of_noise: formats the noise floor's value.
    """

    heading: str
    text: Callable[[Value], str]
    of_base: Callable[[BaseNumbers], str] | None = None
    of_noise: Callable[[NoiseFloor], str] | None = None


@dataclass(frozen=True)
class Gateable(Generic[Value]):
    """How a gate tests a metric.

    name: name of the metric in the gate's expression.
    unit: unit of the gate's bound.
    interval: returns the value with its interval, in that unit.
    """

    name: str
    unit: str
    interval: Callable[[Value], Interval]


@dataclass(frozen=True)
class Pairing:
    """How `compare` computes the difference of two quantized models from two stored
    results of `eval`.

    sums: JSON key of the sums over each window's tokens.
    per_token: returns the summed values, [tokens].
    delta: JSON key of the difference B − A.
    heading: heading of its column.
    text: formats the difference.
    interval: returns the difference with its interval, from the differences of the windows' sums,
        the tokens of each window, and the tokens per unit of perplexity.
    """

    sums: str
    per_token: Callable[[PairedScores], np.ndarray]
    delta: str
    heading: str
    text: Callable[[Interval], str]
    interval: Callable[[np.ndarray, np.ndarray, float], Interval] = lambda differences, counts, _: (
        paired_interval(differences, counts)
    )

    def window_sums(self, scores: PairedScores, counts: np.ndarray) -> np.ndarray:
        return per_window(self.per_token(scores), counts)


@dataclass(frozen=True)
class Metric(Generic[Value]):
    """A metric.

    name: its key in the JSON.
    kind: type of its value: float, int, or a dataclass that json_values can read.
    value: computes it from the scores of all tokens.
    columns: its columns in the table of models.
    rows: its rows in the table of all metrics.
    rows_last: whether those rows come after those of the other metrics.
    gate: how a gate tests it; None if no gate can.
    pairing: how `compare` pairs it; None if it can't.
    """

    name: str
    kind: Any
    value: Callable[[PairedScores, ScoredText], Value]
    columns: tuple[Shown[Value], ...] = ()
    rows: tuple[Shown[Value], ...] = ()
    rows_last: bool = False
    gate: Gateable[Value] | None = None
    pairing: Pairing | None = None


# ---- Values by metric. Their keys are merged into a larger JSON object.


@dataclass(frozen=True)
class MetricValues:
    """The metrics of one quantized model. `values[KLD]` is the value of the metric KLD.

    values: metric name → value. A file of an earlier version may lack some metrics.
    """

    values: Mapping[str, Any] = field(metadata=INLINE)

    def __getitem__(self, metric: Metric[Value]) -> Value:
        return self.values[metric.name]

    @classmethod
    def of(cls, scores: PairedScores, text: ScoredText) -> MetricValues:
        return cls({metric.name: metric.value(scores, text) for metric in METRICS})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MetricValues:
        found = [metric for metric in METRICS if metric.name in content]
        return cls({metric.name: from_json(metric.kind, content[metric.name]) for metric in found})


@dataclass(frozen=True)
class WindowSums:
    """Sums over the tokens of each window, for the metrics that `compare` pairs.

    values: `Pairing.sums` → one sum per window.
    """

    values: Mapping[str, tuple[float, ...]] = field(metadata=INLINE)

    def __getitem__(self, metric: Metric[Any]) -> tuple[float, ...]:
        assert metric.pairing is not None, metric.name
        return self.values[metric.pairing.sums]

    @classmethod
    def of(cls, scores: PairedScores, text: ScoredText) -> WindowSums:
        return cls(
            {
                pairing.sums: tuple(pairing.window_sums(scores, text.counts).tolist())
                for _, pairing in paired_metrics()
            }
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> WindowSums:
        keys = [pairing.sums for _, pairing in paired_metrics()]
        return cls({key: from_json(tuple[float, ...], content[key]) for key in keys})


@dataclass(frozen=True)
class Deltas:
    """Differences of two quantized models, B − A.

    values: `Pairing.delta` → the difference.
    """

    values: Mapping[str, Difference] = field(metadata=INLINE)

    def __getitem__(self, metric: Metric[Any]) -> Difference:
        assert metric.pairing is not None, metric.name
        return self.values[metric.pairing.delta]

    @classmethod
    def of(cls, a: WindowSums, b: WindowSums, counts: np.ndarray, per_unit: float) -> Deltas:
        """B − A with paired intervals.

        counts: tokens of each window, [windows].
        per_unit: tokens per word if perplexity is per word, else 1.
        """
        return cls(
            {
                pairing.delta: Difference.of(
                    pairing.interval(np.array(b[metric]) - np.array(a[metric]), counts, per_unit)
                )
                for metric, pairing in paired_metrics()
            }
        )


def paired_metrics() -> Iterator[tuple[Metric[Any], Pairing]]:
    """The metrics that `compare` pairs."""
    return ((metric, metric.pairing) for metric in METRICS if metric.pairing is not None)


def gateable_metrics() -> Iterator[tuple[Metric[Any], Gateable[Any]]]:
    """The metrics that a gate may test."""
    return ((metric, metric.gate) for metric in METRICS if metric.gate is not None)


# ---- Computing and formatting values.


def perplexity(nll: np.ndarray, units: int) -> float:
    """exp(Σ nll / units). nll: [tokens], nats; units: number of tokens, or of words."""
    return float(np.exp(nll.sum() / units))


def bits_per_byte(nll: np.ndarray, utf8_bytes: int) -> float | None:
    """Σ nll in bits / bytes of the text; None for an empty text. nll: [tokens], nats."""
    return float(nll.sum() / math.log(2) / utf8_bytes) if utf8_bytes else None


def _perplexity_change(scores: PairedScores, text: ScoredText) -> Difference:
    quant, base = (per_window(nll, text.counts) for nll in (scores.quant_nll, scores.nll))
    return Difference.of(perplexity_change_pct(quant - base, text.counts, text.tokens_per_unit))


def _divergence(scores: PairedScores, text: ScoredText) -> Divergence:
    found = token_statistics.divergence(scores.kld, text.counts)
    return replace(found, max_at=text.place(int(scores.kld.argmax())))


def _top1(scores: PairedScores, text: ScoredText) -> Interval:
    return paired_interval(per_window(scores.same_top1, text.counts), text.counts)


def _mean_text(kld: Divergence) -> str:
    bounds = "" if kld.mean_low is None else f" [{kld.mean_low:.5f}, {kld.mean_high:.5f}]"
    return f"{kld.mean:.5f}{bounds}"


def _quantiles_text(kld: Divergence) -> str:
    return " · ".join(f"{each:.4f}" for each in (kld.median, kld.p90, kld.p99, kld.p99_9, kld.max))


def _share_text(share: Interval) -> str:
    bounds = "" if share.low is None else f" [{100 * share.low:.2f}, {100 * (share.high or 0):.2f}]"
    return f"{100 * share.value:.2f} %{bounds}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _bits_text(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.4f}"


def _confidence_text(bins: Sequence[ConfidenceBin], low: float, high: float) -> str:
    """The mean KL over the tokens whose confidence is between two edges of bins."""
    inside = [row for row in bins if row.low >= low and row.high <= high]
    tokens = sum(row.tokens for row in inside)
    total = sum(row.kld_mean * row.tokens for row in inside if row.kld_mean is not None)
    return f"{total / tokens:.5f}" if tokens else "–"


def _points_text(change: Interval) -> str:
    return change.mapped(lambda share: 100 * share).text(unit=" points")


# ---- The table.

PERPLEXITY: Metric[float] = Metric(
    "perplexity",
    float,
    lambda scores, text: perplexity(scores.quant_nll, text.units),
    columns=(
        Shown(
            "perplexity",
            lambda value: f"{value:.4f}",
            of_base=lambda base: f"{base.perplexity:.4f}",
        ),
    ),
)
PPL_DELTA: Metric[Difference] = Metric(
    "ppl_delta_pct",
    Difference,
    _perplexity_change,
    columns=(Shown("ΔPPL [95 %]", lambda delta: delta.text()),),
    gate=Gateable("ppl_delta_pct", "per cent", lambda delta: delta),
    pairing=Pairing(
        "window_nll",
        lambda scores: scores.quant_nll,
        "ppl_delta_pct",
        "B against A [95 %]",
        lambda delta: delta.text(),
        perplexity_change_pct,
    ),
)
KLD: Metric[Divergence] = Metric(
    "kld",
    Divergence,
    _divergence,
    columns=(
        Shown("KL mean", lambda kld: f"{kld.mean:.5f}"),
        Shown("KL p99", lambda kld: f"{kld.p99:.4f}"),
    ),
    rows=(
        Shown(
            "KL(base‖quant) mean [95 %], nats",
            _mean_text,
            of_noise=lambda floor: _mean_text(floor.kld),
        ),
        Shown(
            "KL median · p90 · p99 · p99.9 · max",
            _quantiles_text,
            of_noise=lambda floor: _quantiles_text(floor.kld),
        ),
    ),
    gate=Gateable("kld_mean", "nats", lambda kld: kld.interval),
    pairing=Pairing(
        "window_kld",
        lambda scores: scores.kld,
        "kld_delta",
        "KL B − A [95 %]",
        lambda delta: delta.text(5, ""),
    ),
)
KLD_HISTOGRAM: Metric[Histogram] = Metric(
    "kld_histogram", Histogram, lambda scores, text: token_statistics.histogram(scores.kld)
)
KLD_BY_CONFIDENCE: Metric[tuple[ConfidenceBin, ...]] = Metric(
    "kld_by_confidence",
    tuple[ConfidenceBin, ...],
    lambda scores, text: token_statistics.by_confidence(scores.kld, scores.confidence),
    rows=(
        Shown(
            "KL where the base is sure of < 25 % · > 90 %",
            lambda bins: (
                f"{_confidence_text(bins, 0.0, 0.25)} · {_confidence_text(bins, 0.9, 1.0)}"
            ),
        ),
    ),
    rows_last=True,
)
KLD_BY_POSITION: Metric[tuple[PositionBin, ...]] = Metric(
    "kld_by_position",
    tuple[PositionBin, ...],
    lambda scores, text: token_statistics.by_position(
        scores.kld, scores.quant_nll - scores.nll, text.positions, text.longest_window
    ),
    rows=(
        Shown(
            "KL in the windows' first · last eighth",
            lambda bins: f"{bins[0].kld_mean:.5f} · {bins[-1].kld_mean:.5f}",
        ),
    ),
    rows_last=True,
)
TOP1_AGREEMENT: Metric[float] = Metric(
    "top1_agreement",
    float,
    lambda scores, text: float(scores.same_top1.mean()),
    columns=(Shown("same top-1", _percent),),
)
TOP1: Metric[Interval] = Metric(
    "top1",
    Interval,
    _top1,
    rows=(
        Shown(
            "same top-1 [95 %]", _share_text, of_noise=lambda floor: _percent(floor.top1_agreement)
        ),
    ),
    gate=Gateable("top1", "shares of 1", lambda share: share),
    pairing=Pairing(
        "window_same_top1",
        lambda scores: scores.same_top1,
        "top1_delta",
        "same top-1 B − A [95 %]",
        _points_text,
    ),
)
FLIPS: Metric[Flips] = Metric(
    "flips",
    Flips,
    lambda scores, text: token_statistics.flips(scores.hit, scores.quant_hit),
    rows=(
        Shown(
            "right before, wrong now · the other way",
            lambda flips: f"{flips.to_wrong} · {flips.to_right}",
        ),
        Shown("McNemar's p of these", lambda flips: f"{flips.mcnemar_p:.3g}"),
    ),
)
DELTA_P: Metric[ProbabilityChange] = Metric(
    "delta_p",
    ProbabilityChange,
    lambda scores, text: token_statistics.probability_change(scores.nll, scores.quant_nll),
    rows=(
        Shown(
            "Δp of the true token: mean · RMS",
            lambda change: f"{100 * change.mean:+.3f} % · {100 * change.rms:.3f} %",
        ),
        Shown(
            "Δp p1 · p99", lambda change: f"{100 * change.p1:+.2f} % · {100 * change.p99:+.2f} %"
        ),
    ),
)
BITS_PER_BYTE: Metric[float | None] = Metric(
    "bits_per_byte",
    float | None,
    lambda scores, text: bits_per_byte(scores.quant_nll, text.utf8_bytes),
    rows=(
        Shown(
            "bits per byte (base)", _bits_text, of_base=lambda base: _bits_text(base.bits_per_byte)
        ),
    ),
)
NONFINITE: Metric[int] = Metric(
    "nonfinite",
    int,
    lambda scores, text: scores.nonfinite,
    rows=(Shown("non-finite tokens", str),),
    rows_last=True,
)

# The order of JSON keys, of columns and of rows, except that rows with `rows_last` come last.
METRICS: tuple[Metric[Any], ...] = (
    PERPLEXITY,
    PPL_DELTA,
    KLD,
    KLD_HISTOGRAM,
    KLD_BY_CONFIDENCE,
    KLD_BY_POSITION,
    TOP1_AGREEMENT,
    TOP1,
    FLIPS,
    DELTA_P,
    BITS_PER_BYTE,
    NONFINITE,
)
