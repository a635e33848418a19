"""The plots of the HTML report of `eval`, drawn by matplotlib (extra `report`) as SVG.

Colours are variables of the page's style, so that a plot is readable on a light and a dark page.
matplotlib doesn't know such variables: it draws with stand-ins, which are replaced in the SVG.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.units import format_bytes
from quantkit.errors import EvaluationError
from quantkit.evaluation.html_page import Plot
from quantkit.evaluation.metrics import KLD, KLD_HISTOGRAM, PPL_DELTA
from quantkit.evaluation.result import Evaluation, QuantResult
from quantkit.evaluation.token_statistics import Divergence, Histogram, running_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDTH, HEIGHT = 5.2, 3.1  # inches: on a telephone, letters shrink to three quarters of their size
# Stand-in → variable of the style.
INK, SOFT = "#0a0b01", "#0a0b02"
SERIES = tuple(f"#0a0c0{number}" for number in range(1, 9))
_VARIABLES = {
    INK: "ink",
    SOFT: "soft",
    **{color: f"s{number}" for number, color in enumerate(SERIES, 1)},
}
# Candidates whose values differ by more than this factor share a plot on a logarithmic axis.
_FAR_APART = 20


def require_matplotlib() -> None:
    """Raise EvaluationError if matplotlib is missing, before the models run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "an HTML report draws with matplotlib, which is not installed",
            hint="pip install 'quantkit[report]'",
        ) from None


def css_color(color: str) -> str:
    """The variable of a stand-in."""
    return f"var(--{_VARIABLES[color]})"


def series_color(number: int) -> str:
    """The stand-in of a candidate's colour."""
    return SERIES[number % len(SERIES)]


def drawn_as_svg(
    name: str, title: str, draw: Callable[[Axes], None], height: float = HEIGHT
) -> str:
    """Draw a plot as SVG. The same data give the same SVG. matplotlib escapes texts.

    name: prefix of its ids, so that they differ from those of other plots on the page.
    title: what it shows, for those who can't see it.
    height: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # names of directories may have dollar signs
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        drawing = io.StringIO()
        figure.savefig(
            drawing,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = drawing.getvalue()
    # Its style would be that of the whole page; the page's own has the same rules for plots.
    unwanted = r"<metadata>.*?</metadata>|<style.*?</style>"
    text = re.sub(unwanted, "", text[text.index("<svg") :], flags=re.DOTALL)
    # matplotlib numbers its groups from 1 in each drawing.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', rf"\1{name}-\2", text)
    for color in _VARIABLES:
        text = text.replace(color, css_color(color))
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{escape(title)}" data-plot="{name}" ', 1
    )


def evaluation_plots(evaluation: Evaluation, labels: Mapping[str, str]) -> list[Plot]:
    """labels: path → name of a candidate in the legends."""
    plots = [_windows_plot(evaluation, labels)]
    if len(evaluation.window_tokens) > 2:
        plots.append(_running_plot(evaluation, labels))
    plots.append(_divergence_plot(evaluation, labels))
    if len(evaluation.quants) > 1:
        plots.append(_size_plot(evaluation, labels))
    return plots


def _legend(evaluation: Evaluation, labels: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(css_color(color), labels[quant.path]) for color, quant in _colored(evaluation)]


def _noise_legend(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [(css_color(SOFT), "noise floor")] if evaluation.noise_floor else []


def _colored(evaluation: Evaluation) -> Iterable[tuple[str, QuantResult]]:
    return ((series_color(number), quant) for number, quant in enumerate(evaluation.quants))


def _differences(evaluation: Evaluation, quant: QuantResult) -> list[float]:
    """Σ nll_quant − Σ nll_base of each window, nats."""
    return [
        ours - base for ours, base in zip(quant.window_sums[PPL_DELTA], evaluation.base.window_nll)
    ]


def _whole_numbers(axes: Axes) -> None:
    """Show only whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def _linear_up_to(largest: Sequence[float]) -> float | None:
    """Where a logarithmic axis begins, if candidates are too far apart for a linear one.

    largest: largest magnitude of each candidate.
    """
    nearest = min((value for value in largest if value > 0), default=0.0)
    return nearest if nearest and max(largest) > _FAR_APART * nearest else None


