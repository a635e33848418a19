"""The command line: parse, one call, print. torch and transformers are imported inside commands, so that `--help` answers at once."""

from __future__ import annotations

import functools
import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from quantkit import __version__
from quantkit.console import (
    RUNTIME_NAMES,
    ErrorGroup,
    Output,
    Shape,
    UserPath,
    calibration_options,
    data_option,
    device_option,
    different_sources,
    directory_output,
    export_options,
    model_argument,
    recipe_options,
    remote_code_option,
    resume_options,
)
from quantkit.errors import FaultsFound, Inconclusive, OutputError, QuantkitError

PROTOCOL_NAMES = ("gptq", "llamacpp", "lmeval")
BENCHMARK_KINDS = ("int8", "fp8", "weight-only", "bf16", "convert")
WORST_SHOWN = 5  # of the layers that `verify --base` compares
HARDWARE_NAMES = ("blackwell", "hopper", "ada", "ampere", "turing", "cpu")


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
@click.version_option(__version__, "--version", prog_name="quantkit")
def main() -> None:
    """Quantize Hugging Face checkpoints to FP8 or INT8, and measure what that costs.

    MODEL is a directory with safetensors, a hub id or a .gguf file. A first walk:

    \b
      quantkit quantize MODEL -o OUT --scheme fp8-dynamic
      quantkit eval MODEL OUT --data text.txt

    Exit codes: 0 done, 1 failed, 2 bad usage, 3 a gate failed or verify found a fault,
    4 inconclusive (eval --strict), 5 not comparable, 75 interrupted (--resume continues).
    """


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A subcommand with the options that all share; its function gets an Output first."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(quiet: bool, verbose: bool, as_json: bool, **arguments: Any) -> None:
            function(Output(quiet, verbose, as_json), **arguments)

        run = click.option("-v", "--verbose", is_flag=True, help="Say more; let libraries log.")(run)
        run = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")(run)
        run = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")(run)
        # The shared options come last in each help text.
        run.__click_params__ = run.__click_params__[-3:] + run.__click_params__[:-3]
        return main.command(name, context_settings=CONTEXT)(run)

    return decorate


def _recipe(scheme: str | None, recipe: Path | None, ignore: tuple[str, ...], kv_cache: str | None, observer: str | None) -> Any:
    from quantkit.scheme import QuantScheme, Recipe

    if (scheme is None) == (recipe is None):
        raise click.UsageError("give either --scheme or --recipe; `quantkit schemes` lists the schemes")
    chosen = Recipe.load(recipe) if recipe is not None else Recipe(QuantScheme.parse(scheme))
    return chosen.with_options(ignore, kv_cache, observer)


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

    chosen = _recipe(scheme, recipe, ignore, kv_cache, observer)
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
@resume_options
def quantize_command(
    out: Output, model: str, output: Path, scheme: str | None, recipe: Path | None, data: tuple[str, ...], calibration: Path | None, ignore: tuple[str, ...],
    observer: str | None, kv_cache: str | None, runtime: str | None, layout: str, max_shard_size: int, allow_unreached: bool, dry_run: bool, resume: bool, overwrite: bool,
    **calibrating: Any,
) -> None:  # fmt: skip
    """Calibrate where the recipe needs it, export, verify: MODEL to a checked checkpoint.

    The calibration is kept beside the output, as OUT-calibration.
    """
    from dataclasses import replace

    from quantkit.hub import resolve_model
    from quantkit.plan import plan_export

    chosen = _recipe(scheme, recipe, ignore, kv_cache, observer)
    options = _export_options(resolve_model(model), output, chosen, calibration, runtime, layout, max_shard_size, resume, overwrite, allow_unreached)
    plan = plan_export(options, calibration_follows=chosen.needs_calibration and calibration is None)
    if dry_run:
        _print_plan(out, plan)
        return
    if data and (calibration is not None or not chosen.needs_calibration):
        out.warn("--data is not read: " + ("--calibration is given" if calibration is not None else "this recipe needs no calibration"))
    if chosen.needs_calibration and calibration is None:
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
    found = _verify(out, output, options.model, runtime)
    if out.as_json:
        from quantkit.report import print_json

        print_json(summary.to_json() | {"seconds": seconds, "verify": found.to_json()})
    _raise_faults(found)
    out.note(f"Next: quantkit eval {shlex.quote(model)} {shlex.quote(str(output))} --data FILE\n      vllm serve {shlex.quote(str(output))}")


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


