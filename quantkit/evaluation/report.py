"""The reports of `eval` and `compare`: tables, remarks, and Markdown for a model card."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.checkpoint.short_names import short_names
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.evaluation import metrics
from quantkit.evaluation.compare import ComparedQuant, Comparison, Pair
from quantkit.evaluation.metrics import KLD, PPL_DELTA, Metric, Shown
from quantkit.evaluation.result import (
    BaseResult,
    ChannelSqnr,
    Evaluation,
    EvaluationProtocol,
    GateResult,
    LayerError,
    QuantResult,
)

WORST_SHOWN = 5  # layers of each quantized model


@dataclass(frozen=True)
class Table:
    """A table of text.

    columns: headings.
    rows: rows of cells, one for each column.
    right: indices of the columns that are aligned to the right, because they contain numbers.
    important: indices of the columns that a narrow terminal shows, the most important first.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int]
    important: Sequence[int] = ()

    def renamed(self, names: Mapping[str, str]) -> Table:
        """The table with each heading and cell that is in `names` replaced."""
        return replace(
            self,
            columns=[names.get(column, column) for column in self.columns],
            rows=[[names.get(cell, cell) for cell in row] for row in self.rows],
        )


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with a newline at its end."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# ---- Tables of `eval`.

_ACTIVATIONS: dict[bool | str, str] = {True: "yes", False: "no"}


_IMPORTANT_OF_MODELS = ("model", "ΔPPL [95 %]", "KL mean", "size", "scheme", "same top-1")


def model_table(evaluation: Evaluation) -> Table:
    """One row for the base model, one for each quantized model."""
    shown = [(metric, column) for metric in metrics.METRICS for column in metric.columns]
    names = ("size", "bits/weight", "Linears", "inputs quantized", "tokens/s")
    columns = ("model", "scheme", *(column.heading for _, column in shown), *names)
    rows = [_base_cells(evaluation.base, [column for _, column in shown])]
    rows += [_quant_cells(quant, shown) for quant in evaluation.quants]
    not_numbers = ("model", "scheme", "inputs quantized")
    right = [place for place, column in enumerate(columns) if column not in not_numbers]
    important = [columns.index(column) for column in _IMPORTANT_OF_MODELS]
    return Table(columns, rows, right, important)


def _base_cells(base: BaseResult, shown: Sequence[Shown[Any]]) -> list[str]:
    return [
        base.path,
        "base",
        *(column.of_base(base) if column.of_base else "" for column in shown),
        format_bytes(base.bytes),
        f"{base.bits_per_weight:.2f}",
        "",
        "",
        f"{base.tokens_per_second:.0f}",
    ]


def _quant_cells(quant: QuantResult, shown: Sequence[tuple[Metric[Any], Shown[Any]]]) -> list[str]:
    return [
        quant.path,
        quant.scheme,
        *(column.text(quant.metrics[metric]) for metric, column in shown),
        format_bytes(quant.bytes),
        f"{quant.bits_per_weight:.2f}",
        f"{quant.linears_quantized} ({len(quant.linears_left)} skipped)",
        _ACTIVATIONS.get(quant.activations_quantized, "in part"),
        f"{quant.tokens_per_second:.0f}",
    ]


def metric_table(evaluation: Evaluation) -> Table:
    """All metrics: one column for each quantized model, and one for the noise floor if it was
    measured.
    """
    quants, noise = evaluation.quants, evaluation.noise_floor
    columns = ("metric", *(quant.path for quant in quants), *(["noise floor"] if noise else []))
    in_order = sorted(metrics.METRICS, key=lambda each: each.rows_last)
    rows = []
    for metric, row in [(each, row) for each in in_order for row in each.rows]:
        of_base = f" ({row.of_base(evaluation.base)})" if row.of_base else ""
        cells = [row.text(quant.metrics[metric]) + of_base for quant in quants]
        if noise:
            cells.append(row.of_noise(noise) if row.of_noise else "")
        rows.append([row.heading, *cells])
    empty = [""] if noise else []
    rows += [[heading, *(text(quant) for quant in quants), *empty] for heading, text in _MODEL_ROWS]
    numbers = range(1, len(columns))
    return Table(columns, rows, numbers, range(1 + len(quants)))


# Rows of the same table that are no metrics of tokens.
_MODEL_ROWS: tuple[tuple[str, Callable[[QuantResult], str]], ...] = (
    ("KV cache quantized", lambda quant: "yes" if quant.kv_cache_quantized else "no"),
    ("peak memory so far", lambda quant: format_bytes(quant.peak_memory_bytes)),
)


