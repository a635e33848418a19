"""`quantkit quantize`: calibrate if needed, export, verify, and check the result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.calibrate import run_calibration
from quantkit.cli.console import Output, command
from quantkit.cli.export import print_plan, run_export
from quantkit.cli.options import (
    RecipeOptions,
    calibration_options,
    data_option,
    directory_output,
    export_options,
    model_argument,
    options_from,
    recipe_options,
    resume_options,
)
from quantkit.cli.verify import raise_faults, run_verify
from quantkit.errors import DataError, FaultsFound, OutputError, QuantkitError
from quantkit.schemes.serving import HARDWARE

if TYPE_CHECKING:
    from quantkit.calibration.options import CalibrationOptions
    from quantkit.exporter.plan import ExportOptions, ExportPlan
    from quantkit.exporter.verification import Verification
    from quantkit.exporter.write import ExportSummary


@dataclass(frozen=True)
class CheckOptions:
    """What the sanity check is asked.

    data: its text; the bundled text where there is none.
    tokens: how many it evaluates.
    hardware: whose arithmetic it emulates, or None.
    """

    data: tuple[str, ...]
    tokens: int
    hardware: str | None
    device: str
    trust_remote_code: bool


@dataclass(frozen=True)
class QuantizeOptions:
    """What `quantize` is asked.

    model: as the user wrote it, for the next command.
    export: the export; without the calibration that this run makes.
    calibration: the calibration that this run makes, or None where none is needed.
    check: the sanity check, or None (--no-judge).
    data: the user's texts, for the calibration or else for the check.
    """

    model: str
    export: ExportOptions
    calibration: CalibrationOptions | None
    check: CheckOptions | None
    data: tuple[str, ...]


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
def quantize_command(out: Output, dry_run: bool, **arguments: Any) -> None:
    """Quantize MODEL in one step: calibrate if needed, export, verify, and run a sanity check.

    Without --scheme and --recipe, quantize takes the scheme that most runtimes can load, and prints
    why. If it calibrates, the calibration is stored in OUT-calibration.

    The sanity check compares the result with MODEL on --data, or on a text that comes with quantkit
    if calibration used --data. If perplexity rises by more than 10 % or the mean KL exceeds 0.15,
    beyond the statistical uncertainty, the exit code is 3. The files are kept.
    """
    from quantkit.exporter.plan import plan_export

    options = _read_options(out, arguments)
    plan = plan_export(options.export, calibration_follows=options.calibration is not None)
    if dry_run:
        print_plan(out, plan)
        return
    _check_data(out, options)
    if options.calibration is not None:
        _calibrate(out, options.export, options.calibration)
        plan = plan_export(replace(options.export, calibration=options.calibration.output))
    summary, seconds = run_export(out, plan)
    found = run_verify(out, summary.path, options.export.model, options.export.runtime)
    checked = None
    if options.check is not None and not found.faults:
        checked = _check_sanity(out, options.export, options.check)
    if out.as_json:
        _print_json(plan, summary, seconds, found, checked)
    raise_faults(found)
    _raise_ruined(options, checked)
    _print_next(out, options)


def _read_options(out: Output, arguments: Mapping[str, Any]) -> QuantizeOptions:
    """The options, with the default scheme where the user names none."""
    from quantkit.calibration.options import CalibrationOptions
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.exporter.plan import ExportOptions
    from quantkit.exporter.runtimes import as_computed

    path, output, data = resolve_model(arguments["model"]), arguments["output"], arguments["data"]
    asked = options_from(RecipeOptions, arguments)
    if asked.scheme is None and asked.recipe is None:
        asked = replace(asked, scheme=_default_scheme(out, path, arguments))
    recipe = asked.load()
    for scheme in recipe.schemes:
        as_computed(scheme, arguments["hardware"])
    calibration = None
    if recipe.needs_calibration and arguments["calibration"] is None:
        calibration = options_from(
            CalibrationOptions,
            arguments,
            model=path,
            output=output.with_name(output.name + "-calibration"),
            # Statistics serve every recipe; weights that algorithms quantize serve theirs alone.
            recipe=recipe if recipe.quantizes_weights else None,
        )
    check = None
    if not arguments["no_judge"]:
        check = options_from(
            CheckOptions,
            arguments,
            data=() if calibration is not None else data,
            tokens=arguments["judge_tokens"],
        )
    export = options_from(ExportOptions, arguments, model=path, recipe=recipe)
    return QuantizeOptions(arguments["model"], export, calibration, check, data)


def _default_scheme(out: Output, model: Path, arguments: Mapping[str, Any]) -> str:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.exporter.default_scheme import default_scheme

    choice = default_scheme(
        Checkpoint.open(model),
        arguments["runtime"],
        arguments["hardware"],
        arguments["file_format"],
    )
    out.note(f"Default scheme: {choice.scheme.name}, because {choice.reason}")
    return choice.scheme.name


def _check_data(out: Output, options: QuantizeOptions) -> None:
    """Refuse --data that isn't there before an hour's work; warn where nothing reads it."""
    if not options.data or options.calibration is not None:
        return  # `calibrate` reads it at once
    for name in options.data:
        if not name.startswith("dataset:") and not Path(name).expanduser().is_file():
            raise DataError(
                f"there is no data file {name}; give a .txt, .jsonl or .parquet file, or"
                " dataset:NAME[:CONFIG[:SPLIT]]"
            )
    if options.check is None:
        out.warn(
            "--data is not read: "
            + (
                "--calibration is given"
                if options.export.calibration is not None
                else "this recipe needs no calibration"
            )
        )


# -- Calibrate.


def _calibrate(out: Output, export: ExportOptions, calibration: CalibrationOptions) -> None:
    """Run the calibration, unless --resume finds it finished."""
    from quantkit.checkpoint.finished_output import MANIFEST_FILE
    from quantkit.checkpoint.output_checks import check_output

    if not (export.resume and (export.output / MANIFEST_FILE).is_file()):
        check_output(export.output, overwrite=export.overwrite, reads=[export.model])
    if export.resume and (calibration.output / "calibration.json").is_file():
        _require_same_calibration(calibration)
    else:
        run_calibration(out, calibration)


def _require_same_calibration(asked: CalibrationOptions) -> None:
    """Raises OutputError where the finished calibration was made with other options."""
    from quantkit.calibration.results import Calibration

    made = Calibration.open(asked.output).description
    same = {
        "--data": made["data"]["sources"] == (list(asked.data) or ["bundled"]),
        "--num-samples": made["windows_requested"] == asked.num_samples,
        "--seq-len": asked.seq_len in (None, made["seq_len"]),
        "--seed": made["seed"] == asked.seed,
        "--all-experts": made["all_experts"] == asked.all_experts,
    }
    differing = [option for option, equal in same.items() if not equal]
    if differing:
        raise OutputError(
            f"{asked.output} was made with a different {', '.join(differing)}; give the same"
            " options, or start again with --overwrite"
        )


# -- Check the result.


def _check_sanity(out: Output, export: ExportOptions, check: CheckOptions) -> dict[str, Any]:
    """The sanity check as JSON.

    Where the two models can't be run, "sane" is null, and a warning says why.
    """
    from quantkit.cli.processes import process_group
    from quantkit.cli.tables import Progress
    from quantkit.evaluation.sanity_check import check_sanity

    out.quiet_libraries()
    started = time.monotonic()
    try:
        with process_group(check.device), Progress("sanity check", out.quiet) as progress:
            found = check_sanity(
                export.model,
                export.output,
                check.data,
                check.tokens,
                check.hardware,
                check.device,
                check.trust_remote_code,
                progress,
            )
    except QuantkitError as error:
        out.warn(f"{export.output} is not checked: {error}")
        return {"sane": None, "problem": str(error)}
    seconds = time.monotonic() - started
    outcome = "passed" if found.is_sane else "failed"
    out.note(f"{export.output}: sanity check {outcome}: {found.sentence()}, {seconds:.1f} s")
    return found.to_json()


def _print_json(
    plan: ExportPlan,
    summary: ExportSummary,
    seconds: float,
    found: Verification,
    checked: dict[str, Any] | None,
) -> None:
    from quantkit.cli.tables import print_json

    print_json(
        summary.to_json()
        | {
            "seconds": seconds,
            "scheme": plan.options.recipe.scheme.name,
            "verify": found.to_json(),
            "judgement": checked,
        }
    )


def _raise_ruined(options: QuantizeOptions, checked: Mapping[str, Any] | None) -> None:
    """Raises FaultsFound where the sanity check failed."""
    if checked is not None and checked["sane"] is False:
        raise FaultsFound(
            f"{options.export.output} fails the sanity check: {checked['problem']}. The files are"
            f" kept; `{_eval_command(options)}` measures the loss in detail"
        )


def _print_next(out: Output, options: QuantizeOptions) -> None:
    output = shlex.quote(str(options.export.output))
    out.note(f"Next: {_eval_command(options)}\n      vllm serve {output}")


def _eval_command(options: QuantizeOptions) -> str:
    model, output = shlex.quote(options.model), shlex.quote(str(options.export.output))
    return f"quantkit eval {model} {output} --data FILE"
