"""`quantkit quantize`: calibrate if needed, export, verify, and check the result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.export import print_parameters
from quantkit.cli.options import (
    calibration_options,
    data_option,
    directory_output,
    export_options,
    model_argument,
    optional_recipe,
    recipe_options,
    resume_options,
)
from quantkit.errors import FaultsFound
from quantkit.schemes.serving import HARDWARE


@command("quantize")
@model_argument
@directory_output
@recipe_options
@data_option
@calibration_options
@export_options
@click.option(
    "--hardware",
    type=click.Choice(HARDWARE),
    help="Target hardware: decides the default scheme and the arithmetic of the sanity check.",
)
@click.option(
    "--judge-tokens",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="Number of tokens for the sanity check.",
)
@click.option("--no-judge", is_flag=True, help="Skip the sanity check.")
@resume_options
def quantize_command(
    out: Output, model: str, output: Path, no_judge: bool, judge_tokens: int, **arguments: Any
) -> None:
    """Quantize MODEL in one step: calibrate if needed, export, verify, and run a sanity check.

    Without --scheme and --recipe, quantize takes the scheme that most runtimes can load, and prints
    why. If it calibrates, the calibration is stored in OUT-calibration.

    The sanity check compares the result with MODEL on --data, or on a text that comes with quantkit
    if calibration used --data. If perplexity rises by more than 10 % or the mean KL exceeds 0.15,
    beyond the statistical uncertainty, the exit code is 3. The files are kept.
    """
    from quantkit.api.quantize import QuantizeResult, quantize

    recipe = optional_recipe(arguments)
    failure: FaultsFound | None = None
    try:
        with out.run("quantize") as run:
            result = quantize(
                model,
                output,
                recipe,
                check=not no_judge,
                check_tokens=judge_tokens,
                **arguments,
                **run,
            )
    except FaultsFound as error:
        if not isinstance(error.result, QuantizeResult):
            raise
        result, failure = error.result, error
    print_parameters(out, result.checkpoint)
    if result.checkpoint.is_dry_run:
        return
    out.json(result)
    if failure is not None:
        raise failure
    quoted = shlex.quote(str(output))
    out.note(
        f"Next: quantkit eval {shlex.quote(model)} {quoted} --data FILE\n      vllm serve {quoted}"
    )
