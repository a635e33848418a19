"""The HTML report of `sensitivity`: the result as one self-contained page."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from quantkit.evaluation.html import (
    COLORS,
    drawn_as_svg,
    html_page,
    remarks_html,
    require_matplotlib,
    table_html,
)
from quantkit.layer_sensitivity.options import KEEP
from quantkit.layer_sensitivity.report import (
    GROUP_COLUMNS,
    LINE_COLUMNS,
    group_rows,
    line_rows,
    sensitivity_remarks,
    sensitivity_title,
)
from quantkit.layer_sensitivity.result import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sensitivity_html(result: Sensitivity) -> str:
    """The page of `sensitivity`: the heat map of layer groups, the Pareto lines, and the tables."""
    require_matplotlib()
    drawings = [
        (
            drawn_as_svg("layer groups", lambda axes: _draw_groups(axes, result), 2.8),
            "KL of each layer group quantized alone, above the noise floor. Darker is worse.",
        ),
        (
            drawn_as_svg("lines", lambda axes: _draw_lines(axes, result)),
            (
                "KL by size, when the worst layer groups are changed first. Lines: predicted;"
                " points: measured."
            ),
        ),
    ]
    plots = "".join(
        f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"
        for drawing, caption in drawings
    )
    parts = [
        (
            f"<h1>Loss from quantizing each layer group</h1><p>{escape(sensitivity_title(result))};"
            f" {escape(', '.join(result.data.sources))}.</p>"
        ),
        f'<div class="plots">{plots}</div>',
        "<h2>Sizes and losses</h2>" + table_html(LINE_COLUMNS, line_rows(result), kind="facts"),
        remarks_html(sensitivity_remarks(result)),
        "<h2>All layer groups</h2>"
        + table_html(GROUP_COLUMNS[1:], [row[1:] for row in group_rows(result, None)]),
    ]
    return html_page("quantkit sensitivity", parts)


def _draw_groups(axes: Axes, result: Sensitivity) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    groups = result.scores.groups
    kinds = list(dict.fromkeys(group.kind for group in groups))
    blocks = max(group.block for group in groups) + 1
    grid = [[math.nan] * blocks for _ in kinds]
    most = max(group.own_kld for group in groups) or 1.0
    for group in groups:
        # Losses below a thousandth of the largest are negligible, and zero has no logarithm.
        grid[kinds.index(group.kind)][group.block] = max(group.own_kld, most / 1000)
    image = axes.imshow(
        grid,
        aspect="auto",
        cmap="viridis_r",
        interpolation="nearest",
        norm=LogNorm(most / 1000, most),
    )
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.figure.colorbar(image, ax=axes, label="KL, nats", pad=0.02)


def _draw_lines(axes: Axes, result: Sensitivity) -> None:
    for number, line in enumerate(result.pareto):
        color = COLORS[number % len(COLORS)]
        label = "stored dtype" if line.to == KEEP else line.to
        axes.plot(
            [point.bytes / 1e9 for point in line.points],
            [point.kld_predicted for point in line.points],
            color=color,
            linewidth=1.2,
            label=label,
        )
        measured = [
            (point.bytes / 1e9, point.measured.kld)
            for point in line.points
            if point.measured is not None
        ]
        axes.plot(
            [size for size, _ in measured],
            [kld for _, kld in measured],
            marker="o",
            linestyle="",
            color=color,
        )
    solution = result.solution
    if solution is not None:
        measured_kld = None if solution.measured is None else solution.measured.kld
        axes.plot(
            [solution.bytes / 1e9],
            [solution.kld_predicted if measured_kld is None else measured_kld],
            marker="*",
            markersize=11,
            linestyle="",
            color="#1c1e21",
            label="budget",
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size, GB")
    axes.set_ylabel("KL(base‖quant), nats")
    axes.legend(frameon=False, fontsize=9)
