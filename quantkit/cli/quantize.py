"""`quantkit quantize`: calibrate, export, and a look at the result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quantkit.cli.calibrate import run_calibration
from quantkit.cli.console import Output, command
from quantkit.cli.export import make_export_options, print_plan, run_export
from quantkit.cli.options import (
    calibration_options,
    data_option,
    directory_output,
    export_options,
    model_argument,
    recipe_of_options,
    recipe_options,
    resume_options,
)
from quantkit.cli.verify import raise_faults, verified
from quantkit.errors import DataError, FaultsFound, OutputError, QuantkitError
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
    help="Target hardware: decides the default scheme and the sanity check's arithmetic.",
)
@click.option(
    "--judge-tokens",
    type=click.IntRange(2),
    default=4096,
    show_default=True,
    help="Tokens of text for the sanity check.",
)
@click.option("--no-judge", is_flag=True, help="Skip the sanity check.")
@resume_options
def quantize_command(
    out: Output,
    model: str,
    output: Path,
    scheme: str | None,
    recipe: Path | None,
    data: tuple[str, ...],
    calibration: Path | None,
    ignore: tuple[str, ...],
    observer: str | None,
    kv_cache: str | None,
    runtime: str | None,
    file_format: str,
    max_shard_size: int,
    allow_unreached: bool,
    dry_run: bool,
    hardware: str | None,
    judge_tokens: int,
    no_judge: bool,
    resume: bool,
    overwrite: bool,
    **calibrating: Any,
) -> None:
    """Quantize MODEL in one step: calibrate if needed, export, verify, and run a sanity check.

    Without --scheme and --recipe, it picks the scheme that most runtimes can load, and says why. A
    calibration is stored next to the output, as OUT-calibration.

    The sanity check compares the result with MODEL on some text: on --data if calibration didn't
    use it, else on text that comes with quantkit. Where perplexity is certainly 10 % higher, or the
    mean KL above 0.15, the exit code is 3 and the files are kept.
    """
    from dataclasses import replace

    from quantkit.checkpoint.hub import resolve_model
    from quantkit.exporter.plan import plan_export
    from quantkit.exporter.runtimes import as_computed

    path = resolve_model(model)
    if scheme is None and recipe is None:
        scheme = _default_scheme(out, path, runtime, hardware, file_format)
    chosen = recipe_of_options(scheme, recipe, ignore, kv_cache, observer)
    for each in chosen.schemes:
        as_computed(each, hardware)
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
    plan = plan_export(
        options, calibration_follows=chosen.needs_calibration and calibration is None
    )
    if dry_run:
        print_plan(out, plan)
        return
    calibrates = chosen.needs_calibration and calibration is None
    if data and not calibrates:
        _require_files(data)
        if no_judge:
            out.warn(
                "--data is not read: "
                + (
                    "--calibration is given"
                    if calibration is not None
                    else "this recipe needs no calibration"
                )
            )
    if calibrates:
        from quantkit.checkpoint.finished_output import MANIFEST_FILE
        from quantkit.checkpoint.output_checks import check_output

        if not (resume and (output / MANIFEST_FILE).is_file()):
            check_output(output, overwrite=overwrite, reads=[options.model])
        directory = output.with_name(output.name + "-calibration")
        finished = resume and (directory / "calibration.json").is_file()
        if finished:
            _require_same_calibration(directory, data, calibrating)
        else:
            # Statistics alone serve every recipe; weights that algorithms choose serve theirs.
            run_calibration(
                out,
                options.model,
                directory,
                data,
                chosen if chosen.quantizes_weights else None,
                resume=resume,
                overwrite=overwrite,
                **calibrating,
            )
        plan = plan_export(replace(options, calibration=directory))
    summary, seconds = run_export(out, plan)
    found = verified(out, output, options.model, runtime)
    checked = None
    if not found.faults and not no_judge:
        checked = _sanity_checked(
            out,
            path,
            output,
            () if calibrates else data,
            judge_tokens,
            hardware,
            calibrating["device"],
            calibrating["trust_remote_code"],
        )
    if out.as_json:
        from quantkit.cli.tables import print_json

        print_json(
            summary.to_json()
            | {
                "seconds": seconds,
                "scheme": chosen.scheme.name,
                "verify": found.to_json(),
                "judgement": checked,
            }
        )
    raise_faults(found)
    if checked is not None and checked["sane"] is False:
        again = f"quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE"
        raise FaultsFound(
            f"{output} is ruined, and kept for you to look at: {checked['problem']}."
            f" `{again}` shows more"
        )
    out.note(
        f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE\n     "
        f" vllm serve {shlex.quote(str(output))}"
    )


def _default_scheme(
    out: Output, model: Path, runtime: str | None, hardware: str | None, file_format: str
) -> str:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.exporter.default_scheme import default_scheme

    choice = default_scheme(Checkpoint.open(model), runtime, hardware, file_format)
    out.note(f"Neither --scheme nor --recipe: {choice.scheme.name}, because {choice.reason}")
    return choice.scheme.name


def _require_files(data: Sequence[str]) -> None:
    """Before an hour's work: the text of the check at its end must be there."""
    for name in data:
        if not name.startswith("dataset:") and not Path(name).expanduser().is_file():
            raise DataError(
                f"there is no data file {name}; give a .txt, .jsonl or .parquet file, or"
                " dataset:NAME[:CONFIG[:SPLIT]]"
            )


def _sanity_checked(
    out: Output,
    model: Path,
    output: Path,
    data: tuple[str, ...],
    tokens: int,
    hardware: str | None,
    device: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The sanity check as JSON; where the two can't be run, "sane" is null, and a warning says
    why.
    """
    from quantkit.cli.tables import Progress
    from quantkit.evaluation.sanity_check import check_sanity

    out.quiet_libraries()
    started = time.monotonic()
    try:
        with Progress("sanity check", out.quiet) as progress:
            check = check_sanity(
                model,
                output,
                data,
                tokens,
                hardware,
                device,
                trust_remote_code,
                lambda name, done, total: progress.update(done, total, f"sanity check {name}"),
            )
    except QuantkitError as error:
        out.warn(f"{output} is not checked: {error}")
        return {"sane": None, "problem": str(error)}
    out.note(f"{output}: {check.sentence()}, {time.monotonic() - started:.1f} s")
    return check.to_json()


def _require_same_calibration(
    directory: Path, data: tuple[str, ...], asked: dict[str, Any]
) -> None:
    """`quantize --resume` goes on from a finished calibration only if the same one is asked for."""
    from quantkit.calibration.results import Calibration

    made = Calibration.open(directory).description
    same = {
        "--data": made["data"]["sources"] == (list(data) or ["bundled"]),
        "--num-samples": made["windows_requested"] == asked["num_samples"],
        "--seq-len": asked["seq_len"] in (None, made["seq_len"]),
        "--seed": made["seed"] == asked["seed"],
        "--all-experts": made["all_experts"] == asked["all_experts"],
    }
    differing = [option for option, equal in same.items() if not equal]
    if differing:
        raise OutputError(
            f"{directory} was made with a different {', '.join(differing)}; use the same, or start"
            " again with --overwrite"
        )
