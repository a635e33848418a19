"""The HTML report of `eval`, and the parts that the one of `sensitivity` shares: one page that
needs no network. Plots are SVG, drawn by matplotlib (extra `report`).

The page of `eval` has five plots:

1. the difference to the base model in each window, with the interval of the mean
2. ΔPPL as the text grows
3. the distribution of KL, with the noise floor
4. KL against size
5. the error of each layer

Everything in the plots is in the JSON too.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from quantkit.errors import EvaluationError
from quantkit.evaluation.metrics import KLD, KLD_HISTOGRAM, PPL_DELTA, TOP1_AGREEMENT
from quantkit.evaluation.report import (
    evaluation_remarks,
    evaluation_title,
    gate_text,
    layer_table,
    metric_table,
    model_table,
)
from quantkit.evaluation.result import Evaluation, LayerError, QuantResult
from quantkit.evaluation.token_statistics import Divergence, Histogram, running_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.2, 3.3  # inches: on a telephone, letters shrink to three quarters of their size
COLORS = ("#1f6feb", "#d1541b", "#1a7f4b", "#8a3fc0", "#b8860b", "#c2255c", "#0b7285", "#5c5f66")
# Rows of the heat map: name → names of Linears.
GROUPS = {
    "qkv": (
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "Wqkv",
        "in_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    ),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "w3"),
    "down": ("down_proj", "fc2", "dense_4h_to_h", "w2"),
}
_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;margin:0 auto;
max-width:75rem;padding:1rem;color:#1c1e21;background:#fff}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}p{margin:.4rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid #d8dbe0;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;min-width:7rem;max-width:18rem;white-space:normal;overflow-wrap:anywhere;position:sticky;left:0;background:#fff}
table.facts th,table.facts td{white-space:normal;min-width:8.5rem}
thead th{border-bottom:2px solid #8a8f98}
.plots{display:grid;gap:1.5rem 2rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr))}
figure{margin:0;min-width:0}
figure svg{width:100%;height:auto;display:block}figcaption{font-size:.9rem;color:#4a4e55}
ul{padding-left:1.2rem}li{overflow-wrap:anywhere;margin:.2rem 0}
.pass{color:#1a7f4b}.fail{color:#b42318}.inconclusive{color:#8a6100}
"""


def evaluation_html(evaluation: Evaluation) -> str:
    """The page of an evaluation. Raises EvaluationError without matplotlib."""
    require_matplotlib()
    parts = [
        f"<h1>What quantization cost</h1><p>{escape(evaluation_title(evaluation))};"
        f" {escape(', '.join(evaluation.data.sources))}.</p>"
    ]
    parts += [f"<p>{_summary(quant)}</p>" for quant in evaluation.quants]
    if evaluation.gates:
        items = "".join(
            f'<li class="{gate.result}"><code>{escape(gate.expr)}</code> on'
            f" {escape(gate.path)}: <b>{escape(gate_text(gate))}</b></li>"
            for gate in evaluation.gates
        )
        parts.append(f"<h2>Gates</h2><ul>{items}</ul>")
    models, layers = model_table(evaluation), layer_table(evaluation)
    parts.append(table_html(models.columns, models.rows))
    if evaluation.quants:
        plots = "".join(
            f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"
            for drawing, caption in _plots(evaluation)
        )
        parts.append(f'<h2>Plots</h2><div class="plots">{plots}</div>')
        all_metrics = metric_table(evaluation)
        table = table_html(all_metrics.columns, all_metrics.rows, kind="facts")
        parts.append(f"<h2>All metrics</h2>{table}")
    if layers.rows:
        parts.append(f"<h2>The worst layers</h2>{table_html(layers.columns, layers.rows)}")
    remarks = [
        remark for remark in evaluation_remarks(evaluation) if not remark.startswith("gate ")
    ]
    return html_page("quantkit eval", [*parts, remarks_html(remarks)])


def remarks_html(remarks: Iterable[str]) -> str:
    """The list of remarks, with its heading."""
    return (
        "<h2>Remarks</h2><ul>"
        + "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
        + "</ul>"
    )


