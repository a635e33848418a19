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
    help="Calibration for static scales, or for the recipe's algorithms.",
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
    help="Tokens per window.  [default: 256, or the model's positions if fewer]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed for sampling windows of text."
)
@click.option(
    "--alternative",
    "alternatives",
    multiple=True,
    metavar="SCHEME",
    help="What a layer group may use instead: keep (stored dtype), or a scheme.  [default: keep]",
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
    "--max-kld", type=float, metavar="NATS", help="Budget of mean KL; the size is minimized."
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
@click.option("--resume", is_flag=True, help="Continue an interrupted run; needs the same -o.")
@click.option("--overwrite", is_flag=True, help="Discard an interrupted run and start again.")
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

    Layers that runtimes fuse (q/k/v, gate/up, all experts of a layer) form one group. Each group is
    quantized alone and compared with MODEL on --data, or else on the calibration text that comes
    with quantkit. The cost of several groups is predicted as the sum of their costs, and the error
    of that prediction is measured. With a budget, the recipe that is optimal for these sums
    follows. Several processes can share the windows:
    torchrun --nproc-per-node N -m quantkit sensitivity ...
    """
    from quantkit.checkpoint.files import finite, write_json, write_text
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.cli.tables import print_json, print_table
    from quantkit.evaluation.html import require_matplotlib
    from quantkit.models.distributed import rank_of_environment
    from quantkit.schemes.recipe import Recipe
    from quantkit.sensitivity.advice import solution_recipe
    from quantkit.sensitivity.html import sensitivity_html
    from quantkit.sensitivity.report import (
        LINE_COLUMNS,
        SET_COLUMNS,
        SHOWN,
        line_rows,
        sensitivity_remarks,
        sensitivity_title,
        set_rows,
    )
    from quantkit.sensitivity.score import OF_THE_RUN

    has_budget = max_size is not None or max_kld is not None
    if recipe_out is not None and not has_budget:
        raise click.UsageError(
            "--recipe-out writes what a budget chooses; give --max-size or --max-kld"
        )
    if scoring["resume"] and (output is None or earlier is not None):
        raise click.UsageError(
            "--resume continues what lies beside the result: give the same -o FILE as before, and"
            " no --from, which runs nothing"
        )
    require_places(output=output, html=html, recipe_out=recipe_out)
    if html is not None:
        require_matplotlib()
    path = resolve_model(model)
    out.quiet = out.quiet or rank_of_environment() > 0
    out.quiet_libraries()
    if earlier is None:
        result = _sensitivity(
            out,
            path,
            scheme,
            recipe,
            alternatives or ("keep",),
            max_size,
            max_kld,
            scoring | {"output": output},
        )
    else:
        result = _sensitivity_anew(earlier, path, scheme, recipe, max_size, max_kld, alternatives)
        if output is not None:
            write_json(output, finite(result))
    if rank_of_environment() > 0:
        return
    if html is not None:
        write_text(
            html,
            sensitivity_html(
                {key: value for key, value in result.items() if key not in OF_THE_RUN}
            ),
        )
    if recipe_out is not None:
        from quantkit.schemes.mixed_recipe import recipe_text

        write_text(
            recipe_out,
            recipe_text(solution_recipe(result, Checkpoint.open(path)), _recipe_comments(result)),
        )
    if result.get("was_finished"):
        out.note(f"{output} was finished already, by the same work; nothing was run")
    if out.as_json:
        print_json(result)
    else:
        shown = None if out.verbose else SHOWN
        title = (
            ""
            if shown is None or len(result["sets"]) <= shown
            else f"; {shown} of {len(result['sets'])} sets (all with -v)"
        )
        print_table(
            SET_COLUMNS,
            set_rows(result, shown),
            sensitivity_title(result) + title,
            right=(0, 2, 3, 4, 5, 6, 7, 8, 9),
        )
        print_table(
            LINE_COLUMNS,
            line_rows(result),
            "the worst sets given something else",
            right=(2, 3, 4, 5),
        )
    for remark in sensitivity_remarks(result):
        out.note(remark)
    if recipe_out is not None:
        # What algorithms choose is chosen for one recipe, so it takes another calibration.
        walk = (
            "quantize"
            if Recipe.from_mapping(result["recipe"], "recipe").needs_calibration
            else "export"
        )
        out.note(
            f"Next: quantkit {walk} {shlex.quote(model)} -o OUT --recipe"
            f" {shlex.quote(str(recipe_out))}"
        )
    elif not has_budget:
        again = shlex.quote(str(output)) if output else "RESULT.json (written with -o)"
        out.note(
            f"Next: quantkit sensitivity {shlex.quote(model)} --from {again} --max-size +5%"
            " --recipe-out FILE.yaml"
        )


def _sensitivity(
    out: Output,
    model: Path,
    scheme: str | None,
    recipe: Path | None,
    alternatives: tuple[str, ...],
    max_size: str | None,
    max_kld: float | None,
    scoring: dict[str, Any],
) -> dict[str, Any]:
    from quantkit.cli.tables import Progress
    from quantkit.sensitivity.options import SensitivityOptions
    from quantkit.sensitivity.score import score_sensitivity

    chosen = recipe_of_options(scheme, recipe)
    options = SensitivityOptions(
        model, chosen, alternatives, max_size=max_size, max_kld=max_kld, **scoring
    )
    with Progress("sensitivity", out.quiet) as progress:
        return score_sensitivity(
            options, lambda name, done, total: progress.update(done, total, f"sensitivity, {name}")
        )


def _sensitivity_anew(
    earlier: Path,
    model: Path,
    scheme: str | None,
    recipe: Path | None,
    max_size: str | None,
    max_kld: float | None,
    alternatives: tuple[str, ...],
) -> dict[str, Any]:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.sensitivity.advice import opened_result, solved_anew

    if scheme is not None or recipe is not None:
        raise click.UsageError(
            "--from has its recipe from the earlier run; leave out --scheme and --recipe"
        )
    return solved_anew(
        opened_result(earlier, Checkpoint.open(model)), max_size, max_kld, alternatives
    )


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
            f" {len(result['sets'])} sets take another choice than the recipe's."
        ),
        (
            f"{format_bytes(solution['bytes'])} of weights, predicted KL"
            f" {solution['kld_predicted']:.4f} on {result['tokens_scored']} tokens."
        ),
    ]