def layer_table(evaluation: Evaluation, shown: int = WORST_SHOWN) -> Table:
    """The worst layers of each quantized model, in the order of `QuantResult.layers`."""
    columns = (
        "model",
        "worst layers",
        "weight dB",
        "median channel",
        "output dB",
        "median channel",
        "clipped w · in",
        "underflowing w · in",
    )
    rows = [
        [
            quant.path,
            layer.name,
            decibels_text(layer.weight_sqnr_db),
            _median_text(layer.weight_channel_sqnr_db),
            decibels_text(layer.output_sqnr_db),
            _median_text(layer.output_channel_sqnr_db),
            f"{_share(layer.weight_clipped)} · {_share(layer.input_clipped)}",
            f"{_share(layer.weight_underflowed)} · {_share(layer.input_underflowed)}",
        ]
        for quant in evaluation.quants
        for layer in quant.layers[:shown]
    ]
    return Table(columns, rows, range(2, len(columns)), (1, 0, 4, 2))


def decibels_text(value: float | None) -> str:
    """A level in dB; "exact" for infinity, empty for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    return "exact" if math.isinf(value) and value > 0 else f"{value:.1f}"


def _median_text(channels: ChannelSqnr | None) -> str:
    return "" if channels is None else decibels_text(channels.median)


def _share(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{100 * value:.2g} %"


# ---- Sentences of `eval`.


def evaluation_title(evaluation: Evaluation) -> str:
    """The text, the protocol and the arithmetic of an evaluation, in one line."""
    hardware = f", as {evaluation.hardware} computes" if evaluation.hardware else ""
    text = _text_described(evaluation.protocol, evaluation.tokens_scored, evaluation.windows)
    return f"{text}, {_arithmetic(evaluation)}{hardware}"


def _text_described(protocol: EvaluationProtocol, tokens: int, windows: int) -> str:
    return (
        f"{tokens} tokens in {counted(windows, 'window')} of {protocol.seq_len}, protocol"
        f" {protocol.name} ({protocol.hash})"
    )


def _arithmetic(evaluation: Evaluation) -> str:
    ran = {quant.exec for quant in evaluation.quants}
    if ran <= {"reference"}:
        return "reference arithmetic"
    kernels = f"kernels ({evaluation.kernel_level})"
    return kernels if ran == {"kernel"} else f"{kernels} and reference arithmetic"


def evaluation_remarks(evaluation: Evaluation) -> list[str]:
    """Sentences to read with the tables."""
    remarks = [*evaluation.remarks]
    if evaluation.base.from_cache:
        remarks.append(
            f"{evaluation.base.path}: its hidden states and its tokens/s are from an earlier run;"
            " `cache=False` computes them again"
        )
    for quant in evaluation.quants:
        remarks += _quant_remarks(evaluation, quant)
    if evaluation.noise_floor:
        remarks.append(
            "noise floor: one more rounding to bfloat16 after each block of the base model gives a"
            f" KL of {evaluation.noise_floor.kld.mean:.2g}; a KL of about that size is noise"
        )
    remarks += [f"gate {gate.expr} on {gate.path}: {gate_text(gate)}" for gate in evaluation.gates]
    return remarks


def gate_text(gate: GateResult) -> str:
    """The outcome with the value, such as "pass (0.812)"."""
    more = (
        f"; it needs about {gate.more_tokens_needed} more tokens" if gate.more_tokens_needed else ""
    )
    return f"{gate.result} ({gate.measured()}{more})"


def _quant_remarks(evaluation: Evaluation, quant: QuantResult) -> list[str]:
    remarks = [
        *(
            f"{quant.path}: {remark}"
            for remark in (
                *_arithmetic_remarks(quant),
                *_interval_remarks(evaluation, quant),
                *_largest_divergence(quant),
            )
        ),
        *_calibration_remarks(evaluation, quant),
    ]
    if quant.weights_only_linears:
        remarks.append(
            f"{quant.path}: {len(quant.weights_only_linears)} fused experts ran with unquantized"
            " inputs"
        )
    if quant.layers:
        remarks.append(f"{quant.path}: {_worst_weight(quant.layers)}")
    return remarks


def _arithmetic_remarks(quant: QuantResult) -> list[str]:
    if quant.exec != "mixed":
        return []
    kernels = ", ".join(f"{name} ({count} Linears)" for name, count in quant.kernels.items())
    return [f"ran through {kernels}"]


def _interval_remarks(evaluation: Evaluation, quant: QuantResult) -> list[str]:
    delta, remarks = quant.metrics[PPL_DELTA], []
    if delta.method == "t":
        remarks.append(
            f"Student's t interval: {evaluation.windows} windows are too few for a bootstrap"
        )
    elif delta.method == "none":
        remarks.append("one window gives no interval; give more text or a smaller `seq_len`")
    if delta.smallest_resolvable:
        remarks.append(
            f"this much text resolves differences of about {delta.smallest_resolvable:.2f} %"
        )
    return remarks


def _largest_divergence(quant: QuantResult) -> list[str]:
    kld = quant.metrics[KLD]
    if kld.max <= 0 or kld.max_at is None:
        return []
    context = " ".join(kld.max_at.context.split())[-60:]
    return [
        f"the largest KL, {kld.max:.3g}, is in window {kld.max_at.window + 1} at position"
        f" {kld.max_at.position}, after “{context}”"
    ]


def _calibration_remarks(evaluation: Evaluation, quant: QuantResult) -> list[str]:
    if quant.windows_calibrated_on:
        return [
            f"Warning: {quant.path} was calibrated on text of {quant.windows_calibrated_on} of"
            f" these {evaluation.windows} windows; evaluate it on other text"
        ]
    if quant.sources_calibrated_on:
        return [
            f"Warning: {quant.path} was calibrated on {', '.join(quant.sources_calibrated_on)};"
            " evaluate it on other text"
        ]
    return []


def _worst_weight(layers: Sequence[LayerError]) -> str:
    worst = min(layers, key=lambda layer: layer.weight_sqnr_db)
    decibels = f"{decibels_text(worst.weight_sqnr_db)} dB".replace("exact dB", "exact")
    return f"the weight that changed most is {worst.name}, {decibels}"


def evaluation_markdown(evaluation: Evaluation) -> str:
    """The tables and the remarks in Markdown, for a model card."""
    sources = ", ".join(evaluation.data.sources)
    lines = [f"## Quality\n\n{evaluation_title(evaluation)}; {sources}.\n"]
    tables = [model_table(evaluation)]
    if evaluation.quants:
        tables.append(metric_table(evaluation))
    tables.append(layer_table(evaluation))
    lines += [markdown_table(table.columns, table.rows) for table in tables if table.rows]
    lines += [f"- {remark}" for remark in evaluation_remarks(evaluation)]
    return "\n".join(lines) + "\n"


# ---- `compare`.


def comparison_table(comparison: Comparison) -> Table:
    """One row for each pair."""
    paired = list(metrics.paired_metrics())
    columns = (
        "A",
        "B",
        "perplexity A",
        "perplexity B",
        *(pairing.heading for _, pairing in paired),
        "size B / A",
    )
    rows = [
        [
            _with_scheme(pair.a.path, pair.a),
            _with_scheme(pair.b.path, pair.b),
            f"{pair.a.perplexity:.4f}",
            f"{pair.b.perplexity:.4f}",
            *(pairing.text(pair.deltas[metric]) for metric, pairing in paired),
            f"{pair.size_ratio:.3f}",
        ]
        for pair in comparison.pairs
    ]
    differences = [columns.index(pairing.heading) for _, pairing in paired[:2]]
    return Table(columns, rows, range(2, len(columns)), (0, 1, *differences))


def _with_scheme(name: str, quant: ComparedQuant) -> str:
    return f"{name} ({quant.scheme})"


def comparison_names(comparison: Comparison) -> dict[str, str]:
    """Cell of the table → a short name, with the scheme where the name doesn't say it."""
    models = [model for pair in comparison.pairs for model in (pair.a, pair.b)]
    names = short_names([model.path for model in models])
    return {
        _with_scheme(each.path, each): names[each.path]
        if each.scheme in names[each.path]
        else _with_scheme(names[each.path], each)
        for each in models
    }


def comparison_title(comparison: Comparison) -> str:
    """The text, the protocol and the base model of a comparison, in one line."""
    text = _text_described(comparison.protocol, comparison.tokens_scored, comparison.windows)
    return f"{text}, base {comparison.base.path}"


def comparison_remarks(comparison: Comparison) -> list[str]:
    """Sentences to read with the table."""
    return [*comparison.remarks, *(_pair_remark(pair) for pair in comparison.pairs)]


def _pair_remark(pair: Pair) -> str:
    delta, names = pair.deltas[PPL_DELTA], f"{pair.b.path} against {pair.a.path}"
    if delta.low is None or delta.high is None:
        return f"{names}: one window gives no interval; evaluate both on more text"
    if delta.low <= 0 <= delta.high:
        return (
            f"{names}: no significant difference; this text resolves about"
            f" {delta.smallest_resolvable:.2f} %"
        )
    better = pair.b.path if delta.value < 0 else pair.a.path
    return f"{names}: {better} is significantly better"
