"""`quantkit calibrate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.options import (
    UserPath,
    calibration_options,
    data_option,
    directory_output,
    model_argument,
    resume_options,
)


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
    from quantkit.api.calibrate import calibrate

    with out.run("calibrate", arguments["device"]) as run:
        result = calibrate(model, output, recipe=recipe, **arguments, **run)
    out.json(result)
    if result.unsettled:
        out.note(f"`quantkit inspect {shlex.quote(str(output))}` lists these inputs")
    which = f"--recipe {shlex.quote(str(recipe))}" if recipe else "--scheme fp8-static"
    ignore = "".join(
        f" --ignore {shlex.quote(pattern)}"
        for patterns in result.ignore.values()
        for pattern in patterns
    )
    out.note(
        f"Next: quantkit export {shlex.quote(model)} -o OUT {which} --calibration"
        f" {shlex.quote(str(output))}{ignore}"
    )
