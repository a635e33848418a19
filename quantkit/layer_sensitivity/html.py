"""The HTML report of `sensitivity`: one page without network, and a table for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.checkpoint.short_names import short_names
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.evaluation.html_page import (
    HeatMap,
    HeatScale,
    Plot,
    RemarkView,
    heat_map,
    rendered,
    table_view,
)
from quantkit.evaluation.plots import INK, css_color, drawn_as_svg, require_matplotlib, series_color
from quantkit.evaluation.report import Table
from quantkit.evaluation.verdict import Verdict
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.options import KEEP
from quantkit.layer_sensitivity.report import (
    GROUP_COLUMNS,
    LINE_COLUMNS,
    group_rows,
    line_rows,
    sensitivity_remarks,
    sensitivity_title,
)
from quantkit.layer_sensitivity.result import Sensitivity, Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEGLIGIBLE = 1000  # losses below this fraction of the largest get the weakest colour
_FRAGMENT_GROUPS = 5
_WORDS = (
    ("layer group", "Linears that a runtime fuses, such as q, k and v: they get one scheme"),
    ("KL", "KL(base‖quant), how far the predicted distribution moves; 0 nats is no change"),
    ("noise floor", "KL that any tiny change causes; it is subtracted"),
    ("[95 %]", "95 % interval over windows of text"),
    ("ΔPPL", "change of perplexity compared with the unquantized model; lower is better"),
    ("SQNR", "signal-to-quantization-noise ratio in dB; 10 dB more is a tenth of the error"),
)


def sensitivity_html(result: Sensitivity) -> str:
    """The page of `sensitivity`: verdict, Pareto lines, the heat map of layer groups, the tables.

    Raises EvaluationError without matplotlib.
    """
    require_matplotlib()
    layers, scale = _group_map(result)
    return rendered(
        "sensitivity.html.j2",
        title="quantkit sensitivity",
        version=result.quantkit_version,
        verdict=_verdict(result),
        description=sensitivity_title(result),
        sources=", ".join(result.data.sources),
        lines=table_view(Table(LINE_COLUMNS, line_rows(result), range(2, len(LINE_COLUMNS))), {}),
        map=layers,
        scale=scale,
        map_caption="KL of each layer group quantized alone, above the noise floor, in nats. A"
        " stronger colour is a larger loss; the scale is logarithmic.",
        plot=_lines_plot(result),
        remarks=[RemarkView("", "", text) for text in sensitivity_remarks(result)],
        groups=table_view(_group_table(result, None), {}),
        words=_WORDS,
    )


def _group_table(result: Sensitivity, shown: int | None) -> Table:
    """The table of layer groups without ranks."""
    rows = [row[1:] for row in group_rows(result, shown)]
    return Table(GROUP_COLUMNS[1:], rows, range(1, len(GROUP_COLUMNS) - 1))


# ---- The verdict.


def _verdict(result: Sensitivity) -> Verdict:
    losses = [max(0.0, group.own_kld) for group in result.ranking]
    name = short_names([result.model.path])[result.model.path]
    sizes, groups = result.scores.bytes, len(losses)
    return Verdict(
        f"{result.ranking[0].name} costs most: {100 * losses[0] / (sum(losses) or 1):.0f} % of the"
        f" loss of all {counted(groups, 'layer group')}.",
        (
            f"Half of the loss comes from {_for_half(losses)} of {groups} layer groups.",
            f"With all of them quantized, {name} has a KL of"
            f" {result.scores.whole[RECIPE].kld:.4f} nats and"
            f" {format_bytes(sizes.all_quantized)}, instead of {format_bytes(sizes.all_kept)}.",
            *_solution_sentences(result.solution, groups),
        ),
        None,
    )


def _for_half(losses: list[float]) -> int:
    """How many of the largest losses add up to half of all. losses: the largest first."""
    reached = 0.0
    for count, loss in enumerate(losses, 1):
        reached += loss
        if 2 * reached >= sum(losses):
            return count
    return len(losses)


def _solution_sentences(solution: Solution | None, groups: int) -> list[str]:
    if solution is None:
        return []
    how = "predicted" if solution.measured is None else "measured"
    return [
        f"Within the budget, {solution.moved} of {groups} layer groups differ from the recipe:"
        f" {format_bytes(solution.bytes)}, {how} KL {_kld_of(solution):.4f} nats."
    ]


def _kld_of(solution: Solution) -> float:
    """Its measured KL, or the predicted one, nats."""
    return solution.kld_predicted if solution.measured is None else solution.measured.kld


# ---- The heat map.


def _group_map(result: Sensitivity) -> tuple[HeatMap, HeatScale]:
    groups = result.scores.groups
    values: dict[str, dict[int, tuple[float, str]]] = {}
    for group in groups:
        title = f"{group.name}: {group.own_kld:.3g} nats"
        values.setdefault(group.kind, {})[group.block] = group.own_kld, title
    most = max(group.own_kld for group in groups)
    most = most if most > 0 else 1.0
    scale = HeatScale(most / _NEGLIGIBLE, most, "nats", is_logarithmic=True)
    blocks = 1 + max(group.block for group in groups)
    return heat_map("layer groups", "Layer groups", values, scale, blocks), scale


# ---- The Pareto lines.


def _lines_plot(result: Sensitivity) -> Plot:
    title = "KL by size, when the worst layer groups are changed first"
    legend = [
        (css_color(series_color(number)), f"to {_given(line.to)}")
        for number, line in enumerate(result.pareto)
    ]
    if result.solution is not None:
        legend.append((css_color(INK), "★ budget"))
    return Plot(
        title,
        "Lower left is better: lines are predicted, points are measured.",
        drawn_as_svg("lines", title, lambda axes: _draw_lines(axes, result)),
        legend,
    )


def _given(choice: str) -> str:
    return "their stored dtype" if choice == KEEP else choice


def _draw_lines(axes: Axes, result: Sensitivity) -> None:
    divisor, unit = (1e9, "GB") if result.scores.bytes.all_kept >= 1e9 else (1e6, "MB")
    for number, line in enumerate(result.pareto):
        color = series_color(number)
        axes.plot(
            [point.bytes / divisor for point in line.points],
            [point.kld_predicted for point in line.points],
            color=color,
            linewidth=1.2,
        )
        measured = [
            (point.bytes / divisor, point.measured.kld)
            for point in line.points
            if point.measured is not None
        ]
        axes.plot(
            [size for size, _ in measured],
            [kld for _, kld in measured],
            marker="o",
            markersize=4,
            linestyle="",
            color=color,
        )
    solution = result.solution
    if solution is not None:
        size = solution.bytes / divisor
        axes.plot([size], [_kld_of(solution)], marker="*", markersize=11, linestyle="", color=INK)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"size, {unit}")
    axes.set_ylabel("KL(base‖quant), nats")


# ---- For notebooks.


def sensitivity_fragment(result: Sensitivity) -> str:
    """The verdict and the worst layer groups as a piece of HTML, for notebooks. It needs no
    matplotlib.
    """
    found, table = _verdict(result), _group_table(result, _FRAGMENT_GROUPS)
    wanted = [
        number
        for number, column in enumerate(table.columns)
        if column in ("layer group", "KL above noise floor", "share", "size quantized", "size kept")
    ]
    small = Table(
        [table.columns[number] for number in wanted],
        [[row[number] for number in wanted] for row in table.rows],
        range(1, len(wanted)),
    )
    return rendered(
        "fragment.html.j2",
        headline=found.headline,
        sentences=found.sentences,
        table=table_view(small, {}),
    )
