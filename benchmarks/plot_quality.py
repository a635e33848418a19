"""Plot the loss of each recipe: benchmarks/results/quality.json → docs/img/quality.svg.

    python benchmarks/plot_quality.py

One row per recipe: the change of perplexity with its 95 % interval, sorted. Values beyond the axis
are written as numbers. The colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PLOT = ROOT / "docs" / "img" / "quality.svg"

AXIS_END = 5.0  # per cent of perplexity; larger values are written as numbers
# Pixels.
WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 880, 290, 220, 56, 22, 58
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .title { font-size: 15px; font-weight: 600; }
  .note { font-size: 12px; fill: #59636e; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .zero { stroke: #59636e; stroke-width: 1; }
  .int8 { stroke: #0b62c4; fill: #0b62c4; }
  .fp8 { stroke: #b34700; fill: #b34700; }
  .interval { stroke-width: 2; }
  .best { stroke-width: 0; }
  .plain { stroke-width: 2; fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note { fill: #b0b9c3; }
    .grid { stroke: #3d444d; }
    .zero { stroke: #b0b9c3; }
    .int8 { stroke: #6cb6ff; fill: #6cb6ff; }
    .fp8 { stroke: #ffa657; fill: #ffa657; }
    .plain { fill: #0d1117; }
  }
"""


def quality_svg(results: Mapping[str, Any]) -> str:
    """The plot. results: content of quality.json."""
    recipes = sorted(results["recipes"], key=lambda entry: entry["ppl_delta_pct"]["value"])
    bottom = TOP + ROW * len(recipes)
    parts = [*_frame(bottom, results), *_axis(bottom)]
    for number, entry in enumerate(recipes):
        parts += _row(TOP + ROW * number + ROW / 2, entry)
    height = bottom + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img" aria-labelledby="title">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _x(percent: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * percent / AXIS_END


def _frame(bottom: float, results: Mapping[str, Any]) -> list[str]:
    """The title, the legend and the source."""
    title = "Increase of perplexity by recipe, with 95 % intervals"
    source = (
        f"SmolLM2-135M-Instruct, {results['tokens_scored']} tokens of"
        f" {', '.join(results['data']['sources'])}; lower is better"
    )
    return [
        f'<text id="title" class="title" x="12" y="24">{escape(title)}</text>',
        f'<text class="note" x="12" y="{bottom + 46}">{escape(source)}</text>',
        *_legend("int8", "INT8", WIDTH - 350),
        *_legend("fp8", "FP8", WIDTH - 285),
        f'<circle class="fp8 plain" cx="{WIDTH - 218}" cy="20" r="4"/>',
        f'<text x="{WIDTH - 208}" y="24">scheme</text>',
        f'<circle class="fp8 best" cx="{WIDTH - 140}" cy="20" r="5"/>',
        f'<text x="{WIDTH - 130}" y="24">with algorithms</text>',
    ]


def _legend(kind: str, text: str, x: float) -> list[str]:
    return [
        f'<line class="{kind} interval" x1="{x}" y1="20" x2="{x + 20}" y2="20"/>',
        f'<text x="{x + 26}" y="24">{text}</text>',
    ]


def _axis(bottom: float) -> list[str]:
    parts = []
    for percent in range(int(AXIS_END) + 1):
        x, kind = _x(percent), "grid" if percent else "zero"
        parts.append(
            f'<line class="{kind}" x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{bottom}"/>'
        )
        parts.append(
            f'<text class="note" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{f'+{percent} %' if percent else '0'}</text>"
        )
    return parts


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["recipe"]).replace(", served by ampere or a CPU", ", inputs in bfloat16")


def _row(y: float, entry: Mapping[str, Any]) -> list[str]:
    delta = entry["ppl_delta_pct"]
    kind = "int8" if entry["scheme"].startswith("int8") or "int8" in entry["recipe"] else "fp8"
    name = f'<text x="{LEFT - 16}" y="{y + 4.5:.1f}" text-anchor="end">{escape(_name(entry))}'
    interval = f"{delta['value']:+.2f} % [{delta['low']:+.2f}, {delta['high']:+.2f}]"
    number = (
        f'<text class="note" x="{WIDTH - 12}" y="{y + 4.5:.1f}" text-anchor="end">'
        f"{interval.replace('-', '−')}</text>"
    )
    if delta["value"] > AXIS_END:
        x = _x(AXIS_END)
        arrow = f"{x - 9:.1f},{y - 5:.1f} {x:.1f},{y:.1f} {x - 9:.1f},{y + 5:.1f}"
        return [f"{name}</text>", f'<polygon class="{kind}" points="{arrow}"/>', number]
    low, high = _x(delta["low"]), _x(delta["high"])
    has_algorithms = "best" in entry["recipe"] or "rotated" in entry["recipe"]
    look, radius = ("best", 5) if has_algorithms else ("plain", 4)
    return [
        f"{name}</text>",
        f'<line class="{kind} interval" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>',
        f'<circle class="{kind} {look}" cx="{_x(delta["value"]):.1f}" cy="{y}" r="{radius}"/>',
        number,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("-o", "--output", type=Path, default=PLOT)
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    svg = quality_svg(json.loads(options.results.read_text(encoding="utf-8")))
    options.output.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
