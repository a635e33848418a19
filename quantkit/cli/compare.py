"""`quantkit compare`."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import UserPath
from quantkit.errors import EvaluationError


@command("compare")
@click.argument("first", metavar="A.json", type=UserPath(dir_okay=False))
@click.argument("second", metavar="B.json", type=UserPath(dir_okay=False))
def compare_command(out: Output, first: Path, second: Path) -> None:
    """Compare two results of `eval -o`, token by token.

    Both must have the same base model and text. If these differ, the exit code is 5.
    """
    from quantkit.cli.tables import print_json, print_report
    from quantkit.evaluation.compare import compare
    from quantkit.evaluation.report import (
        comparison_names,
        comparison_remarks,
        comparison_table,
        comparison_title,
    )

    for path in (first, second):
        if not path.exists():
            raise EvaluationError(
                f"there is no file {path}",
                f"write one with: quantkit eval BASE QUANT --data FILE -o {path.name}",
            )
    comparison = compare(first, second)
    if out.as_json:
        print_json(comparison.to_json())
    else:
        print_report(
            comparison_table(comparison),
            comparison_names(comparison),
            comparison_title(comparison),
            out.verbose,
            whole_with="--json",
        )
    for remark in comparison_remarks(comparison):
        out.note(remark)
