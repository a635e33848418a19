"""Tables that fit a terminal: which columns are shown, and how wide each is.

Where a table is wider than the window, in this order:

1. headings are wrapped, texts are wrapped between words, and names lose what is in their middle
2. intervals go to a line of their own, if an important column wouldn't fit otherwise
3. columns are left out, the least important first

A number is never cut or wrapped. Two names in a column that differ stay different.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len

from quantkit.checkpoint.units import heading_words, number_parts

GAP = 2  # spaces between columns
_NARROWEST_TEXT = 16
# Components of a tensor's name that say little without the one before.
_SUFFIXES = {"weight", "bias", "weight_scale", "weight_packed", "input_scale"}


@dataclass(frozen=True)
class Part:
    """A part of a table that is as wide as the window.

    columns: numbers of its columns in the table.
    heading: lines of its heading.
    rows: lines of each row.
    width: of its widest line.
    """

    columns: Sequence[int]
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    width: int


def fitted_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int],
    important: Sequence[int],
    width: int,
) -> list[Part]:
    """The table in as many parts as it takes to show all its columns.

    Each part begins with the most important column.

    right: columns of numbers, which are aligned to the right.
    important: the columns that matter most, the most important first; others follow in order.
    width: of the window.
    """
    important = [*important] or [0]
    order = [*important, *(each for each in range(len(columns)) if each not in important)]
    made = {
        number: _column(columns[number], [row[number] for row in rows], number in right)
        for number in order
    }
    parts: list[Part] = []
    remaining = order[1:]
    while remaining or not parts:
        wanted = important[1:] if not parts else remaining[:1]
        numbers, widths = _chosen(order[0], remaining, wanted, made, width)
        parts.append(_part(numbers, widths, made))
        remaining = [each for each in remaining if each not in numbers]
    return parts


@dataclass(frozen=True)
class _Column:
    """A column with its widths.

    heading, cells: its texts.
    is_right: whether it is aligned to the right.
    comfortable: width at which names stay different and no number is broken.
    least: width at which intervals are on lines of their own.
    natural: width of its widest cell.
    wrap: the lines of a cell at a width.
    used: how much of a width the cells need.
    """

    heading: str
    cells: Sequence[str]
    is_right: bool
    comfortable: int
    least: int
    natural: int
    wrap: Callable[[str, int], list[str]]
    used: Callable[[int], int] = lambda width: width


def _column(heading: str, cells: Sequence[str], is_right: bool) -> _Column:
    words = max((cell_len(piece) for piece in _heading_pieces(heading)), default=0)
    natural = max(map(cell_len, cells), default=0)
    if is_right:
        parts = [cell_len(part) for cell in cells for part in number_parts(cell)]
        least = max(words, max(parts, default=0))
        return _Column(heading, cells, True, max(words, natural), least, natural, _wrap_numbers)
    if any(" " in cell for cell in cells):
        least = max(words, min(natural, _NARROWEST_TEXT))
        return _Column(heading, cells, False, least, least, natural, wrap_words)
    names = _Names.of(cells)
    least = max(words, names.least)
    return _Column(
        heading,
        cells,
        False,
        least,
        least,
        natural,
        lambda cell, width: [names.at(width)[cell]],
        lambda width: max(words, names.used(width)),
    )


def _chosen(
    key: int, remaining: Sequence[int], wanted: Sequence[int], made: dict[int, _Column], width: int
) -> tuple[list[int], dict[int, int]]:
    """The columns of the next part, in the table's order, and their widths.

    wanted: the columns for which intervals may go to lines of their own.
    """
    widths = _that_fit([key, *remaining], {n: made[n].comfortable for n in made}, width)
    if not set(wanted) <= set(widths):
        widths = _that_fit([key, *remaining], {n: made[n].least for n in made}, width)
    if len(widths) == 1 and remaining:  # too narrow for any: shown all the same
        widths[remaining[0]] = made[remaining[0]].least
    _grow(widths, {n: made[n].comfortable for n in widths}, width, at_once=True)
    _grow(widths, {n: made[n].natural for n in widths}, width)
    widths |= {number: made[number].used(size) for number, size in widths.items()}
    _grow(widths, {n: made[n].natural for n in widths if made[n].is_right}, width, at_once=True)
    _grow(widths, {n: cell_len(made[n].heading) for n in widths}, width, at_once=True)
    return sorted(widths), widths


def _that_fit(order: Sequence[int], least: dict[int, int], width: int) -> dict[int, int]:
    """Column → width. The first column is always among them."""
    found = {order[0]: least[order[0]]}
    for number in order[1:]:
        if sum(found.values()) + least[number] + GAP * len(found) <= width:
            found[number] = least[number]
    return found


def _grow(
    widths: dict[int, int], wanted: dict[int, int], width: int, at_once: bool = False
) -> None:
    """Give the columns the window's free width, as far as they want it.

    at_once: give a column all that it wants, or nothing.
    """
    free = width - sum(widths.values()) - GAP * (len(widths) - 1)
    while free > 0:
        growing = [number for number in wanted if widths[number] < wanted[number]]
        if at_once:
            growing = [each for each in growing if wanted[each] - widths[each] <= free][:1]
        if not growing:
            return
        for number in growing[:free]:
            step = wanted[number] - widths[number] if at_once else 1
            widths[number] += step
            free -= step


def _part(numbers: Sequence[int], widths: dict[int, int], made: dict[int, _Column]) -> Part:
    columns = [made[number] for number in numbers]
    sizes = [widths[number] for number in numbers]
    aligned = [column.is_right for column in columns]
    headings = [_wrap_heading(column.heading, size) for column, size in zip(columns, sizes)]
    blank = max(map(len, headings))
    headings = [[""] * (blank - len(lines)) + lines for lines in headings]
    rows = [
        _lines(
            [column.wrap(cell, size) for column, cell, size in zip(columns, row, sizes)],
            sizes,
            aligned,
        )
        for row in zip(*(column.cells for column in columns))
    ]
    return Part(
        numbers, _lines(headings, sizes, aligned), rows, sum(sizes) + GAP * (len(sizes) - 1)
    )


def _lines(
    cells: Sequence[Sequence[str]], widths: Sequence[int], aligned: Sequence[bool]
) -> list[str]:
    """The lines of a row from the lines of its cells."""
    return [
        (" " * GAP)
        .join(
            " " * (width - cell_len(text)) + text
            if is_right
            else text + " " * (width - cell_len(text))
            for text, width, is_right in zip(line, widths, aligned)
        )
        .rstrip()
        for line in zip_longest(*cells, fillvalue="")
    ]


# ---- Wrapping.


def _wrap_heading(heading: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in _filled(heading_words(heading), width, " "):
        if cell_len(word) <= width:
            lines.append(word)
        else:
            lines += _filled(_heading_pieces(word), width, "")
    return lines or [""]


def _heading_pieces(heading: str) -> list[str]:
    """Words, which may also break after a slash or a hyphen: bits/weight, but not tokens/s."""
    words = heading_words(heading)
    return [piece for word in words for piece in re.split(r"(?<=[/-])(?=\w{3})", word)]


def _wrap_numbers(cell: str, width: int) -> list[str]:
    return [cell] if cell_len(cell) <= width else _filled(number_parts(cell), width, " ")


def wrap_words(text: str, width: int) -> list[str]:
    """The lines of a text that is wrapped between words. Words longer than a line are folded."""
    return _filled([piece for word in text.split() for piece in _folded(word, width)], width, " ")


def _folded(word: str, width: int) -> list[str]:
    """The pieces of a word that is longer than a line, after a hyphen or a slash if it has one."""
    pieces: list[str] = []
    for part in re.split(r"(?<=[/_-])", word) if cell_len(word) > width else [word]:
        if pieces and cell_len(pieces[-1] + part) <= width:
            pieces[-1] += part
            continue
        pieces.append("")
        for character in part:
            if cell_len(pieces[-1] + character) > max(1, width):
                pieces.append("")
            pieces[-1] += character
    return pieces


def _filled(pieces: Iterable[str], width: int, between: str) -> list[str]:
    """Lines with as many pieces as fit on each."""
    lines: list[str] = []
    for piece in pieces:
        if lines and cell_len(lines[-1] + between + piece) <= width:
            lines[-1] += between + piece
        else:
            lines.append(piece)
    return lines


# ---- Names.


class _Names:
    """The names in a column, shortened alike, so that the column looks even.

    levels: the names as they are, shorter ones, and so on: name → what is shown.
    """

    def __init__(self, levels: Sequence[dict[str, str]]) -> None:
        # Only levels at which different names stay different.
        self._levels = [each for each in levels if len(set(each.values())) == len(each)]
        self._widths = [max(map(cell_len, each.values()), default=0) for each in self._levels]

    @classmethod
    def of(cls, cells: Iterable[str]) -> _Names:
        shorter = {name: [name, *shorter_names(name)] for name in cells}
        count = max(map(len, shorter.values()), default=1)
        return cls(
            [
                {name: names[min(level, len(names) - 1)] for name, names in shorter.items()}
                for level in range(count)
            ]
        )

    @property
    def least(self) -> int:
        return min(self._widths)

    def used(self, width: int) -> int:
        """The width of the names that fit a width."""
        return max((each for each in self._widths if each <= width), default=width)

    def at(self, width: int) -> dict[str, str]:
        """Name → what is shown: the longest that fits."""
        fitting = (
            names for names, needed in zip(self._levels, self._widths) if needed <= self.used(width)
        )
        return next(fitting, self._levels[-1])


def shorter_names(name: str) -> list[str]:
    """Shorter and shorter forms of a name: the ends of a path, model.layers.0.…down_proj.

    Numbers and the last component are never left out.
    """
    ends = [part for part in name.split("/") if part]
    found = ["/".join(ends[start:]) for start in range(1, len(ends))]
    last = found[-1] if found else name
    separator = "." if last.count(".") > 1 else "-"
    parts = last.split(separator)
    kept = len(parts) - (2 if separator == "-" or parts[-1] in _SUFFIXES else 1)
    numbers = [place for place in range(kept) if parts[place].isdigit()]
    after = numbers[-1] + 1 if numbers else 1
    removed: set[int] = set()
    for place in (*range(after, kept), *range(min(after, kept))):
        if not parts[place].isdigit():
            removed.add(place)
            found.append(_with_ellipses(parts, removed, separator))
    return found


def _with_ellipses(parts: Sequence[str], removed: set[int], separator: str) -> str:
    text = ""
    for place, part in enumerate(parts):
        if place not in removed:
            text += part + separator
        elif not text.endswith("…"):
            text += "…"
    return text.removesuffix(separator)
