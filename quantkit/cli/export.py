"""`quantkit export`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import (
    directory_output,
    export_options,
    model_argument,
    recipe_of_options,
    recipe_options,
    resume_options,
)


def make_export_options(
    model: Path,
    output: Path,
    recipe: Any,
    calibration: Path | None,
    runtime: str | None,
    file_format: str,
    max_shard_size: int,
    resume: bool,
    overwrite: bool,
    allow_unreached: bool,
) -> Any:
    from quantkit.exporter.plan import ExportOptions

    return ExportOptions(
        model,
        output,
        recipe,
        calibration,
        runtime,
        file_format,
        max_shard_size,
        resume,
        overwrite,
        allow_unreached,
    )


@command("export")
@model_argument
@directory_output
@recipe_options
@export_options
@click.option(
    "--stream-download",
    is_flag=True,
    help="For a hub id: remove each downloaded shard as soon as it is quantized.",
)
@resume_options
def export_command(
    out: Output,
    model: str,
    output: Path,
    scheme: str | None,
    recipe: Path | None,
    calibration: Path | None,
    ignore: tuple[str, ...],
    observer: str | None,
    kv_cache: str | None,
    runtime: str | None,
    file_format: str,
    max_shard_size: int,
    allow_unreached: bool,
    dry_run: bool,
    stream_download: bool,
    resume: bool,
    overwrite: bool,
) -> None:
    """Write MODEL as a quantized checkpoint, reading a few rows of a tensor at a time.

    The shards of a hub id are downloaded when they are needed.
    """
    from quantkit.exporter.plan import plan_export

    chosen = recipe_of_options(scheme, recipe, ignore, kv_cache, observer)
    path, checkpoint = _open_for_export(model, output, calibration, stream_download)
    options = make_export_options(
        path,
        output,
        chosen,
        calibration,
        runtime,
        file_format,
        max_shard_size,
        resume,
        overwrite,
        allow_unreached,
    )
    plan = plan_export(options, checkpoint=checkpoint)
    if dry_run:
        print_plan(out, plan)
        return
    summary, seconds = run_export(out, plan)
    if out.as_json:
        from quantkit.cli.tables import print_json

        print_json(summary.to_json() | {"seconds": seconds})
    out.note(f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE")


def _open_for_export(
    model: str, output: Path, calibration: Path | None, stream_download: bool
) -> tuple[Path, Any]:
    """Where MODEL is, and the checkpoint if it is opened already: a hub id from its headers, unless
    a calibration has to be compared with its files.
    """
    from quantkit.checkpoint.hub import is_hub_id, open_hub_model, resolve_model

    if stream_download and (calibration is not None or not is_hub_id(model)):
        raise click.UsageError(
            "--stream-download is for a hub id"
            + (", without --calibration: that was made from a local copy" if calibration else "")
        )
    if calibration is not None or not is_hub_id(model):
        return resolve_model(model), None
    partial = output.resolve().with_name(output.name + ".partial")
    return Path(model), open_hub_model(model, partial / ".download" if stream_download else None)


def run_export(out: Output, plan: Any) -> tuple[Any, float]:
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
        out.note(
            f"{summary.path} was finished already, and its files are as they were exported; nothing"
            " was written"
        )
        return summary, seconds
    ratio = summary.bytes_after / summary.bytes_before
    schemes = {linear.scheme.name for linear in plan.linears.values()}
    out.note(
        f"{summary.path}: {counted(summary.quantized, 'Linear')} in"
        f" {schemes.pop() if len(schemes) == 1 else 'mixed schemes'}, {summary.skipped} left;"
        f" {format_bytes(summary.bytes_before)} → {format_bytes(summary.bytes_after)}"
        f" ({100 * ratio:.0f} %), {seconds:.1f} s"
    )
    return summary, seconds


def print_plan(out: Output, plan: Any) -> None:
    from quantkit.cli.tables import PLAN_COLUMNS, plan_rows, print_json, print_table

    if out.as_json:
        print_json(plan.to_json())
    else:
        print_table(PLAN_COLUMNS, plan_rows(plan), right=(4, 5))
    for warning in plan.warnings:
        out.warn(warning)
