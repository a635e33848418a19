"""The tables and remarks of `sensitivity`."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.checkpoint.units import counted, format_bytes
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.options import KEEP
from quantkit.layer_sensitivity.result import (
    Additivity,
    ParetoPoint,
    Sensitivity,
    Solution,
    VariantMetrics,
)

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


def sensitivity_title(result: Sensitivity) -> str:
    scheme = result.base_recipe.scheme.to_description()
    named = scheme if isinstance(scheme, str) else "the recipe's scheme"
    return (
        f"{result.model.path}, {counted(len(result.order), 'layer group')} in {named}:"
        f" {result.tokens_scored} tokens in {counted(result.windows, 'window')} of"
        f" {result.seq_len}"
    )


def group_rows(result: Sensitivity, shown: int | None = SHOWN) -> list[tuple[str, ...]]:
    """The rows of GROUP_COLUMNS, the group with the largest KL first."""
    total = result.scores.additivity[RECIPE].sum
    rows: list[tuple[str, ...]] = []
    for rank, group in enumerate(result.ranking[:shown], 1):
        quantized = group.choices[RECIPE]
        rows.append(
            (
                str(rank),
                group.name,
                f"{group.own_kld:.6f}",
                f"{100 * group.own_kld / total:.1f} %" if total else "",
                _kld(quantized.metrics),
                f"{group.restored.gain:+.6f}" if group.restored is not None else "",
                _least(layer.weight_sqnr_db for layer in group.layers),
                _least(layer.output_sqnr_db for layer in group.layers),
                format_bytes(quantized.bytes),
                format_bytes(group.choices[KEEP].bytes),
            )
        )
    return rows


def _kld(metrics: VariantMetrics | None, digits: int = 6) -> str:
    if metrics is None:
        return ""
    bounds = (
        ""
        if metrics.kld_low is None
        else f" [{max(0.0, metrics.kld_low):.{digits}f}, {metrics.kld_high:.{digits}f}]"
    )
    return f"{metrics.kld:.{digits}f}{bounds}"


def _least(sqnrs_db: Iterable[float | None]) -> str:
    known = [value for value in sqnrs_db if value is not None]
    return "" if not known else f"{min(known):.1f}" if min(known) < 200 else "exact"


def line_rows(result: Sensitivity) -> list[tuple[str, ...]]:
    """The rows of LINE_COLUMNS: the measured points of the Pareto lines, then the solution."""
    rows = [
        _line_row(str(point.k), _given(line.to), point)
        for line in result.pareto
        for point in line.points
        if point.measured is not None
    ]
    solution = result.solution
    if solution is not None:
        given = (_given(name) for name in sorted(set(solution.choices) - {RECIPE}))
        rows.append(_line_row(f"budget: {solution.moved}", " and ".join(given), solution))
    return rows


def _given(choice: str) -> str:
    return "their stored dtype" if choice == KEEP else choice


def _line_row(what: str, given: str, point: ParetoPoint | Solution) -> tuple[str, ...]:
    measured = point.measured
    ppl_delta = "" if measured is None else measured.ppl_delta_pct.text()
    size, predicted = format_bytes(point.bytes), f"{point.kld_predicted:.5f}"
    return what, given, size, predicted, _kld(measured, 5), ppl_delta


def sensitivity_remarks(result: Sensitivity) -> list[str]:
    """Sentences under the tables: the noise floor, how well sums predict, and the solution."""
    floor = result.scores.noise_floor.values
    return [
        *result.remarks,
        (
            "noise floor: perturbing 1 in 12 activations by one rounding step gives a KL of"
            f" {floor[0]:.2g} before the first block and {floor[-1]:.2g} after the last; it is"
            " subtracted from the KL of each layer group"
        ),
        *(_additivity_remark(name, found) for name, found in result.scores.additivity.items()),
        *_error_remarks(result),
        _work_remark(result),
        *_solution_remarks(result.solution),
    ]


def _additivity_remark(name: str, found: Additivity) -> str:
    advice = (
        "these predictions are reliable enough for a budget"
        if found.additive
        else "prefer measured points to predictions, because the groups' errors are not independent"
        " in this model"
    )
    scheme = "" if name == RECIPE else f" in {name}"
    return (
        f"the KLs of single layer groups{scheme} add up to {found.sum:.4f}; all groups together"
        f" have KL {found.whole:.4f}. Predictions are sums times {found.factor:.2f}; {advice}"
    )


def _error_remarks(result: Sensitivity) -> list[str]:
    off = [
        abs(point.kld_predicted / point.measured.kld - 1)
        for line in result.pareto
        for point in line.points
        if point.measured is not None and point.measured.kld > 0
    ]
    if not off:
        return []
    return [f"predictions differ from measured points by at most {100 * max(off):.0f} %"]


def _work_remark(result: Sensitivity) -> str:
    took = ""
    if result.seconds is not None and result.peak_memory_bytes is not None:
        memory = format_bytes(result.peak_memory_bytes)
        took = f"; {result.seconds:.0f} s, peak memory {memory}"
    return (
        f"blocks ran {result.block_runs} times over all windows, instead of"
        f" {result.block_runs_without_sharing} times with separate runs of all variants{took}"
    )


def _solution_remarks(solution: Solution | None) -> list[str]:
    if solution is None:
        return []
    choices = solution.choices
    counts = {name: choices.count(name) for name in dict.fromkeys(choices)}
    what = ", ".join(
        f"{count} as in the recipe" if name == RECIPE else f"{count} in {_given(name)}"
        for name, count in counts.items()
    )
    return [
        f"best choice within the budget, by predictions: of {len(choices)} layer groups,"
        f" {what}; {format_bytes(solution.bytes)}, predicted KL {solution.kld_predicted:.4f}"
    ]
