"""What commands show: tables and JSON on stdout, and progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.files import finite
from quantkit.cli.option_names import one_line

if TYPE_CHECKING:
    from quantkit.evaluation.report import Table as ReportTable


def print_json(content: Any) -> None:
    """JSON on stdout. NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    right: Sequence[int] = (),
    *,
    important: Sequence[int] = (),
    whole_with: str = "--json",
    verbose: bool = False,
) -> None:
    """A table on stdout. On a terminal it fits the window. Elsewhere it is as wide as its contents.

    right: columns of numbers, which are aligned to the right.
    important: the columns that matter most, the most important first. Others may be left out on a
        terminal that is too narrow; a line says so.
    whole_with: the option that gives all columns.
    verbose: print what doesn't fit as further tables.
    """
    if sys.stdout.isatty():
        _print_fitted(columns, rows, title, right, important, whole_with, verbose)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=4000, highlight=False)
    if title:
        # a table's own title would be wrapped to its columns
        console.print(_escape(title), style="bold", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_escape, row))
    console.print(table)


def print_report(
    table: ReportTable,
    names: Mapping[str, str],
    title: str | None,
    verbose: bool,
    whole_with: str = "-o FILE",
) -> None:
    """A table of `eval` or `compare`.

    names: path → short name, for a terminal.
    whole_with: the option that gives all columns.
    """
    if sys.stdout.isatty():
        table = table.renamed(names)
    print_table(
        table.columns,
        table.rows,
        title,
        table.right,
        important=table.important,
        whole_with=whole_with,
        verbose=verbose,
    )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_fitted(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None,
    right: Sequence[int],
    important: Sequence[int],
    whole_with: str,
    verbose: bool,
) -> None:
    from rich.console import Console
    from rich.text import Text

    from quantkit.cli.fitted_table import fitted_table, wrap_words

    console = Console(highlight=False)

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    cells = [[one_line(cell) for cell in row] for row in rows]
    parts = fitted_table([*map(one_line, columns)], cells, right, important, console.width)
    for text in wrap_words(one_line(title or ""), console.width) if title else []:
        line(text, "bold")
    for number, part in enumerate(parts if verbose else parts[:1]):
        for text in ([""] if title or number else []) + [*part.heading]:
            line(text, "bold")
        line("─" * min(part.width, console.width))
        for row in part.rows:
            for text in row:
                line(text)
    missing = [name for number, name in enumerate(columns) if number not in parts[0].columns]
    if missing and not verbose:
        names = ("; " if any("," in name for name in missing) else ", ").join(missing)
        remark = f"not shown: {names} (more columns with -v, or {whole_with})"
        for text in wrap_words(one_line(remark), console.width):
            line(text, "dim")
    line("")


class Progress:
    """A progress bar on stderr where that is a terminal, else nothing. It is the `progress` that
    the library calls (`checkpoint/run_control.py`).
    """

    def __init__(self, command: str, quiet: bool = False) -> None:
        self._command = command
        self._bar: Any = None
        if quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(command, total=None)
        self._done, self._total = 0.0, 0.0

    def __call__(self, what: str, done: float, total: float) -> None:
        if self._bar is None:
            return
        if done < self._done or total != self._total:
            # Another stage: a task that was once complete would keep its clock.
            self._bar.reset(self._task, total=total)
        self._done, self._total = done, total
        self._bar.update(
            self._task, completed=done, total=total, description=f"{self._command}: {what}"
        )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
