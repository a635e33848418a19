"""`eval --html` and `sensitivity --html`: a result as one page that needs no network, drawn as SVG
by matplotlib (extra `report`).

Of `eval` five plots: the difference window by window with its band, the estimate as the text grows,
the distribution of KL beside the noise floor, KL against size, and layers. They are narrow, and
stand one below the other on a telephone. Everything that is drawn stands in the JSON too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from quantkit.errors import EvaluationError
from quantkit.evaluation.metrics import running_estimate
from quantkit.evaluation.report import (
    EVALUATION_COLUMNS,
    LAYER_COLUMNS,
    evaluation_remarks,
    evaluation_rows,
    evaluation_title,
    figure_rows,
    gate_text,
    interval_text,
    layer_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.2, 3.3  # inches: at a telephone's width letters keep three quarters of their size
COLORS = ("#1f6feb", "#d1541b", "#1a7f4b", "#8a3fc0", "#b8860b", "#c2255c", "#0b7285", "#5c5f66")
# Which row of the heat map a Linear belongs to.
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


def evaluation_html(result: dict[str, Any]) -> str:
    """The page."""
    require_matplotlib()
    parts = [
        f"<h1>What quantization cost</h1><p>{escape(evaluation_title(result))};"
        f" {escape(', '.join(result['data']['sources']))}.</p>"
    ]
    parts += [f"<p>{_verdict(quant)}</p>" for quant in result["quants"]]
    if result["gates"]:
        items = "".join(
            f'<li class="{gate["result"]}"><code>{escape(gate["expr"])}</code> on'
            f" {escape(gate['path'])}: <b>{escape(gate_text(gate))}</b></li>"
            for gate in result["gates"]
        )
        parts.append(f"<h2>Gates</h2><ul>{items}</ul>")
    parts.append(table_html(EVALUATION_COLUMNS, evaluation_rows(result)))
    if result["quants"]:
        plots = "".join(
            f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"
            for drawing, caption in _plots(result)
        )
        parts.append(f'<h2>Plots</h2><div class="plots">{plots}</div>')
        parts.append("<h2>All figures</h2>" + table_html(*figure_rows(result), kind="facts"))
    if layer_rows(result):
        parts.append("<h2>The worst layers</h2>" + table_html(LAYER_COLUMNS, layer_rows(result)))
    remarks = [remark for remark in evaluation_remarks(result) if not remark.startswith("gate ")]
    return html_page("quantkit eval", [*parts, remarks_html(remarks)])


def remarks_html(remarks: Iterable[str]) -> str:
    return (
        "<h2>Remarks</h2><ul>"
        + "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
        + "</ul>"
    )


def html_page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width,initial-scale=1"><link rel="icon"'
        f' href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(quant: dict[str, Any]) -> str:
    """One sentence for each candidate."""
    delta = quant["ppl_delta_pct"]
    share = 100 * quant["size_ratio"]
    return (
        f"<b>{escape(quant['path'])}</b> ({escape(quant['scheme'])}) has {share:.0f} % of the"
        f" base's size; its perplexity is <b>{escape(interval_text(delta))}</b>, and it finds the"
        f" same next token likeliest in {100 * quant['top1_agreement']:.1f} % of places."
    )


def table_html(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
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
    """Refuse without it: better before the models have run for an hour."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "--html draws with matplotlib, which is not installed; pip install 'quantkit[report]'"
        ) from None


