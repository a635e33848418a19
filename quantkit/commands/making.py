"""The commands that make something: `calibrate`, `export`, and `quantize`, which is both and a look at the result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quantkit.commands.judging import raise_faults, recipe_of_options, verified
from quantkit.console import (
    HARDWARE_NAMES,
    Output,
    UserPath,
    calibration_options,
    command,
    data_option,
    directory_output,
    export_options,
    model_argument,
    recipe_options,
    resume_options,
)
from quantkit.errors import DataError, FaultsFound, OutputError, QuantkitError


def _export_options(
    model: Path, output: Path, recipe: Any, calibration: Path | None, runtime: str | None, layout: str, max_shard_size: int, resume: bool, overwrite: bool,
    allow_unreached: bool,
) -> Any:  # fmt: skip
    from quantkit.plan import ExportOptions

    return ExportOptions(model, output, recipe, calibration, runtime, layout, max_shard_size, resume, overwrite, allow_unreached)


@command("calibrate")
@model_argument
@directory_output
@data_option
@click.option("--recipe", type=UserPath(), help="Run its algorithms, and serve it alone; without, the statistics serve every scheme.")
@calibration_options
@resume_options
def calibrate_command(out: Output, model: str, output: Path, data: tuple[str, ...], recipe: Path | None, **options: Any) -> None:
    """Run text through MODEL, block by block, and record the statistics of every Linear's input.

    Without --data a small text that comes with quantkit is used. Several processes share the work:
    torchrun --nproc-per-node N -m quantkit calibrate ...
    """
    from quantkit.hub import resolve_model
    from quantkit.scheme import Recipe

    loaded = Recipe.load(recipe) if recipe else None
    chosen = f"--recipe {shlex.quote(str(recipe))}" if recipe else "--scheme fp8-static"
    summary = _calibrate(out, resolve_model(model), output, data, loaded, **options)
    if out.as_json:
        from quantkit.report import print_json

        print_json(summary.to_json())
    ignore = "".join(f" --ignore {shlex.quote(pattern)}" for patterns in summary.ignore.values() for pattern in patterns)
    out.note(f"Next: quantkit export {shlex.quote(model)} -o OUT {chosen} --calibration {shlex.quote(str(output))}{ignore}")


def _calibrate(out: Output, model: Path, output: Path, data: tuple[str, ...], recipe: Any, **options: Any) -> Any:
    from quantkit.calibration import CalibrationOptions, calibrate
    from quantkit.output import counted, format_bytes
    from quantkit.ranks import rank_of_environment
    from quantkit.report import Progress

    out.quiet = out.quiet or rank_of_environment() > 0
    out.quiet_libraries()
    with Progress("calibrate", out.quiet) as progress:
        summary = calibrate(CalibrationOptions(model, output, data, recipe, **options), progress.update)
    if summary.was_finished:
        out.note(f"{output} was finished already, and its files are as they were written; nothing was measured")
        return summary
    if rank_of_environment() == 0:
        _warn_of_calibration(out, summary)
        for remark in summary.chosen:
            out.note(remark)
    out.note(
        f"{output}: statistics of {counted(summary.inputs, 'input')} ({counted(summary.linears, 'Linear')}) "
        f"from {counted(summary.windows, 'window')} of {summary.seq_len} tokens, "
        f"{summary.seconds:.1f} s, {summary.tokens_per_second:.0f} tokens/s, peak memory {format_bytes(summary.peak_memory_bytes)}"
    )
    return summary


def _warn_of_calibration(out: Output, summary: Any) -> None:
    from quantkit.output import counted

    has_run_out = summary.windows < summary.requested
    if has_run_out:
        out.warn(
            f"the text holds {counted(summary.windows, 'window')} of {summary.seq_len} tokens, fewer than the {summary.requested} asked for; "
            "give more with --data"
        )
    if summary.unsettled:
        count, name = len(summary.unsettled), summary.unsettled[0]
        out.warn(
            f"{count} of {counted(summary.inputs, 'input')} still grew in the last quarter of the data ({name}{' and others' if count > 1 else ''}); "
            f"static scales want more text: {'give it with --data' if has_run_out else 'raise --num-samples'}. "
            f"`quantkit inspect {shlex.quote(str(summary.path))}` shows them"
        )
    if summary.starved:
        out.warn(
            f"{counted(len(summary.starved), 'expert')} saw too few tokens ({summary.starved[0]}{' and others' if len(summary.starved) > 1 else ''}); "
            "their scales are estimated from their weights and the other experts: give more text, or --all-experts"
        )

    if summary.unread:
        out.warn(
            f"no token reached {_named(summary.unread, 'Linear')}, which transformers runs in another way or not at all, so they have no static scale: "
            f"a static scheme needs {_ignoring(summary, 'unread')}"
        )
    if summary.refused:
        out.warn(f"export can't quantize {_named(summary.refused, 'parameter')} and refuses the model unless they are left: {_ignoring(summary, 'refused')}")


def _named(names: Sequence[str], what: str) -> str:
    return f"the {what} {names[0]}" if len(names) == 1 else f"{len(names)} {what}s ({names[0]} and others)"


def _ignoring(summary: Any, which: str) -> str:
    return " ".join(f"--ignore {shlex.quote(pattern)}" for pattern in summary.ignore[which])


@command("export")
@model_argument
@directory_output
@recipe_options
@export_options
@click.option("--stream-download", is_flag=True, help="Of a hub id, keep only the shards in work on the disk.")
@resume_options
def export_command(
    out: Output, model: str, output: Path, scheme: str | None, recipe: Path | None, calibration: Path | None, ignore: tuple[str, ...],
    observer: str | None, kv_cache: str | None, runtime: str | None, layout: str, max_shard_size: int, allow_unreached: bool, dry_run: bool, stream_download: bool, resume: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Write MODEL's quantized checkpoint, a few rows at a time.

    A hub id's shards are fetched as they are needed.
    """
    from quantkit.plan import plan_export

    chosen = recipe_of_options(scheme, recipe, ignore, kv_cache, observer)
    path, checkpoint = _open_for_export(model, output, calibration, stream_download)
    options = _export_options(path, output, chosen, calibration, runtime, layout, max_shard_size, resume, overwrite, allow_unreached)
    plan = plan_export(options, checkpoint=checkpoint)
    if dry_run:
        _print_plan(out, plan)
        return
    summary, seconds = _export(out, plan)
    if out.as_json:
        from quantkit.report import print_json

        print_json(summary.to_json() | {"seconds": seconds})
    out.note(f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE")


def _open_for_export(model: str, output: Path, calibration: Path | None, stream_download: bool) -> tuple[Path, Any]:
    """Where MODEL is, and the checkpoint if it is opened already: a hub id from its headers, unless a calibration has to be compared with its files."""
    from quantkit.hub import is_hub_id, open_hub_model, resolve_model

    if stream_download and (calibration is not None or not is_hub_id(model)):
        raise click.UsageError("--stream-download is for a hub id" + (", without --calibration: that was made from a local copy" if calibration else ""))
    if calibration is not None or not is_hub_id(model):
        return resolve_model(model), None
    partial = output.resolve().with_name(output.name + ".partial")
    return Path(model), open_hub_model(model, partial / ".download" if stream_download else None)


def _export(out: Output, plan: Any) -> tuple[Any, float]:
    from quantkit.export import export
    from quantkit.output import counted, format_bytes
    from quantkit.report import Progress

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
        out.note(f"{summary.path} was finished already, and its files are as they were exported; nothing was written")
        return summary, seconds
    ratio = summary.bytes_after / summary.bytes_before
    schemes = {linear.scheme.name for linear in plan.linears.values()}
    out.note(
        f"{summary.path}: {counted(summary.quantized, 'Linear')} in {schemes.pop() if len(schemes) == 1 else 'mixed schemes'}, "
        f"{summary.left} left; {format_bytes(summary.bytes_before)} → {format_bytes(summary.bytes_after)} ({100 * ratio:.0f} %), {seconds:.1f} s"
    )
    return summary, seconds


def _print_plan(out: Output, plan: Any) -> None:
    from quantkit.report import PLAN_COLUMNS, plan_rows, print_json, print_table

    if out.as_json:
        print_json(plan.to_json())
    else:
        print_table(PLAN_COLUMNS, plan_rows(plan), right=(4, 5))
    for warning in plan.warnings:
        out.warn(warning)


@command("quantize")
@model_argument
@directory_output
@recipe_options
@data_option
@calibration_options
@export_options
@click.option("--hardware", type=click.Choice(HARDWARE_NAMES), help="Where it will be served: decides the default scheme, and what the judge computes.")
@click.option("--judge-tokens", type=click.IntRange(2), default=4096, show_default=True, help="How much text the result is judged on.")
@click.option("--no-judge", is_flag=True, help="Don't run the result.")
@resume_options
def quantize_command(
    out: Output, model: str, output: Path, scheme: str | None, recipe: Path | None, data: tuple[str, ...], calibration: Path | None, ignore: tuple[str, ...],
    observer: str | None, kv_cache: str | None, runtime: str | None, layout: str, max_shard_size: int, allow_unreached: bool, dry_run: bool, hardware: str | None,
    judge_tokens: int, no_judge: bool, resume: bool, overwrite: bool, **calibrating: Any,
) -> None:  # fmt: skip
    """Calibrate where the recipe needs it, export, verify, judge: MODEL to a checked checkpoint.

    Without --scheme and --recipe it takes the scheme that is served in the most places, and says
    why. The calibration is kept beside the output, as OUT-calibration. At the end the result and
    MODEL run over some text (--data where no calibration has read it, else one that comes with
    quantkit): exit code 3, with the files kept, where it is ruined (perplexity +10 % or a mean KL
    of 0.15, beyond doubt).
    """
    from dataclasses import replace

    from quantkit.hub import resolve_model
    from quantkit.plan import plan_export
    from quantkit.runtimes import as_computed

    path = resolve_model(model)
    if scheme is None and recipe is None:
        scheme = _default_scheme(out, path, runtime, hardware, layout)
    chosen = recipe_of_options(scheme, recipe, ignore, kv_cache, observer)
    for each in chosen.schemes:
        as_computed(each, hardware)
    options = _export_options(path, output, chosen, calibration, runtime, layout, max_shard_size, resume, overwrite, allow_unreached)
    plan = plan_export(options, calibration_follows=chosen.needs_calibration and calibration is None)
    if dry_run:
        _print_plan(out, plan)
        return
    calibrates = chosen.needs_calibration and calibration is None
    if data and not calibrates:
        _require_files(data)
        if no_judge:
            out.warn("--data is not read: " + ("--calibration is given" if calibration is not None else "this recipe needs no calibration"))
    if calibrates:
        from quantkit.output import MANIFEST_FILE, check_output

        if not (resume and (output / MANIFEST_FILE).is_file()):
            check_output(output, overwrite=overwrite, reads=[options.model])
        directory = output.with_name(output.name + "-calibration")
        finished = resume and (directory / "calibration.json").is_file()
        if finished:
            _require_same_calibration(directory, data, calibrating)
        else:
            # Statistics alone serve every recipe; weights that algorithms choose serve theirs.
            _calibrate(out, options.model, directory, data, chosen if chosen.chooses_weights else None, resume=resume, overwrite=overwrite, **calibrating)
        plan = plan_export(replace(options, calibration=directory))
    summary, seconds = _export(out, plan)
    found = verified(out, output, options.model, runtime)
    judged = None
    if not found.faults and not no_judge:
        judged = _judged(out, path, output, () if calibrates else data, judge_tokens, hardware, calibrating["device"], calibrating["trust_remote_code"])
    if out.as_json:
        from quantkit.report import print_json

        print_json(summary.to_json() | {"seconds": seconds, "scheme": chosen.scheme.name, "verify": found.to_json(), "judgement": judged})
    raise_faults(found)
    if judged is not None and judged["sane"] is False:
        again = f"quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE"
        raise FaultsFound(f"{output} is ruined, and kept for you to look at: {judged['problem']}. `{again}` shows more")
    out.note(f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE\n      vllm serve {shlex.quote(str(output))}")


def _default_scheme(out: Output, model: Path, runtime: str | None, hardware: str | None, layout: str) -> str:
    from quantkit.checkpoint import Checkpoint
    from quantkit.defaults import default_scheme

    choice = default_scheme(Checkpoint.open(model), runtime, hardware, layout)
    out.note(f"Neither --scheme nor --recipe: {choice.scheme.name}, because {choice.reason}")
    return choice.scheme.name


def _require_files(data: Sequence[str]) -> None:
    """Before an hour's work: what is judged at its end must be there."""
    for name in data:
        if not name.startswith("dataset:") and not Path(name).expanduser().is_file():
            raise DataError(f"there is no data file {name}; give a .txt, .jsonl or .parquet file, or dataset:NAME[:CONFIG[:SPLIT]]")


def _judged(
    out: Output, model: Path, output: Path, data: tuple[str, ...], tokens: int, hardware: str | None, device: str, trust_remote_code: bool
) -> dict[str, Any]:
    """The judgement as JSON; where the two can't be run, "sane" is null, and a warning says why."""
    from quantkit.judgement import judge
    from quantkit.report import Progress

    out.quiet_libraries()
    started = time.monotonic()
    try:
        with Progress("judge", out.quiet) as progress:
            judgement = judge(
                model, output, data, tokens, hardware, device, trust_remote_code, lambda name, done, total: progress.update(done, total, f"judge {name}")
            )
    except QuantkitError as error:
        out.warn(f"{output} is not judged: {error}")
        return {"sane": None, "problem": str(error)}
    out.note(f"{output}: {judgement.sentence()}, {time.monotonic() - started:.1f} s")
    return judgement.to_json()


def _require_same_calibration(directory: Path, data: tuple[str, ...], asked: dict[str, Any]) -> None:
    """`quantize --resume` goes on from a finished calibration only if the same one is asked for."""
    from quantkit.measurements import Calibration

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
        raise OutputError(f"{directory} was made with a different {', '.join(differing)}; use the same, or start again with --overwrite")
