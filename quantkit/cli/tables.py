"""What commands show: tables and JSON on stdout, and progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from quantkit.checkpoint.files import finite


def print_json(content: Any) -> None:
    """JSON on stdout. NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    right: Sequence[int] = (),
) -> None:
    """A table on stdout. Where stdout isn't a terminal, it is as wide as its contents.

    right: columns of numbers, which are aligned to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 4000, highlight=False)
    if title:
        # a table's own title would be wrapped to its columns
        console.print(_escape(title), style="bold", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_escape, row))
    console.print(table)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


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
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(command, total=None)

    def __call__(self, what: str, done: float, total: float) -> None:
        if self._bar is not None:
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
