"""What `sensitivity` says to people: its tables, and what must be known beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.checkpoint.units import counted, format_bytes
from quantkit.evaluation.intervals import Interval
from quantkit.sensitivity.advice import KEEP, RECIPE

SHOWN = 15  # sets; all of them with -v
SET_COLUMNS = (
    "",
    "set",
    "KL beyond the floor",
    "share",
    "KL alone [95 %]",
    "restored, KL less",
    "weight dB",
    "output dB",
    "quantized",
    "kept",
)
LINE_COLUMNS = (
    "worst sets",
    "given",
    "size",
    "KL predicted",
    "KL measured [95 %]",
    "ΔPPL measured [95 %]",
)


def sensitivity_title(result: Mapping[str, Any]) -> str:
    scheme = result["recipe"]["scheme"]
    named = scheme if isinstance(scheme, str) else "the recipe's scheme"
    return (
        f"{result['model']['path']}, {counted(len(result['sets']), 'set')} in {named}:"
        f" {result['tokens_scored']} tokens in {counted(result['windows'], 'window')} of"
        f" {result['seq_len']}"
    )


def set_rows(result: Mapping[str, Any], shown: int | None = SHOWN) -> list[tuple[str, ...]]:
    """The columns are SET_COLUMNS; the set that costs most first."""
    total = result["additivity"][RECIPE]["sum"]
    rows = []
    for rank, place in enumerate(result["ranking"][:shown], 1):
        entry = result["sets"][place]
        figure = entry["choices"][RECIPE]
        rows.append(
            (
                str(rank),
                entry["name"],
                f"{figure['own_kld']:.6f}",
                f"{100 * figure['own_kld'] / total:.1f} %" if total else "",
                _kld(figure),
                f"{entry['restored']['gain']:+.6f}" if "restored" in entry else "",
                _least(entry["layers"], "weight_sqnr_db"),
                _least(entry["layers"], "output_sqnr_db"),
                format_bytes(figure["bytes"]),
                format_bytes(entry["choices"][KEEP]["bytes"]),
            )
        )
    return rows


def _kld(figure: Mapping[str, Any], digits: int = 6) -> str:
    bounds = (
        ""
        if figure["kld_low"] is None
        else f" [{max(0.0, figure['kld_low']):.{digits}f}, {figure['kld_high']:.{digits}f}]"
    )
    return f"{figure['kld']:.{digits}f}{bounds}"


def _least(layers: Sequence[Mapping[str, Any]], key: str) -> str:
    # JSON has no infinity
    values = [math.inf if layer[key] is None else layer[key] for layer in layers if key in layer]
    return "" if not values else f"{min(values):.1f}" if min(values) < 200 else "exact"


def line_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The measured points of the Pareto lines; the columns are LINE_COLUMNS."""
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
    figures = (
        (_kld(measured, 5), Interval(**measured["ppl_delta_pct"]).text())
        if isinstance(measured, dict)
        else ("", "")
    )
    return what, given, format_bytes(point["bytes"]), f"{point['kld_predicted']:.5f}", *figures


def sensitivity_remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know beside them."""
    remarks = list(result["remarks"])
    floor = result["floor"]
    remarks.append(
        f"any change at all, one rounding in twelve moved by a step, costs a KL of {max(floor):.2g}"
        f" before the first block and {floor[-1]:.2g} behind the last; that floor is subtracted"
        " from each set's"
    )
    for name, entry in result["additivity"].items():
        said = (
            "sums are good enough to choose by"
            if entry["additive"]
            else (
                "the sets' errors are not independent here: trust the measured points more than the"
                " predicted ones"
            )
        )
        of = "" if name == RECIPE else f" in {name}"
        remarks.append(
            f"the sets' KLs{of} add up to {entry['sum']:.4f}, and all of them together have"
            f" {entry['whole']:.4f} ({entry['factor']:.2f} of it, by which predictions are scaled):"
            f" {said}"
        )
    off = [
        abs(point["kld_predicted"] / point["measured"]["kld"] - 1)
        for line in result["pareto"]
        for point in line["points"]
        if _is_measured(point)
    ]
    if off:
        remarks.append(
            f"at the measured points predictions are off by at most {100 * max(off):.0f} %"
        )
    took = (
        f"; {result['seconds']:.0f} s, peak memory {format_bytes(result['peak_memory_bytes'])}"
        if "seconds" in result
        else ""
    )
    remarks.append(
        f"{result['block_runs']} runs of a block over {result['tokens_scored'] + result['windows']}"
        " tokens, where separate runs of all variants would take"
        f" {result['block_runs_without_sharing']}{took}"
    )
    solution = result.get("solution")
    if solution is not None:
        by_choice = {
            name: solution["choices"].count(name) for name in dict.fromkeys(solution["choices"])
        }
        what = ", ".join(
            f"{count} {'as the recipe says' if name == RECIPE else f'in {_given(name)}'}"
            for name, count in by_choice.items()
        )
        remarks.append(
            f"within the budget, by sums the best: {what}; {format_bytes(solution['bytes'])},"
            f" predicted KL {solution['kld_predicted']:.4f}"
        )
    return remarks
