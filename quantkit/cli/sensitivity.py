"""`quantkit sensitivity`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.evaluate import require_places
from quantkit.cli.options import (
    UserPath,
    data_option,
    device_option,
    model_argument,
    recipe_of_options,
    recipe_options,
    remote_code_option,
)


@command("sensitivity")
@model_argument
@recipe_options
@click.option(
    "--calibration",
    type=UserPath(),
    metavar="CALIB",
    help="Statistics for static scales, or weights that the recipe's algorithms quantized.",
)
@data_option
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Tokens of text that each variant runs on.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    help="Tokens per window.  [default: 256 (masked models: 64), or the model's positions]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for sampling windows.")
@click.option(
    "--alternative",
    "alternatives",
    multiple=True,
    metavar="SCHEME",
    help="What a budget may give a layer group instead: keep (its stored dtype), or a scheme."
    "  [default: keep]",
)
@click.option(
    "--max-size",
    metavar="SIZE",
    help=(
        "Budget of bytes: 150MB, 65% (of MODEL), or +5% (over the recipe everywhere); the KL is"
        " minimized."
    ),
)
@click.option(
    "--max-kld",
    type=float,
    metavar="NATS",
    help="Budget: the mean KL that the result may have; gives the smallest size within it.",
)
@click.option("-o", "--output", type=UserPath(dir_okay=False), help="Write the result as JSON.")
@click.option(
    "--html",
    type=UserPath(dir_okay=False),
    help="Write a self-contained HTML report with a heat map.",
)
@click.option(
    "--recipe-out",
    type=UserPath(dir_okay=False),
    metavar="FILE",
    help="Write the recipe for the budget, for export and quantize.",
)
@click.option(
    "--from",
    "earlier",
    type=UserPath(dir_okay=False),
    metavar="RESULT.json",
    help="Solve for another budget from an earlier result (-o), without running the model.",
)
@device_option
@remote_code_option
@click.option("--resume", is_flag=True, help="Continue an interrupted run; needs its -o.")
@click.option("--overwrite", is_flag=True, help="Start again, over an interrupted run.")
def sensitivity_command(
    out: Output,
    model: str,
    scheme: str | None,
    recipe: Path | None,
    output: Path | None,
    html: Path | None,
    recipe_out: Path | None,
    earlier: Path | None,
    alternatives: tuple[str, ...],
    max_size: str | None,
    max_kld: float | None,
    **scoring: Any,
) -> None:
    """Rank the Linears of MODEL by what quantizing them costs, and fit a recipe to a budget.

    Each layer group that runtimes compute as one (q/k/v, gate/up, all experts of a layer) is
    quantized alone and compared with MODEL on a little text: without --data, the calibration text
    that comes with quantkit. What groups cost is added up to predict what several cost together;
    how well is measured. With a budget the best choice for each group follows, exactly on these
    sums. Several processes share the windows: torchrun --nproc-per-node N -m quantkit sensitivity
    ...
    """
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.evaluation.html import require_matplotlib
    from quantkit.models.distributed import rank_of_environment

    has_budget = max_size is not None or max_kld is not None
    if recipe_out is not None and not has_budget:
        raise click.UsageError(
            "--recipe-out writes what a budget chooses; give --max-size or --max-kld"
        )
    if scoring["resume"] and (output is None or earlier is not None):
        raise click.UsageError(
            "--resume continues what is stored next to the result: give the same -o FILE as"
            " before, and no --from, which runs nothing"
        )
    require_places(output=output, html=html, recipe_out=recipe_out)
    if html is not None:
        require_matplotlib()
    path = resolve_model(model)
    out.quiet = out.quiet or rank_of_environment() > 0
    out.quiet_libraries()
    budget = {"max_size": max_size, "max_kld": max_kld}
    if earlier is None:
        options = {"alternatives": alternatives or ("keep",), "output": output}
        result = _scored(out, path, scheme, recipe, scoring | budget | options)
    else:
        if scheme is not None or recipe is not None:
            raise click.UsageError(
                "--from has its recipe from the earlier run; leave out --scheme and --recipe"
            )
        result = _solved_anew(earlier, path, max_size, max_kld, alternatives, output)
    if rank_of_environment() > 0:
        return
    _write_files(result, path, html, recipe_out)
    if result.get("was_finished"):
        out.note(f"{output} was finished already, by the same work; nothing was run")
    _print_result(out, result)
    if recipe_out is not None:
        out.note(
            f"Next: quantkit {_next_command(result)} {shlex.quote(model)} -o OUT --recipe"
            f" {shlex.quote(str(recipe_out))}"
        )
    elif not has_budget:
        again = shlex.quote(str(output)) if output else "RESULT.json (written with -o)"
        out.note(
            f"Next: quantkit sensitivity {shlex.quote(model)} --from {again} --max-size +5%"
            " --recipe-out FILE.yaml"
        )


def _scored(
    out: Output, model: Path, scheme: str | None, recipe: Path | None, options: dict[str, Any]
) -> dict[str, Any]:
    from quantkit.cli.tables import Progress
    from quantkit.sensitivity.options import SensitivityOptions
    from quantkit.sensitivity.score import score_sensitivity

    asked = SensitivityOptions(model, recipe_of_options(scheme, recipe), **options)
    with Progress("sensitivity", out.quiet) as progress:
        return score_sensitivity(
            asked, lambda name, done, total: progress.update(done, total, f"sensitivity, {name}")
        )


def _solved_anew(
    earlier: Path,
    model: Path,
    max_size: str | None,
    max_kld: float | None,
    alternatives: tuple[str, ...],
    output: Path | None,
) -> dict[str, Any]:
    """An earlier run's result with another budget's solution, written where asked."""
    from quantkit.checkpoint.files import finite, write_json
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.sensitivity.advice import opened_result, solved_anew

    known = opened_result(earlier, Checkpoint.open(model))
    result = solved_anew(known, max_size, max_kld, alternatives)
    if output is not None:
        write_json(output, finite(result))
    return result


def _write_files(
    result: dict[str, Any], model: Path, html: Path | None, recipe_out: Path | None
) -> None:
    from quantkit.checkpoint.files import write_text
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.schemes.mixed_recipe import recipe_text
    from quantkit.sensitivity.advice import OF_THE_RUN, solution_recipe
    from quantkit.sensitivity.html import sensitivity_html

    if html is not None:
        lasting = {key: value for key, value in result.items() if key not in OF_THE_RUN}
        write_text(html, sensitivity_html(lasting))
    if recipe_out is not None:
        made = solution_recipe(result, Checkpoint.open(model))
        write_text(recipe_out, recipe_text(made, _recipe_comments(result)))


def _print_result(out: Output, result: dict[str, Any]) -> None:
    from quantkit.cli.tables import print_json, print_table
    from quantkit.sensitivity.report import (
        GROUP_COLUMNS,
        LINE_COLUMNS,
        SHOWN,
        group_rows,
        line_rows,
        sensitivity_remarks,
        sensitivity_title,
    )

    if out.as_json:
        print_json(result)
    else:
        shown, total = None if out.verbose else SHOWN, len(result["sets"])
        more = "" if shown is None or total <= shown else f"; {shown} of {total} (all with -v)"
        print_table(
            GROUP_COLUMNS,
            group_rows(result, shown),
            sensitivity_title(result) + more,
            right=tuple(number for number in range(len(GROUP_COLUMNS)) if number != 1),
        )
        print_table(
            LINE_COLUMNS,
            line_rows(result),
            "the worst layer groups in another choice",
            right=(2, 3, 4, 5),
        )
    for remark in sensitivity_remarks(result):
        out.note(remark)


def _next_command(result: dict[str, Any]) -> str:
    """Algorithms quantize weights for one recipe, so a mixed one takes another calibration."""
    from quantkit.schemes.recipe import Recipe

    recipe = Recipe.from_mapping(result["recipe"], "recipe")
    return "quantize" if recipe.needs_calibration else "export"


def _recipe_comments(result: dict[str, Any]) -> list[str]:
    """What a reader of the written recipe should know."""
    from quantkit.checkpoint.units import format_bytes

    solution = result["solution"]
    budget = " and ".join(
        f"--max-{what} {value}"
        for what, value in (("size", solution["max_size"]), ("kld", solution["max_kld"]))
        if value is not None
    )
    return [
        (
            f"Written by quantkit sensitivity for {budget}: {solution['moved']} of"
            f" {len(result['sets'])} layer groups take another choice than the recipe's."
        ),
        (
            f"{format_bytes(solution['bytes'])} of weights, predicted KL"
            f" {solution['kld_predicted']:.4f} on {result['tokens_scored']} tokens."
        ),
    ]
