"""The tables and remarks of `sensitivity`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.checkpoint.units import counted, format_bytes
from quantkit.evaluation.intervals import Interval
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.options import KEEP

SHOWN = 15  # layer groups; all of them with -v
GROUP_COLUMNS = (
    "",
    "layer group",
    "KL above noise floor",
    "share",
    "KL quantized alone [95 %]",
    "KL saved by keeping it",
    "weight SQNR, dB",
    "output SQNR, dB",
    "size quantized",
    "size kept",
)
LINE_COLUMNS = (
    "groups changed",
    "to",
    "size",
    "KL predicted",
    "KL measured [95 %]",
    "ΔPPL measured [95 %]",
)


def sensitivity_title(result: Mapping[str, Any]) -> str:
    scheme = result["recipe"]["scheme"]
    named = scheme if isinstance(scheme, str) else "the recipe's scheme"
    return (
        f"{result['model']['path']}, {counted(len(result['sets']), 'layer group')} in {named}:"
        f" {result['tokens_scored']} tokens in {counted(result['windows'], 'window')} of"
        f" {result['seq_len']}"
    )


def group_rows(result: Mapping[str, Any], shown: int | None = SHOWN) -> list[tuple[str, ...]]:
    """The rows of GROUP_COLUMNS, the group with the largest KL first."""
    total = result["additivity"][RECIPE]["sum"]
    rows: list[tuple[str, ...]] = []
    for rank, place in enumerate(result["ranking"][:shown], 1):
        entry = result["sets"][place]
        metrics = entry["choices"][RECIPE]
        rows.append(
            (
                str(rank),
                entry["name"],
                f"{metrics['own_kld']:.6f}",
                f"{100 * metrics['own_kld'] / total:.1f} %" if total else "",
                _kld(metrics),
                f"{entry['restored']['gain']:+.6f}" if "restored" in entry else "",
                _least(entry["layers"], "weight_sqnr_db"),
                _least(entry["layers"], "output_sqnr_db"),
                format_bytes(metrics["bytes"]),
                format_bytes(entry["choices"][KEEP]["bytes"]),
            )
        )
    return rows


def _kld(metrics: Mapping[str, Any], digits: int = 6) -> str:
    bounds = (
        ""
        if metrics["kld_low"] is None
        else f" [{max(0.0, metrics['kld_low']):.{digits}f}, {metrics['kld_high']:.{digits}f}]"
    )
    return f"{metrics['kld']:.{digits}f}{bounds}"


def _least(layers: Sequence[Mapping[str, Any]], key: str) -> str:
    # JSON has no infinity
    values = [math.inf if layer[key] is None else layer[key] for layer in layers if key in layer]
    return "" if not values else f"{min(values):.1f}" if min(values) < 200 else "exact"


def line_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of LINE_COLUMNS: the measured points of the Pareto lines, then the solution."""
    rows = []
    for line in result["pareto"]:
        for point in line["points"]:
            if isinstance(point.get("measured"), dict):
                rows.append(_line_row(str(point["k"]), _given(line["to"]), point))
    solution = result.get("solution")
    if solution is not None:
        rows.append(
            _line_row(
                f"budget: {solution['moved']}",
                " and ".join(_given(name) for name in sorted(set(solution["choices"]) - {RECIPE})),
                solution,
            )
        )
    return rows


def _is_measured(point: Mapping[str, Any]) -> bool:
    return isinstance(point.get("measured"), dict) and point["measured"]["kld"] > 0


def _given(choice: str) -> str:
    return "their stored dtype" if choice == KEEP else choice


def _line_row(what: str, given: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    measured = point.get("measured")
    metrics = (
        (_kld(measured, 5), Interval(**measured["ppl_delta_pct"]).text())
        if isinstance(measured, dict)
        else ("", "")
    )
    return what, given, format_bytes(point["bytes"]), f"{point['kld_predicted']:.5f}", *metrics


def sensitivity_remarks(result: Mapping[str, Any]) -> list[str]:
    """Sentences under the tables: the noise floor, how well sums predict, and the solution."""
    floor = result["floor"]
    return [
        *result["remarks"],
        (
            "noise floor: perturbing 1 in 12 activations by one rounding step gives a KL of"
            f" {floor[0]:.2g} before the first block and {floor[-1]:.2g} after the last; it is"
            " subtracted from the KL of each layer group"
        ),
        *(_additivity_remark(name, entry) for name, entry in result["additivity"].items()),
        *_error_remarks(result),
        _work_remark(result),
        *_solution_remarks(result.get("solution")),
    ]


def _additivity_remark(name: str, entry: Mapping[str, Any]) -> str:
    advice = (
        "these predictions are reliable enough for a budget"
        if entry["additive"]
        else "prefer measured points to predictions, because the groups' errors are not independent"
        " in this model"
    )
    scheme = "" if name == RECIPE else f" in {name}"
    return (
        f"the KLs of single layer groups{scheme} add up to {entry['sum']:.4f}; all groups together"
        f" have KL {entry['whole']:.4f}. Predictions are sums times {entry['factor']:.2f}; {advice}"
    )


def _error_remarks(result: Mapping[str, Any]) -> list[str]:
    off = [
        abs(point["kld_predicted"] / point["measured"]["kld"] - 1)
        for line in result["pareto"]
        for point in line["points"]
        if _is_measured(point)
    ]
    if not off:
        return []
    return [f"predictions differ from measured points by at most {100 * max(off):.0f} %"]


def _work_remark(result: Mapping[str, Any]) -> str:
    took = ""
    if "seconds" in result:
        memory = format_bytes(result["peak_memory_bytes"])
        took = f"; {result['seconds']:.0f} s, peak memory {memory}"
    return (
        f"blocks ran {result['block_runs']} times over all windows, instead of"
        f" {result['block_runs_without_sharing']} times with separate runs of all variants{took}"
    )


def _solution_remarks(solution: Mapping[str, Any] | None) -> list[str]:
    if solution is None:
        return []
    choices = solution["choices"]
    counts = {name: choices.count(name) for name in dict.fromkeys(choices)}
    what = ", ".join(
        f"{count} as in the recipe" if name == RECIPE else f"{count} in {_given(name)}"
        for name, count in counts.items()
    )
    return [
        f"best choice within the budget, by predictions: of {len(choices)} layer groups,"
        f" {what}; {format_bytes(solution['bytes'])}, predicted KL {solution['kld_predicted']:.4f}"
    ]