@command("verify")
@click.argument("checkpoint")
@click.option("--base", help="The original model: compare every weight with it.")
@click.option("--runtime", type=click.Choice(RUNTIME_NAMES), help="Count what this runtime can't load as a fault.")
def verify_command(out: Output, checkpoint: str, base: str | None, runtime: str | None) -> None:
    """Is CHECKPOINT whole, finite and consistent, and will a runtime load it? Exit code 3 on a fault."""
    from quantkit.hub import resolve_model
    from quantkit.report import print_json, print_table

    found = _verify(out, resolve_model(checkpoint), resolve_model(base) if base else None, runtime)
    if out.as_json:
        print_json(found.to_json())
    elif found.faults:
        print_table(("tensor", "fault"), found.faults)
    if not out.as_json and found.sqnr_db:
        shown = found.worst_first if out.verbose else found.worst_first[:WORST_SHOWN]
        title = "worst first" + ("" if len(shown) == len(found.sqnr_db) else f", {len(shown)} of {len(found.sqnr_db)} (all with -v)")
        print_table(("Linear", "weight SQNR dB"), [(name, f"{value:.1f}" if math.isfinite(value) else "exact") for name, value in shown], title, right=(1,))
    if not out.as_json and out.verbose and found.left:
        print_table(("left unquantized", "why"), list(found.left.items()))
    _raise_faults(found)


def _verify(out: Output, path: Path, base: Path | None, runtime: str | None) -> Any:
    from quantkit.output import counted
    from quantkit.report import Progress
    from quantkit.verification import verify

    started = time.monotonic()
    with Progress("verify", out.quiet) as progress:
        found = verify(path, base, runtime, progress.update)
    if not out.as_json:
        for warning in found.warnings:
            out.warn(warning)
    if not found.faults:
        worst = f", least weight SQNR {min(found.sqnr_db.values()):.1f} dB" if found.sqnr_db and math.isfinite(min(found.sqnr_db.values())) else ""
        worst += f", {len(found.changed)} tensors not the base's because algorithms changed them" if base and found.changed else ""
        out.note(
            f"{path}: sound; {counted(found.tensors, 'tensor')}, {counted(found.quantized, 'Linear')} quantized, {len(found.left)} left{worst}, {time.monotonic() - started:.1f} s"
        )
    return found


def _raise_faults(found: Any) -> None:
    if found.faults:
        tensor, message = found.faults[0]
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise FaultsFound(f"{found.path} has faults: {f'{tensor} ' if tensor else ''}{message}{more}")


