"""The commands that judge: `verify` looks at files, `eval` runs them, `compare` sets two results side by side, `sensitivity` finds what costs most."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import Any

import click

from quantkit.console import (
    HARDWARE_NAMES,
    PROTOCOL_NAMES,
    RUNTIME_NAMES,
    Output,
    UserPath,
    command,
    data_option,
    device_option,
    different_sources,
    model_argument,
    recipe_options,
    remote_code_option,
)
from quantkit.errors import FaultsFound, Inconclusive, OutputError

WORST_SHOWN = 5  # of the layers that `verify --base` compares


def recipe_of_options(scheme: str | None, recipe: Path | None, ignore: tuple[str, ...] = (), kv_cache: str | None = None, observer: str | None = None) -> Any:
    """The recipe that --scheme or --recipe names, with what other options add."""
    from quantkit.scheme import QuantScheme, Recipe

    if (scheme is None) == (recipe is None):
        raise click.UsageError("give either --scheme or --recipe; `quantkit schemes` lists the schemes")
    chosen = Recipe.load(recipe) if recipe is not None else Recipe(QuantScheme.parse(scheme))
    return chosen.with_options(ignore, kv_cache, observer)


@command("verify")
@click.argument("checkpoint")
@click.option("--base", help="The original model: compare every weight with it.")
@click.option("--runtime", type=click.Choice(RUNTIME_NAMES), help="Count what this runtime can't load as a fault.")
def verify_command(out: Output, checkpoint: str, base: str | None, runtime: str | None) -> None:
    """Is CHECKPOINT whole, finite and consistent, and will a runtime load it? Exit code 3 on a fault."""
    from quantkit.hub import resolve_model
    from quantkit.report import print_json, print_table

    found = verified(out, resolve_model(checkpoint), resolve_model(base) if base else None, runtime)
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
    raise_faults(found)


def verified(out: Output, path: Path, base: Path | None, runtime: str | None) -> Any:
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


def raise_faults(found: Any) -> None:
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
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per window.  [default: 2048, or the model's positions; 64 of a masked model]")
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
    from quantkit.output import finite, write_json, write_text
    from quantkit.page import evaluation_html, require_matplotlib
    from quantkit.ranks import rank_of_environment
    from quantkit.report import Progress, print_json
    from quantkit.verdict import evaluation_markdown, evaluation_remarks

    require_places(output=output, html=html, markdown=markdown)
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


def require_places(**files: Path | None) -> None:
    """Refuse files that are one, or that lie where nothing can be written; before anything has run. files: by the option."""
    given = {name: path for name, path in files.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        *first, last = (f"--{name.replace('_', '-')}" for name in files)
        raise click.UsageError(f"give {', '.join(first)} and {last} different files")
    for path in given.values():
        if not path.absolute().parent.is_dir():
            raise OutputError(f"there is no directory {path.absolute().parent} to write {path.name} to; make it first")


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


@command("sensitivity")
@model_argument
@recipe_options
@click.option("--calibration", type=UserPath(), metavar="CALIB", help="Statistics for static scales, or weights that the recipe's algorithms chose.")
@data_option
@click.option("--max-tokens", type=click.IntRange(2), default=2048, show_default=True, help="How much text each variant is run on.")
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per window.  [default: 256, or the model's positions]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows.")
@click.option(
    "--alternative",
    "alternatives",
    multiple=True,
    metavar="SCHEME",
    help="What a set may be given instead: keep (its stored dtype), or a scheme.  [default: keep]",
)
@click.option("--max-size", metavar="SIZE", help="Budget: 150MB, 65% of the model, or +5% over all quantized; spends it where it helps most.")
@click.option("--max-kld", type=float, metavar="NATS", help="Budget: the mean KL that the result may have; as small as it allows.")
@click.option("-o", "--output", type=UserPath(dir_okay=False), help="Write the result as JSON.")
@click.option("--html", type=UserPath(dir_okay=False), help="Write a self-contained page with a heat map.")
@click.option("--recipe-out", type=UserPath(dir_okay=False), metavar="FILE", help="Write the budget's recipe, for export and quantize.")
@click.option(
    "--from", "earlier", type=UserPath(dir_okay=False), metavar="RESULT.json", help="Solve another budget from an earlier -o, without running anything."
)
@device_option
@remote_code_option
@click.option("--resume", is_flag=True, help="Continue an interrupted run; needs its -o.")
@click.option("--overwrite", is_flag=True, help="Start again where an interrupted run was left.")
def sensitivity_command(
    out: Output, model: str, scheme: str | None, recipe: Path | None, output: Path | None, html: Path | None, recipe_out: Path | None, earlier: Path | None,
    alternatives: tuple[str, ...], max_size: str | None, max_kld: float | None, **scoring: Any,
) -> None:  # fmt: skip
    """Which Linears of MODEL cost most by being quantized, and the recipe that spares the right ones.

    Each set that runtimes compute as one (q/k/v, gate/up, all experts of a layer) is quantized alone
    and compared with MODEL on a little text (calibration text that comes with quantkit, without
    --data). Sums of what sets cost predict what several cost together; how well is measured. With a
    budget the best choice for each set follows, exactly on these sums. Several processes share the
    windows: torchrun --nproc-per-node N -m quantkit sensitivity ...
    """
    from quantkit.advice import solution_recipe
    from quantkit.checkpoint import Checkpoint
    from quantkit.hub import resolve_model
    from quantkit.output import finite, write_json, write_text
    from quantkit.page import require_matplotlib, sensitivity_html
    from quantkit.ranking import LINE_COLUMNS, SET_COLUMNS, SHOWN, line_rows, sensitivity_remarks, sensitivity_title, set_rows
    from quantkit.ranks import rank_of_environment
    from quantkit.report import print_json, print_table
    from quantkit.scheme import Recipe
    from quantkit.sensitivity import OF_THE_RUN

    has_budget = max_size is not None or max_kld is not None
    if recipe_out is not None and not has_budget:
        raise click.UsageError("--recipe-out writes what a budget chooses; give --max-size or --max-kld")
    if scoring["resume"] and (output is None or earlier is not None):
        raise click.UsageError("--resume continues what lies beside the result: give the same -o FILE as before, and no --from, which runs nothing")
    require_places(output=output, html=html, recipe_out=recipe_out)
    if html is not None:
        require_matplotlib()
    path = resolve_model(model)
    out.quiet = out.quiet or rank_of_environment() > 0
    out.quiet_libraries()
    if earlier is None:
        result = _sensitivity(out, path, scheme, recipe, alternatives or ("keep",), max_size, max_kld, scoring | {"output": output})
    else:
        result = _sensitivity_anew(earlier, path, scheme, recipe, max_size, max_kld, alternatives)
        if output is not None:
            write_json(output, finite(result))
    if rank_of_environment() > 0:
        return
    if html is not None:
        write_text(html, sensitivity_html({key: value for key, value in result.items() if key not in OF_THE_RUN}))
    if recipe_out is not None:
        from quantkit.mixing import recipe_text

        write_text(recipe_out, recipe_text(solution_recipe(result, Checkpoint.open(path)), _recipe_comments(result)))
    if result.get("was_finished"):
        out.note(f"{output} was finished already, by the same work; nothing was run")
    if out.as_json:
        print_json(result)
    else:
        shown = None if out.verbose else SHOWN
        title = "" if shown is None or len(result["sets"]) <= shown else f"; {shown} of {len(result['sets'])} sets (all with -v)"
        print_table(SET_COLUMNS, set_rows(result, shown), sensitivity_title(result) + title, right=(0, 2, 3, 4, 5, 6, 7, 8, 9))
        print_table(LINE_COLUMNS, line_rows(result), "the worst sets given something else", right=(2, 3, 4, 5))
    for remark in sensitivity_remarks(result):
        out.note(remark)
    if recipe_out is not None:
        # What algorithms choose is chosen for one recipe, so it takes another calibration.
        walk = "quantize" if Recipe.from_mapping(result["recipe"], "recipe").needs_calibration else "export"
        out.note(f"Next: quantkit {walk} {shlex.quote(model)} -o OUT --recipe {shlex.quote(str(recipe_out))}")
    elif not has_budget:
        again = shlex.quote(str(output)) if output else "RESULT.json (written with -o)"
        out.note(f"Next: quantkit sensitivity {shlex.quote(model)} --from {again} --max-size +5% --recipe-out FILE.yaml")


def _sensitivity(
    out: Output, model: Path, scheme: str | None, recipe: Path | None, alternatives: tuple[str, ...], max_size: str | None, max_kld: float | None,
    scoring: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from quantkit.report import Progress
    from quantkit.sensitivity import SensitivityOptions, score_sensitivity

    chosen = recipe_of_options(scheme, recipe)
    options = SensitivityOptions(model, chosen, alternatives, max_size=max_size, max_kld=max_kld, **scoring)
    with Progress("sensitivity", out.quiet) as progress:
        return score_sensitivity(options, lambda name, done, total: progress.update(done, total, f"sensitivity, {name}"))


def _sensitivity_anew(
    earlier: Path, model: Path, scheme: str | None, recipe: Path | None, max_size: str | None, max_kld: float | None, alternatives: tuple[str, ...]
) -> dict[str, Any]:
    from quantkit.advice import opened_result, solved_anew
    from quantkit.checkpoint import Checkpoint

    if scheme is not None or recipe is not None:
        raise click.UsageError("--from has its recipe from the earlier run; leave out --scheme and --recipe")
    return solved_anew(opened_result(earlier, Checkpoint.open(model)), max_size, max_kld, alternatives)


def _recipe_comments(result: dict[str, Any]) -> list[str]:
    """What a reader of the written recipe should know."""
    from quantkit.output import format_bytes

    solution = result["solution"]
    budget = " and ".join(f"--max-{what} {value}" for what, value in (("size", solution["max_size"]), ("kld", solution["max_kld"])) if value is not None)
    return [
        f"Written by quantkit sensitivity for {budget}: {solution['moved']} of {len(result['sets'])} sets take another choice than the recipe's.",
        f"{format_bytes(solution['bytes'])} of weights, predicted KL {solution['kld_predicted']:.4f} on {result['tokens_scored']} tokens.",
    ]
