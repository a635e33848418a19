"""The parts of HTML reports: jinja2 templates, tables and heat maps.

A page is one file that needs no network and runs no script. Everything that comes from a checkpoint
is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from quantkit.checkpoint.units import heading_words, number_parts
from quantkit.evaluation.report import Table

# The rooms that have templates.
_PACKAGES = ("quantkit.evaluation", "quantkit.layer_sensitivity")


def rendered(template: str, **values: Any) -> str:
    """A template's text with these values.

    template: its name, such as "evaluation.html.j2".
    """
    loaders = [jinja2.PackageLoader(package) for package in _PACKAGES]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


@dataclass(frozen=True)
class Cell:
    """A cell or a heading of a table.

    parts: the parts between which a line may end.
    title: what the browser shows for it, empty for nothing.
    """

    parts: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class TableView:
    """A table as the templates show it.

    columns: headings.
    rows: rows of cells.
    right: the columns of numbers, which are aligned to the right.
    """

    columns: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    right: frozenset[int]


def table_view(table: Table, names: Mapping[str, str]) -> TableView:
    """names: path → short name. A cell with such a path shows the name; its title is the path."""
    right = frozenset(table.right)

    def cell(text: str, number: int) -> Cell:
        if text in names:
            return Cell([names[text]], text if names[text] != text else "")
        return Cell(number_parts(text) if number in right else [text])

    return TableView(
        [cell(text, -1) if text in names else Cell(heading_words(text)) for text in table.columns],
        [[cell(text, number) for number, text in enumerate(row)] for row in table.rows],
        right,
    )


def tooltip(path: str, names: Mapping[str, str]) -> str:
    """The whole path, unless that is the name."""
    return path if names.get(path) != path else ""


@dataclass(frozen=True)
class RemarkView:
    """A remark as the templates show it.

    name: the model that it is about; empty for all.
    title: the model's path, if that isn't the name.
    text: what is said.
    """

    name: str
    title: str
    text: str


def remark_view(text: str, names: Mapping[str, str]) -> RemarkView:
    """names: path → short name. A remark on a model begins with its path."""
    for path in sorted(names, key=len, reverse=True):
        if text.startswith(f"{path}: "):
            return RemarkView(names[path], tooltip(path, names), text[len(path) + 2 :])
    return RemarkView("", "", text)


@dataclass(frozen=True)
class Plot:
    """A drawing with its words.

    title: what it shows.
    caption: how to read it, one sentence.
    drawing: SVG.
    legend: (CSS colour, label) of each line.
    """

    title: str
    caption: str
    drawing: str
    legend: Sequence[tuple[str, str]] = ()


# ---- Heat maps: kinds of layers × blocks.


@dataclass(frozen=True)
class HeatScale:
    """The colour scale that all heat maps of a page share. The stronger the colour, the worse.

    best, worst: the values of the weakest and of the strongest colour.
    unit: unit of the values.
    is_logarithmic: whether the colour follows the logarithm.
    """

    best: float
    worst: float
    unit: str
    is_logarithmic: bool = False

    def strength(self, value: float) -> float:
        """The opacity of a value's colour, from 0.06 to 1."""
        best, worst, here = (self._scaled(each) for each in (self.best, self.worst, value))
        share = (here - best) / (worst - best) if worst != best else 1.0
        return round(0.06 + 0.94 * min(1.0, max(0.0, share)), 3)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-30)) if self.is_logarithmic else value

    def ticks(self) -> list[str]:
        """Labels at equal distances, from the best value to the worst."""
        best, worst = self._scaled(self.best), self._scaled(self.worst)
        count = 4 if self.is_logarithmic else 5
        values = [best + (worst - best) * number / (count - 1) for number in range(count)]
        if self.is_logarithmic:
            return [f"{10**value:.2g}" for value in values]
        return [f"{value:.0f}" if abs(worst - best) >= 8 else f"{value:.1f}" for value in values]


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map.

    block: number of the decoder block.
    strength: opacity of its colour, from 0 to 1.
    title: what the browser shows for it.
    """

    block: int
    strength: float
    title: str


@dataclass(frozen=True)
class HeatMap:
    """A heat map.

    name: its name among the page's drawings.
    title: whose layers it shows.
    blocks: number of decoder blocks.
    rows: (kind of layer, cells).
    """

    name: str
    title: str
    blocks: int
    rows: Sequence[tuple[str, Sequence[HeatCell]]]

    @property
    def block_ticks(self) -> Sequence[int]:
        """The blocks that are numbered: ten at most."""
        steps = (step for step in (1, 2, 5, 10, 20, 50, 100) if self.blocks <= 10 * step)
        return range(0, self.blocks, next(steps, 200))


def heat_map(
    name: str,
    title: str,
    values: Mapping[str, Mapping[int, tuple[float, str]]],
    scale: HeatScale,
    blocks: int,
) -> HeatMap:
    """values: kind of layer → block → (value, title)."""
    rows = [
        (
            kind,
            [
                HeatCell(block, scale.strength(value), text)
                for block, (value, text) in sorted(by_block.items())
            ],
        )
        for kind, by_block in values.items()
    ]
    return HeatMap(name, title, blocks, rows)