@command("eval")
@click.argument("base")
@click.argument("quants", nargs=-1, metavar="[QUANT]...")
@click.option(
    "--data", multiple=True, required=True, callback=different_sources, metavar="FILE", help=".txt, .jsonl, .parquet, or dataset:NAME[:CONFIG[:SPLIT]]."
)
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per window.  [default: 2048, or the model's positions]")
@click.option("--max-tokens", type=click.IntRange(1), help="Stop after the windows that hold this many.")
@click.option("--protocol", type=click.Choice(PROTOCOL_NAMES), default="gptq", show_default=True, help="How windows are cut and scored.")
@click.option("-o", "--output", type=UserPath(dir_okay=False), help="Write the result as JSON.")
@click.option("--html", type=UserPath(dir_okay=False), help="Write a self-contained page.")
@click.option("--markdown", type=UserPath(dir_okay=False), help="Write a section for a model card.")
@click.option("--gate", "gates", multiple=True, metavar="EXPR", help="Exit 3 unless e.g. 'ppl_delta_pct<=1.0' holds; also kld_mean, top1, size_ratio.")
@click.option("--strict", is_flag=True, help="Exit 4 when the text can't decide a gate.")
@click.option(
    "--exec",
    "exec_",
    type=click.Choice(["auto", "kernel", "reference"]),
    default="auto",
    show_default=True,
    help="Compiled kernels (refused where a Linear has none), the reference arithmetic, or kernels where there are any.",
)
@click.option("--hardware", type=click.Choice(HARDWARE_NAMES), help="Compute what this hardware computes.")
@click.option("--noise-floor", is_flag=True, help="Measure too what rounding noise alone would change.")
@click.option("--no-cache", is_flag=True, help="Neither take the base's hidden states from an earlier run nor keep them.")
@device_option
@remote_code_option
def eval_command(
    out: Output, base: str, quants: tuple[str, ...], data: tuple[str, ...], output: Path | None, html: Path | None, markdown: Path | None,
    gates: tuple[str, ...], strict: bool, exec_: str, no_cache: bool, **options: Any,
) -> None:  # fmt: skip
    """Compare quantized checkpoints with BASE on the same text, from the files as exported.

    With BASE alone: its perplexity. Several processes share the windows: torchrun --nproc-per-node N
    -m quantkit eval ...
    """
    from quantkit.evaluation import EvaluationOptions, evaluate
    from quantkit.hub import resolve_model
    from quantkit.output import write_json, write_text
    from quantkit.page import evaluation_html, require_matplotlib
    from quantkit.ranks import rank_of_environment
    from quantkit.report import Progress, finite, print_json
    from quantkit.verdict import evaluation_markdown, evaluation_remarks

    written = [path.resolve() for path in (output, html, markdown) if path is not None]
    if len(set(written)) < len(written):
        raise click.UsageError("give --output, --html and --markdown different files")
    for path in (output, html, markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise OutputError(f"there is no directory {path.absolute().parent} to write {path.name} to; make it first")
    if html is not None:
        require_matplotlib()
    paths = [resolve_model(base), *(resolve_model(quant) for quant in quants)]
    out.quiet = out.quiet or rank_of_environment() > 0
    out.quiet_libraries()
    with Progress("eval", out.quiet) as progress:
        result = evaluate(
            EvaluationOptions(paths[0], tuple(paths[1:]), data, gates=gates, exec=exec_, cache=not no_cache, **options),
            lambda name, done, total: progress.update(done, total, f"eval {name}"),
        )
    if rank_of_environment() > 0:
        return
    if output is not None:
        write_json(output, finite(result))
    if markdown is not None:
        write_text(markdown, evaluation_markdown(result))
    if html is not None:
        write_text(html, evaluation_html(result))
    if out.as_json:
        print_json(result)
    else:
        _print_evaluation(result)
    for remark in evaluation_remarks(result):
        out.note(remark)
    _raise_gates(result, strict)
    if not quants:
        out.note(f"Next: quantkit quantize {shlex.quote(base)} -o OUT --scheme fp8-dynamic")


def _print_evaluation(result: dict[str, Any]) -> None:
    from quantkit.report import print_table
    from quantkit.verdict import EVALUATION_COLUMNS, LAYER_COLUMNS, evaluation_rows, evaluation_title, figure_rows, layer_rows

    print_table(EVALUATION_COLUMNS, evaluation_rows(result), evaluation_title(result), right=(2, 3, 4, 5, 6, 7, 8, 9, 11))
    if result["quants"]:
        columns, rows = figure_rows(result)
        print_table(columns, rows, right=range(1, len(columns)))
    layers = layer_rows(result)
    if layers:
        print_table(LAYER_COLUMNS, layers, right=range(2, len(LAYER_COLUMNS)))


def _raise_gates(result: dict[str, Any], strict: bool) -> None:
    failed = [gate for gate in result["gates"] if gate["result"] == "fail"]
    undecided = [gate for gate in result["gates"] if gate["result"] == "inconclusive"]
    if failed:
        raise FaultsFound(f"the gate {failed[0]['expr']} failed on {failed[0]['path']}: {failed[0]['value']:.4g}")
    if undecided and strict:
        more = undecided[0].get("more_tokens_needed")
        raise Inconclusive(
            f"the gate {undecided[0]['expr']} is undecided on this text" + (f"; it needs about {more} more tokens" if more else "; give more text")
        )


@command("compare")
@click.argument("first", metavar="A.json", type=UserPath(dir_okay=False))
@click.argument("second", metavar="B.json", type=UserPath(dir_okay=False))
def compare_command(out: Output, first: Path, second: Path) -> None:
    """Quant against quant, paired: two results of `eval -o` against the same base, on the same text.

    Exit code 5 where they can't be compared.
    """
    from quantkit.comparison import compare
    from quantkit.report import print_json, print_table
    from quantkit.verdict import COMPARISON_COLUMNS, comparison_remarks, comparison_rows, comparison_title

    comparison = compare(first, second)
    if out.as_json:
        print_json(comparison)
    else:
        print_table(COMPARISON_COLUMNS, comparison_rows(comparison), comparison_title(comparison), right=range(2, len(COMPARISON_COLUMNS)))
    for remark in comparison_remarks(comparison):
        out.note(remark)


@command("inspect")
@click.argument("path")
def inspect_command(out: Output, path: str) -> None:
    """What a checkpoint or a calibration holds."""
    from quantkit.hub import resolve_model
    from quantkit.inspection import inspect_path
    from quantkit.report import inspection_tables, print_json, print_table

    description = inspect_path(resolve_model(path))
    if out.as_json:
        print_json(description)
        return
    for title, columns, rows, right in inspection_tables(description):
        print_table(columns, rows, title, right)


@command("schemes")
def schemes_command(out: Output) -> None:
    """The schemes, and which runtime and hardware takes which."""
    from quantkit.report import print_json, print_table, schemes_description, schemes_tables

    if out.as_json:
        print_json(schemes_description())
        return
    for title, columns, rows in schemes_tables():
        print_table(columns, rows, title)


@command("doctor")
def doctor_command(out: Output) -> None:
    """Versions, kernels, devices; exit code 1 if something is broken."""
    from quantkit.doctor import examine
    from quantkit.report import print_json, print_table

    examination = examine()
    if out.as_json:
        print_json(examination)
    else:
        print_table(("check", "found", "status"), [(check["name"], check["found"], check["status"]) for check in examination["checks"]])
    if not examination["ok"]:
        broken = [check for check in examination["checks"] if check["status"] == "broken"]
        raise QuantkitError(f"{broken[0]['name']} is broken: {broken[0]['found']}")


@command("bench")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(BENCHMARK_KINDS), help="What to measure.  [default: all]")
@click.option("--shape", "shapes", multiple=True, type=Shape(), help="Input × output features, e.g. 4096x4096.  [default: three of small models]")
@click.option("--tokens", multiple=True, type=click.IntRange(1), help="Tokens at a time.  [default: 1, 16, 128, 512]")
def bench_command(out: Output, kinds: tuple[str, ...], shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...]) -> None:
    """The compiled kernels beside torch's own ops, on one thread."""
    from dataclasses import asdict

    from quantkit.benchmark import KINDS, SHAPES, TOKENS, benchmark, describe, read_bandwidth
    from quantkit.report import Progress, benchmark_rows, print_json, print_table

    cases = (kinds or KINDS, shapes or SHAPES, tokens or TOKENS)
    total = len(cases[1]) * sum(3 if kind == "convert" else len(cases[2]) for kind in cases[0])
    with Progress("bench", out.quiet) as progress:
        figures, bandwidth = [], read_bandwidth()
        for figure in benchmark(*cases):
            figures.append(figure)
            progress.update(len(figures), total)
    machine = describe() | {"read_gb_per_s": bandwidth}
    if out.as_json:
        print_json({"machine": machine, "figures": [asdict(figure) for figure in figures]})
        return
    out.note(f"{machine['processor']}, kernels {machine['kernels']}, torch {machine['torch']}; one thread, which reads memory at {bandwidth:.1f} GB/s")
    headings, rows = benchmark_rows(figures)
    print_table(headings, rows, right=range(1, len(headings)))


@command("demo")
@click.option("-o", "--output", type=UserPath(), default=Path("quantkit-demo"), show_default=True, help="Directory for the results.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo's results.")
def demo_command(out: Output, output: Path, overwrite: bool) -> None:
    """The whole story on a real small model (SmolLM2-135M), in minutes."""
    from quantkit.demo import run_demo
    from quantkit.report import print_json, print_table

    out.quiet_libraries()
    story = run_demo(output, overwrite, out.note, out.quiet)
    if out.as_json:
        print_json(story.result)
        return
    print_table(story.columns, story.rows, story.title, right=story.right)
    out.note(story.epilogue)