def _plots(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(SVG, caption) of each plot that this result has."""
    plots = [
        (
            drawn_as_svg("windows", lambda axes: _draw_windows(axes, result)),
            (
                "Difference to the base in each window, nats per token; the band is the mean's 95 %"
                " interval."
            ),
        ),
        (
            drawn_as_svg("kld", lambda axes: _draw_divergence(axes, result)),
            _divergence_caption(result),
        ),
    ]
    if len(result["window_tokens"]) > 2:
        caption = (
            "The estimate as the text grows: what is inside the band can't be told apart with so"
            " much text."
        )
        plots.insert(
            1, (drawn_as_svg("running", lambda axes: _draw_running(axes, result)), caption)
        )
    if len(result["quants"]) > 1:
        plots.append(
            (
                drawn_as_svg("size", lambda axes: _draw_size(axes, result)),
                "Mean KL (95 % interval) against size: lower left is better.",
            )
        )
    for number, quant in enumerate(result["quants"]):
        grid, key = _layer_grid(quant["layers"])
        if grid:
            what = "output" if key == "output_sqnr_db" else "weight"
            caption = (
                f"{_label(quant)}: signal to noise of each layer's {what} in dB, the worst of each"
                " kind; darker is worse."
            )
            plots.append(
                (
                    drawn_as_svg(
                        f"layers{number}", lambda axes, grid=grid: _draw_layers(axes, grid), 2.4
                    ),
                    caption,
                )
            )
    return plots


def _divergence_caption(result: dict[str, Any]) -> str:
    floor = " Grey: rounding noise of bfloat16 alone." if result.get("noise_floor") else ""
    return f"How the KL of single tokens is distributed; dashed: the mean.{floor}"


def drawn_as_svg(name: str, draw: Any, height: float = HEIGHT) -> str:
    """An SVG whose names don't meet those of the page's others, and which is the same each time."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
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


def _label(quant: dict[str, Any]) -> str:
    """A candidate's directory and scheme, short enough for a legend."""
    name = quant["path"].rstrip("/").rpartition("/")[2]
    name = name if len(name) <= 24 else name[:23] + "…"
    return name if quant["scheme"] in name else f"{name} ({quant['scheme']})"


def _colored(result: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((COLORS[number % len(COLORS)], quant) for number, quant in enumerate(result["quants"]))


def _differences(result: dict[str, Any], quant: dict[str, Any]) -> list[float]:
    return [ours - base for ours, base in zip(quant["window_nll"], result["base"]["window_nll"])]


def _draw_windows(axes: Axes, result: dict[str, Any]) -> None:
    counts = result["window_tokens"]
    axes.axhline(0, color="0.5", linewidth=1)
    per_unit = result["tokens_per_unit"]
    for color, quant in _colored(result):
        per_token = [
            difference / count for difference, count in zip(_differences(result, quant), counts)
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
        delta = quant["ppl_delta_pct"]
        if delta["low"] is not None:
            low, high = (math.log1p(delta[bound] / 100) / per_unit for bound in ("low", "high"))
            axes.axhspan(low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("window")
    axes.set_ylabel("ΔNLL per token, nats")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)


def _draw_running(axes: Axes, result: dict[str, Any]) -> None:
    axes.axhline(0, color="0.5", linewidth=1)
    shown: list[float] = []
    for color, quant in _colored(result):
        points = running_estimate(
            _differences(result, quant), result["window_tokens"], result["tokens_per_unit"]
        )
        places = [point["windows"] for point in points]
        axes.plot(
            places,
            [point["value"] for point in points],
            color=color,
            linewidth=1.5,
            label=_label(quant),
        )
        axes.fill_between(
            places,
            [point["low"] for point in points],
            [point["high"] for point in points],
            color=color,
            alpha=0.18,
            linewidth=0,
        )
        settled = points[len(points) // 4 :]
        shown += [point[bound] for point in settled for bound in ("low", "high")]
    # The first intervals, of two and three windows, would flatten all others.
    low, high = min(0.0, *shown), max(0.0, *shown)
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.set_xlabel("windows")
    axes.set_ylabel("ΔPPL, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)


def _draw_divergence(axes: Axes, result: dict[str, Any]) -> None:
    def shares(figures: dict[str, Any]) -> tuple[list[float], list[float]]:
        edges, counts = figures["kld_histogram"]["log10_edges"], figures["kld_histogram"]["counts"]
        total = max(1, sum(counts) + figures["kld_histogram"]["zero"])
        return edges, [100 * count / total for count in counts]

    used: list[float] = []
    noise = result.get("noise_floor")
    drawn = [("0.55", "noise floor", noise)] if noise else []
    drawn += [(color, _label(quant), quant) for color, quant in _colored(result)]
    for color, label, figures in drawn:
        edges, heights = shares(figures)
        used += [edge for edge, height in zip(edges, heights) if height]
        axes.stairs(
            heights,
            [10**edge for edge in edges],
            color=color,
            fill=label == "noise floor",
            alpha=0.5 if label == "noise floor" else 1,
            label=label,
        )
        if figures["kld"]["mean"] > 0:
            axes.axvline(figures["kld"]["mean"], color=color, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    if used:
        axes.set_xlim(10 ** (min(used) - 0.25), 10 ** (max(used) + 0.5))
    axes.set_xlabel("KL of a token, nats")
    axes.set_ylabel("tokens, %")
    axes.legend(frameon=False, fontsize=9)


def _draw_size(axes: Axes, result: dict[str, Any]) -> None:
    for color, quant in _colored(result):
        kld, size = quant["kld"], quant["bytes"] / 1e9
        if kld["mean_low"] is not None:
            axes.vlines(size, kld["mean_low"], kld["mean_high"], color=color, linewidth=1.5)
        axes.plot([size], [kld["mean"]], marker="o", color=color, linestyle="", label=_label(quant))
    if result.get("noise_floor"):
        axes.axhline(
            result["noise_floor"]["kld"]["mean"],
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


def _layer_grid(layers: Sequence[dict[str, Any]]) -> tuple[dict[str, list[float]], str]:
    """Rows of the heat map by kind: for each block the least signal-to-noise ratio of its Linears
    of that kind, NaN where it has none.
    """
    key = (
        "output_sqnr_db"
        if any(layer.get("output_sqnr_db") is not None for layer in layers)
        else "weight_sqnr_db"
    )
    found: dict[tuple[str, int], float] = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer["name"])
        leaf = layer["name"].rpartition(".")[2]
        kind = next((kind for kind, leaves in GROUPS.items() if leaf in leaves), None)
        value = layer.get(key)
        if number is None or kind is None or value is None:
            continue
        place = kind, int(number[1])
        found[place] = min(found.get(place, math.inf), value)
    if not found:
        return {}, key
    blocks = range(max(number for _, number in found) + 1)
    # What is exact has no colour of its own; 60 dB is as good as exact.
    return {
        kind: [min(found.get((kind, block), math.nan), 60.0) for block in blocks]
        for kind in GROUPS
        if any(place[0] == kind for place in found)
    }, key


def _draw_layers(axes: Axes, grid: dict[str, list[float]]) -> None:
    image = axes.imshow(list(grid.values()), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, label="dB", pad=0.02)