def _scale_y(axes: Axes, linear_up_to: float | None) -> None:
    from matplotlib.ticker import FuncFormatter

    if linear_up_to is not None:
        axes.set_yscale("symlog", linthresh=linear_up_to)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _axis_sentence(linear_up_to: float | None, unit: str) -> str:
    if linear_up_to is None:
        return ""
    return f" The axis is logarithmic beyond ±{linear_up_to:.2g}{unit}."


# ---- The difference in each window.


def _windows_plot(evaluation: Evaluation, labels: Mapping[str, str]) -> Plot:
    per_token = [
        [
            difference / count
            for difference, count in zip(_differences(evaluation, quant), evaluation.window_tokens)
        ]
        for quant in evaluation.quants
    ]
    linear = _linear_up_to([max(map(abs, values)) for values in per_token])
    title = "Difference to the base in each window"
    return Plot(
        title,
        "Points above 0 are windows in which the candidate predicts worse; the band is the 95 %"
        f" interval of the mean.{_axis_sentence(linear, ' nats')}",
        drawn_as_svg(
            "windows", title, lambda axes: _draw_windows(axes, evaluation, per_token, linear)
        ),
        _legend(evaluation, labels),
    )


def _draw_windows(
    axes: Axes,
    evaluation: Evaluation,
    per_token: Sequence[Sequence[float]],
    linear_up_to: float | None,
) -> None:
    axes.axhline(0, color=SOFT, linewidth=1)
    _scale_y(axes, linear_up_to)
    per_unit = evaluation.tokens_per_unit
    for (color, quant), values in zip(_colored(evaluation), per_token):
        axes.plot(
            range(1, len(values) + 1),
            values,
            marker="o",
            markersize=3,
            linewidth=0.8 if len(values) < 60 else 0,
            color=color,
        )
        delta = quant.metrics[PPL_DELTA]
        if delta.low is not None and delta.high is not None:
            low, high = (math.log1p(bound / 100) / per_unit for bound in (delta.low, delta.high))
            axes.axhspan(low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("window")
    axes.set_ylabel("ΔNLL per token, nats")
    _whole_numbers(axes)


# ---- ΔPPL as the text grows.


def _running_plot(evaluation: Evaluation, labels: Mapping[str, str]) -> Plot:
    linear = _linear_up_to([abs(quant.metrics[PPL_DELTA].value) for quant in evaluation.quants])
    title = "Change of perplexity as the text grows"
    return Plot(
        title,
        "A line that has become flat has seen enough text; the band is its 95 % interval."
        f"{_axis_sentence(linear, ' %')}",
        drawn_as_svg("running", title, lambda axes: _draw_running(axes, evaluation, linear)),
        _legend(evaluation, labels),
    )


def _draw_running(axes: Axes, evaluation: Evaluation, linear_up_to: float | None) -> None:
    axes.axhline(0, color=SOFT, linewidth=1)
    _scale_y(axes, linear_up_to)
    shown: list[float] = []
    for color, quant in _colored(evaluation):
        points = running_estimate(
            _differences(evaluation, quant), evaluation.window_tokens, evaluation.tokens_per_unit
        )
        places = [point.windows for point in points]
        values = [point.interval.value for point in points]
        lows, highs = (
            [getattr(point.interval, bound) for point in points] for bound in ("low", "high")
        )
        axes.plot(places, values, color=color, linewidth=1.5)
        axes.fill_between(places, lows, highs, color=color, alpha=0.18, linewidth=0)
        settled = len(points) // 4
        shown += [*lows[settled:], *highs[settled:]]
    # Scale to the later intervals: those of two and three windows are too wide.
    low, high = min(0.0, *shown), max(0.0, *shown)
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    if linear_up_to is not None:
        axes.set_ylim(min(-linear_up_to / 2, 1.2 * low), 1.5 * high)
    axes.set_xlabel("windows")
    axes.set_ylabel("ΔPPL, %")
    _whole_numbers(axes)


# ---- The distribution of KL.


def _divergence_plot(evaluation: Evaluation, labels: Mapping[str, str]) -> Plot:
    title = "Distribution of KL over tokens"
    floor = "; grey is the noise floor of bfloat16" if evaluation.noise_floor else ""
    return Plot(
        title,
        f"Further left is nearer to the base model; dashed lines are the means{floor}.",
        drawn_as_svg("kld", title, lambda axes: _draw_divergence(axes, evaluation)),
        [*_noise_legend(evaluation), *_legend(evaluation, labels)],
    )


def _draw_divergence(axes: Axes, evaluation: Evaluation) -> None:
    used: list[float] = []
    noise = evaluation.noise_floor
    drawn: list[tuple[str, Divergence, Histogram]] = []
    if noise:
        drawn.append((SOFT, noise.kld, noise.kld_histogram))
    drawn += [
        (color, quant.metrics[KLD], quant.metrics[KLD_HISTOGRAM])
        for color, quant in _colored(evaluation)
    ]
    for color, kld, histogram in drawn:
        edges, total = histogram.log10_edges, max(1, sum(histogram.counts) + histogram.zero)
        heights = [100 * count / total for count in histogram.counts]
        used += [edge for edge, height in zip(edges, heights) if height]
        is_noise = color == SOFT
        axes.stairs(
            heights,
            [10**edge for edge in edges],
            color=color,
            fill=is_noise,
            alpha=0.4 if is_noise else 1,
            linewidth=1.3,
        )
        if kld.mean > 0:
            axes.axvline(kld.mean, color=color, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    _powers_of_ten(axes.xaxis)
    if used:
        axes.set_xlim(10 ** (min(used) - 0.25), 10 ** (max(used) + 0.5))
    axes.set_xlabel("KL of a token, nats")
    axes.set_ylabel("tokens, %")


def _powers_of_ten(axis: Axis) -> None:
    """Label an axis with powers of ten, without mathtext."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def power(value: float, _: object) -> str:
        return f"10{str(round(math.log10(value))).translate(superscripts)}" if value > 0 else "0"

    axis.set_major_formatter(FuncFormatter(power))
    axis.set_minor_formatter(NullFormatter())


# ---- KL against size.


def _size_plot(evaluation: Evaluation, labels: Mapping[str, str]) -> Plot:
    title = "KL against size"
    floor = "; the dotted line is the noise floor" if evaluation.noise_floor else ""
    return Plot(
        title,
        "Lower left is better; bars are 95 % intervals, the dashed line is the size of the base"
        f" model ({format_bytes(evaluation.base.bytes)}){floor}.",
        drawn_as_svg("size", title, lambda axes: _draw_size(axes, evaluation)),
        [*_noise_legend(evaluation), *_legend(evaluation, labels)],
    )


def _draw_size(axes: Axes, evaluation: Evaluation) -> None:
    means = [quant.metrics[KLD].mean for quant in evaluation.quants]
    is_log = _linear_up_to(means) is not None and min(means) > 0
    sizes = [evaluation.base.bytes, *(quant.bytes for quant in evaluation.quants)]
    divisor, unit = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    for color, quant in _colored(evaluation):
        kld, place = quant.metrics[KLD], quant.bytes / divisor
        if kld.mean_low is not None and kld.mean_high is not None:
            axes.plot([place, place], [kld.mean_low, kld.mean_high], color=color, linewidth=1.4)
        axes.plot(place, kld.mean, marker="o", linestyle="", color=color)
    if evaluation.base.bytes:
        axes.axvline(evaluation.base.bytes / divisor, color=SOFT, linestyle="--", linewidth=1)
    if evaluation.noise_floor:
        axes.axhline(evaluation.noise_floor.kld.mean, color=SOFT, linestyle=":", linewidth=1.2)
    axes.set_xlim(0, 1.08 * max(sizes) / divisor)
    if is_log:
        axes.set_yscale("log")
        _powers_of_ten(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(f"size, {unit}")
    axes.set_ylabel("KL(base‖quant), nats")
