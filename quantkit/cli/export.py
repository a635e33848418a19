"""`quantkit export`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import (
    RecipeOptions,
    directory_output,
    export_options,
    model_argument,
    options_from,
    recipe_options,
    resume_options,
)

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.exporter.plan import ExportPlan
    from quantkit.exporter.write import ExportSummary


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
def export_command(
    out: Output, model: str, output: Path, stream_download: bool, **arguments: Any
) -> None:
    """Write MODEL as a quantized checkpoint, reading a few rows of a tensor at a time.

    If MODEL is a hub id, each shard is downloaded when it is needed.
    """
    from quantkit.exporter.plan import ExportOptions, plan_export

    recipe = options_from(RecipeOptions, arguments).load()
    path, checkpoint = _open_for_export(model, output, arguments["calibration"], stream_download)
    options = options_from(ExportOptions, arguments, model=path, output=output, recipe=recipe)
    plan = plan_export(options, checkpoint=checkpoint)
    if arguments["dry_run"]:
        print_plan(out, plan)
        return
    summary, seconds = run_export(out, plan)
    if out.as_json:
        from quantkit.cli.tables import print_json

        print_json(summary.to_json() | {"seconds": seconds})
    out.note(f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE")


def _open_for_export(
    model: str, output: Path, calibration: Path | None, stream_download: bool
) -> tuple[Path, Checkpoint | None]:
    """MODEL's directory, or its hub id with the checkpoint opened from its headers alone.

    A calibration is compared with the model's files, so it needs the whole model on disk.
    """
    from quantkit.checkpoint.hub import is_hub_id, open_hub_model, resolve_model

    if stream_download and (calibration is not None or not is_hub_id(model)):
        raise click.UsageError(
            "--stream-download is for a hub id"
            + (
                ", without --calibration: a calibration is made from a local copy"
                if calibration
                else ""
            )
        )
    if calibration is not None or not is_hub_id(model):
        return resolve_model(model), None
    partial = output.resolve().with_name(output.name + ".partial")
    return Path(model), open_hub_model(model, partial / ".download" if stream_download else None)


def run_export(out: Output, plan: ExportPlan) -> tuple[ExportSummary, float]:
    """Export, and print what was done. Returns the summary and the seconds that it took."""
    from quantkit.checkpoint.units import counted, format_bytes
    from quantkit.cli.tables import Progress
    from quantkit.exporter.write import export

    started = time.monotonic()
    with Progress("export", out.quiet) as progress:
        summary = export(plan, progress.update)
    seconds = time.monotonic() - started
    for warning in summary.warnings:
        out.warn(warning)
    if out.verbose:
        for row in plan.parameters:
            out.note(f"  {row.status:9} {row.name}: {row.reason}")
    if summary.was_finished:
        out.note(f"{summary.path} was already complete, with unchanged files; nothing was written")
        return summary, seconds
    ratio = summary.bytes_after / summary.bytes_before
    schemes = {linear.scheme.name for linear in plan.linears.values()}
    out.note(
        f"{summary.path}: {counted(summary.quantized, 'Linear')} quantized to"
        f" {schemes.pop() if len(schemes) == 1 else 'mixed schemes'}, {summary.skipped} skipped;"
        f" {format_bytes(summary.bytes_before)} → {format_bytes(summary.bytes_after)}"
        f" ({100 * ratio:.0f} %), {seconds:.1f} s"
    )
    return summary, seconds


def print_plan(out: Output, plan: ExportPlan) -> None:
    """The plan, as --dry-run prints it: a row for each parameter and their total."""
    from quantkit.checkpoint.units import format_bytes
    from quantkit.cli.tables import print_json, print_table

    if out.as_json:
        print_json(plan.to_json())
    else:
        rows = [
            (
                row.name,
                row.status,
                row.reason,
                row.scheme.name if row.scheme else "",
                format_bytes(row.bytes_before),
                format_bytes(row.bytes_after),
            )
            for row in plan.parameters
        ]
        before, after = format_bytes(plan.bytes_before), format_bytes(plan.bytes_after)
        rows.append(("total", "", "", "", before, after))
        print_table(
            ("parameter", "status", "format or reason", "scheme", "before", "after"),
            rows,
            right=(4, 5),
            important=(0, 1, 4, 5),
            verbose=out.verbose,
        )
    for warning in plan.warnings:
        out.warn(warning)
