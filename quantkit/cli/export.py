"""`quantkit export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import (
    directory_output,
    export_options,
    model_argument,
    recipe_argument,
    recipe_options,
    resume_options,
)

if TYPE_CHECKING:
    from quantkit.exporter.result import ExportResult


@command("export")
@model_argument
@directory_output
@recipe_options
@export_options
@click.option(
    "--stream-download",
    is_flag=True,
    help="For a hub id: delete each downloaded shard as soon as it is quantized.",
)
@resume_options
def export_command(out: Output, model: str, output: Path, **arguments: Any) -> None:
    """Write MODEL as a quantized checkpoint, reading a few rows of a tensor at a time.

    If MODEL is a hub id, each shard is downloaded when it is needed.
    """
    from quantkit.api.export import export
    from quantkit.checkpoint.hub import is_hub_id

    if arguments["stream_download"] and (arguments["calibration"] or not is_hub_id(model)):
        raise click.UsageError(
            "--stream-download is for a hub id"
            + (
                ", without --calibration: a calibration is made from a local copy"
                if arguments["calibration"]
                else ""
            )
        )
    recipe = recipe_argument(arguments)
    with out.run("export", uses_transformers=False) as run:
        result = export(model, output, recipe, **arguments, **run)
    print_parameters(out, result)
    if result.is_dry_run:
        return
    out.json(result)
    out.note(f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE")


def print_parameters(out: Output, result: ExportResult) -> None:
    """What happens to each parameter: with --dry-run a table or JSON, with -v as notes."""
    from quantkit.checkpoint.units import format_bytes
    from quantkit.cli.tables import print_table

    if not result.is_dry_run:
        if out.verbose:
            for row in result.parameters:
                out.note(f"  {row.status:9} {row.name}: {row.reason}")
        return
    if out.as_json:
        out.json(result)
        return
    rows = [
        (
            row.name,
            row.status,
            row.reason,
            row.scheme.name if row.scheme else "",
            format_bytes(row.bytes_before),
            format_bytes(row.bytes_after),
        )
        for row in result.parameters
    ]
    before, after = format_bytes(result.bytes_before), format_bytes(result.bytes_after)
    rows.append(("total", "", "", "", before, after))
    print_table(
        ("parameter", "status", "format or reason", "scheme", "before", "after"),
        rows,
        right=(4, 5),
        important=(0, 1, 4, 5),
        verbose=out.verbose,
    )
