"""`quantkit calibrate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import (
    UserPath,
    calibration_options,
    data_option,
    directory_output,
    model_argument,
    options_from,
    resume_options,
)

if TYPE_CHECKING:
    from quantkit.calibration.options import CalibrationOptions
    from quantkit.calibration.summary import CalibrationSummary


@command("calibrate")
@model_argument
@directory_output
@data_option
@click.option(
    "--recipe",
    type=UserPath(),
    help=(
        "Run this recipe's algorithms; the calibration is then valid for this recipe only."
        "  [default: statistics for every scheme]"
    ),
)
@calibration_options
@resume_options
def calibrate_command(
    out: Output, model: str, output: Path, recipe: Path | None, **arguments: Any
) -> None:
    """Run text through MODEL, block by block, and record statistics of the input of each Linear.

    Without --data, the text is a short one that comes with quantkit. Several processes can share
    the work: torchrun --nproc-per-node N -m quantkit calibrate ...
    """
    from quantkit.calibration.options import CalibrationOptions
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.schemes.recipe import Recipe

    loaded = Recipe.load(recipe) if recipe else None
    options = options_from(
        CalibrationOptions, arguments, model=resolve_model(model), output=output, recipe=loaded
    )
    summary = run_calibration(out, options)
    if out.as_json:
        from quantkit.cli.tables import print_json

        print_json(summary.to_json())
    which = f"--recipe {shlex.quote(str(recipe))}" if recipe else "--scheme fp8-static"
    ignore = "".join(
        f" --ignore {shlex.quote(pattern)}"
        for patterns in summary.ignore.values()
        for pattern in patterns
    )
    out.note(
        f"Next: quantkit export {shlex.quote(model)} -o OUT {which} --calibration"
        f" {shlex.quote(str(output))}{ignore}"
    )


def run_calibration(out: Output, options: CalibrationOptions) -> CalibrationSummary:
    """Calibrate, and print what was measured and what the user should know of it."""
    from quantkit.calibration.calibrate import calibrate
    from quantkit.checkpoint.units import counted, format_bytes
    from quantkit.cli.interrupts import stop_on_signals
    from quantkit.cli.processes import is_first_process, process_group
    from quantkit.cli.tables import Progress

    out.quiet = out.quiet or not is_first_process()
    out.quiet_libraries()
    with (
        process_group(options.device),
        Progress("calibrate", out.quiet) as progress,
        stop_on_signals() as should_stop,
    ):
        summary = calibrate(options, progress, should_stop)
    if summary.was_finished:
        out.note(
            f"{options.output} was already complete, with unchanged files; nothing was measured"
        )
        return summary
    if is_first_process():
        _warn_of_calibration(out, summary)
        for remark in summary.chosen:
            out.note(remark)
    out.note(
        f"{options.output}: statistics of {counted(summary.inputs, 'input')} of"
        f" {counted(summary.linears, 'Linear')}, from {counted(summary.windows, 'window')} of"
        f" {summary.seq_len} tokens; {summary.seconds:.1f} s, {summary.tokens_per_second:.0f}"
        f" tokens/s, peak memory {format_bytes(summary.peak_memory_bytes)}"
    )
    return summary


def _warn_of_calibration(out: Output, summary: CalibrationSummary) -> None:
    from quantkit.checkpoint.units import counted

    has_run_out = summary.windows < summary.requested
    if has_run_out:
        out.warn(
            f"the text holds {counted(summary.windows, 'window')} of {summary.seq_len} tokens,"
            f" fewer than the {summary.requested} requested; give more text with --data"
        )
    if summary.unsettled:
        count, name = len(summary.unsettled), summary.unsettled[0]
        out.warn(
            f"the largest values of {count} of {counted(summary.inputs, 'input')} still grew in the"
            f" last quarter of the data ({name}{' and others' if count > 1 else ''}). Static"
            " scales need more text:"
            f" {'give it with --data' if has_run_out else 'raise --num-samples'}."
            f" `quantkit inspect {shlex.quote(str(summary.path))}` lists these inputs"
        )
    if summary.starved:
        out.warn(
            f"{counted(len(summary.starved), 'expert')} saw too few tokens"
            f" ({summary.starved[0]}{' and others' if len(summary.starved) > 1 else ''}); their"
            " scales are estimated from their weights and the other experts. Give more text, or"
            " --all-experts"
        )
    if summary.unread:
        out.warn(
            f"no token reached {_named(summary.unread, 'Linear')}, which transformers doesn't run"
            " as a Linear, so they have no static scale. A static scheme needs"
            f" {_ignoring(summary, 'unread')}"
        )
    if summary.refused:
        out.warn(
            f"export can't quantize {_named(summary.refused, 'parameter')}; it refuses the model"
            f" without {_ignoring(summary, 'refused')}"
        )


def _named(names: Sequence[str], what: str) -> str:
    return (
        f"the {what} {names[0]}"
        if len(names) == 1
        else f"{len(names)} {what}s ({names[0]} and others)"
    )


def _ignoring(summary: CalibrationSummary, which: str) -> str:
    return " ".join(f"--ignore {shlex.quote(pattern)}" for pattern in summary.ignore[which])