def html_page(title: str, parts: Iterable[str]) -> str:
    """A whole page. parts: its HTML, piece by piece."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width,initial-scale=1"><link rel="icon"'
        f' href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _summary(quant: QuantResult) -> str:
    """One sentence about a quantized model, as HTML."""
    agreement = 100 * quant.metrics[TOP1_AGREEMENT]
    return (
        f"<b>{escape(quant.path)}</b> ({escape(quant.scheme)}) has {100 * quant.size_ratio:.0f} %"
        f" of the base's size; its perplexity is <b>{escape(quant.metrics[PPL_DELTA].text())}</b>,"
        f" and its most likely token is the base's at {agreement:.1f} % of positions."
    )


def table_html(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table. kind: its CSS class."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    named = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{named}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# ---- Plots.


def require_matplotlib() -> None:
    """Raise EvaluationError if matplotlib is missing, before the models run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "an HTML report draws with matplotlib, which is not installed",
            hint="pip install 'quantkit[report]'",
        ) from None


def _plots(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(SVG, caption) of each plot."""
    plots = [
        (
            drawn_as_svg("windows", lambda axes: _draw_windows(axes, evaluation)),
            (
                "Difference to the base in each window, nats per token. The band is the 95 %"
                " interval of the mean."
            ),
        ),
        (
            drawn_as_svg("kld", lambda axes: _draw_divergence(axes, evaluation)),
            _divergence_caption(evaluation),
        ),
    ]
    if len(evaluation.window_tokens) > 2:
        caption = "The estimate of ΔPPL as the text grows, with its 95 % interval."
        plots.insert(
            1, (drawn_as_svg("running", lambda axes: _draw_running(axes, evaluation)), caption)
        )
    if len(evaluation.quants) > 1:
        plots.append(
            (
                drawn_as_svg("size", lambda axes: _draw_size(axes, evaluation)),
                "Mean KL (95 % interval) against size: lower left is better.",
            )
        )
    for number, quant in enumerate(evaluation.quants):
        grid, key = _layer_grid(quant.layers)
        if grid:
            what = "output" if key == "output_sqnr_db" else "weight"
            caption = (
                f"{_label(quant)}: signal-to-noise ratio of each layer's {what} in dB, the lowest"
                " of each kind. Darker is worse."
            )
            plots.append(
                (
                    drawn_as_svg(
                        f"layers{number}", functools.partial(_draw_layers, grid=grid), 2.4
                    ),
                    caption,
                )
            )
    return plots


def _divergence_caption(evaluation: Evaluation) -> str:
    floor = " Grey: the noise floor of bfloat16." if evaluation.noise_floor else ""
    return f"Distribution of KL over tokens. Dashed: the mean.{floor}"


def drawn_as_svg(name: str, draw: Callable[[Axes], None], height: float = HEIGHT) -> str:
    """Draw a plot as SVG. The same data give the same SVG.

    name: prefix of its ids, so that they differ from those of other plots on the page.
    height: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
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
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # matplotlib numbers its groups from 1 in each drawing.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', rf"\1{name}-\2", text)
    return text.replace("font: ", "font-family: system-ui, sans-serif; font: ").replace(
        "<svg ", f'<svg role="img" aria-label="{name}" ', 1
    )


def _label(quant: QuantResult) -> str:
    """A quantized model's directory and scheme, short enough for a legend."""
    name = quant.path.rstrip("/").rpartition("/")[2]
    name = name if len(name) <= 24 else name[:23] + "…"
    return name if quant.scheme in name else f"{name} ({quant.scheme})"


def _colored(evaluation: Evaluation) -> Iterable[tuple[str, QuantResult]]:
    return ((COLORS[number % len(COLORS)], quant) for number, quant in enumerate(evaluation.quants))


def _differences(evaluation: Evaluation, quant: QuantResult) -> list[float]:
    """Σ nll_quant − Σ nll_base of each window, nats."""
    return [
        ours - base for ours, base in zip(quant.window_sums[PPL_DELTA], evaluation.base.window_nll)
    ]


def _whole_numbers(axes: Axes) -> None:
    """Show only whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    locator = axes.xaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)
    locator.set_params(integer=True)


def _draw_windows(axes: Axes, evaluation: Evaluation) -> None:
    counts = evaluation.window_tokens
    axes.axhline(0, color="0.5", linewidth=1)
    per_unit = evaluation.tokens_per_unit
    for color, quant in _colored(evaluation):
        per_token = [
            difference / count for difference, count in zip(_differences(evaluation, quant), counts)
        ]
        places = range(1, len(per_token) + 1)
        axes.plot(
            places,
            per_token,
            marker="o",
            markersize=3,
            linewidth=0.8 if len(per_token) < 60 else 0,
            color=color,
            label=_label(quant),
        )
        delta = quant.metrics[PPL_DELTA]
        if delta.low is not None and delta.high is not None:
            low, high = (math.log1p(bound / 100) / per_unit for bound in (delta.low, delta.high))
            axes.axhspan(low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("window")
    axes.set_ylabel("ΔNLL per token, nats")
    _whole_numbers(axes)
    axes.legend(frameon=False, fontsize=9)


def _draw_running(axes: Axes, evaluation: Evaluation) -> None:
    axes.axhline(0, color="0.5", linewidth=1)
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
        axes.plot(places, values, color=color, linewidth=1.5, label=_label(quant))
        axes.fill_between(places, lows, highs, color=color, alpha=0.18, linewidth=0)
        settled = len(points) // 4
        shown += [*lows[settled:], *highs[settled:]]
    # Scale to the later intervals: those of two and three windows are too wide.
    low, high = min(0.0, *shown), max(0.0, *shown)
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.set_xlabel("windows")
    axes.set_ylabel("ΔPPL, %")
    _whole_numbers(axes)
    axes.legend(frameon=False, fontsize=9)


def _draw_divergence(axes: Axes, evaluation: Evaluation) -> None:
    used: list[float] = []
    noise = evaluation.noise_floor
    drawn: list[tuple[str, str, Divergence, Histogram]] = []
    if noise:
        drawn.append(("0.55", "noise floor", noise.kld, noise.kld_histogram))
    drawn += [
        (color, _label(quant), quant.metrics[KLD], quant.metrics[KLD_HISTOGRAM])
        for color, quant in _colored(evaluation)
    ]
    for color, label, kld, histogram in drawn:
        edges, total = histogram.log10_edges, max(1, sum(histogram.counts) + histogram.zero)
        heights = [100 * count / total for count in histogram.counts]
        used += [edge for edge, height in zip(edges, heights) if height]
        axes.stairs(
            heights,
            [10**edge for edge in edges],
            color=color,
            fill=label == "noise floor",
            alpha=0.5 if label == "noise floor" else 1,
            label=label,
        )
        if kld.mean > 0:
            axes.axvline(kld.mean, color=color, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    if used:
        axes.set_xlim(10 ** (min(used) - 0.25), 10 ** (max(used) + 0.5))
    axes.set_xlabel("KL of a token, nats")
    axes.set_ylabel("tokens, %")
    axes.legend(frameon=False, fontsize=9)


def _draw_size(axes: Axes, evaluation: Evaluation) -> None:
    for color, quant in _colored(evaluation):
        kld, size = quant.metrics[KLD], quant.bytes / 1e9
        if kld.mean_low is not None and kld.mean_high is not None:
            axes.vlines(size, kld.mean_low, kld.mean_high, color=color, linewidth=1.5)
        axes.plot([size], [kld.mean], marker="o", color=color, linestyle="", label=_label(quant))
    if evaluation.noise_floor:
        axes.axhline(
            evaluation.noise_floor.kld.mean,
            color="0.5",
            linestyle=":",
            linewidth=1,
            label="noise floor",
        )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    axes.set_xlabel("size, GB")
    axes.set_ylabel("KL(base‖quant), nats")
    axes.legend(frameon=False, fontsize=9)


def _layer_grid(layers: Sequence[LayerError]) -> tuple[dict[str, list[float]], str]:
    """The heat map: kind of Linear → for each block, the lowest signal-to-noise ratio of its
    Linears of that kind in dB, NaN if it has none. Also returns the key of the plotted ratio.
    """
    key = (
        "output_sqnr_db"
        if any(layer.output_sqnr_db is not None for layer in layers)
        else "weight_sqnr_db"
    )
    found: dict[tuple[str, int], float] = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer.name)
        leaf = layer.name.rpartition(".")[2]
        kind = next((kind for kind, leaves in GROUPS.items() if leaf in leaves), None)
        value = getattr(layer, key)
        if number is None or kind is None or value is None or math.isnan(value):
            continue
        place = kind, int(number[1])
        found[place] = min(found.get(place, math.inf), value)
    if not found:
        return {}, key
    blocks = range(max(number for _, number in found) + 1)
    # The colour scale ends at 60 dB, which is as good as exact.
    return {
        kind: [min(found.get((kind, block), math.nan), 60.0) for block in blocks]
        for kind in GROUPS
        if any(place[0] == kind for place in found)
    }, key


def _draw_layers(axes: Axes, grid: dict[str, list[float]]) -> None:
    image = axes.imshow(list(grid.values()), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_xlabel("layer")
    _whole_numbers(axes)
    axes.figure.colorbar(image, ax=axes, label="dB", pad=0.02)
