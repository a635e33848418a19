"""`quantkit sensitivity`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import Output, command
from quantkit.cli.evaluate import require_places
from quantkit.cli.options import (
    UserPath,
    data_option,
    device_option,
    model_argument,
    recipe_argument,
    recipe_options,
    remote_code_option,
)

if TYPE_CHECKING:
    from quantkit.layer_sensitivity.result import Sensitivity


@command("sensitivity")
@model_argument
@recipe_options
@click.option(
    "--calibration",
    type=UserPath(),
    metavar="CALIB",
    help="Output directory of `quantkit calibrate`, for static scales and algorithms.",
)
@data_option
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Number of tokens to evaluate each variant of MODEL on.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    help="Tokens per window.  [default: 256 (masked LMs: 64), or the model's positions if fewer]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for sampling windows.")
@click.option(
    "--alternative",
    "alternatives",
    multiple=True,
    metavar="SCHEME",
    help="What a layer group may get instead of the recipe's scheme: keep (its stored dtype), or"
    " another scheme. Repeatable.  [default: keep]",
)
@click.option(
    "--max-size",
    metavar="SIZE",
    help=(
        "Find the smallest KL within this size: 150MB, 65% (of MODEL), or +5% (more than with"
        " all layer groups quantized)."
    ),
)
@click.option(
    "--max-kld", type=float, metavar="NATS", help="Find the smallest size within this mean KL."
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
    help="Write the recipe that meets --max-size or --max-kld, for export and quantize.",
)
@click.option(
    "--from",
    "earlier",
    type=UserPath(dir_okay=False),
    metavar="RESULT.json",
    help="Use an earlier result (-o) for another --max-size or --max-kld, without running MODEL.",
)
@device_option
@remote_code_option
@click.option("--resume", is_flag=True, help="Continue an interrupted run; needs the same -o.")
@click.option("--overwrite", is_flag=True, help="Discard an interrupted run, and start again.")
def sensitivity_command(out: Output, model: str, **arguments: Any) -> None:
    """Rank the Linears of MODEL by the loss from quantizing them, and fit a recipe to a budget.

    Linears that runtimes fuse (q/k/v, gate/up, all experts of a layer) are one layer group. Each
    group is quantized alone, and compared with MODEL on --data or on a short text that comes with
    quantkit. The KL of several groups is predicted as the sum of theirs; sensitivity also measures
    how good this prediction is. With --max-size or --max-kld, it finds the optimal choice for each
    group under this prediction. Several processes can share the windows:
    torchrun --nproc-per-node N -m quantkit sensitivity ...
    """
    earlier: Path | None = arguments.pop("earlier")
    has_budget = arguments["max_size"] is not None or arguments["max_kld"] is not None
    recipe_out: Path | None = arguments.pop("recipe_out")
    files = SensitivityFiles(arguments["output"], arguments.pop("html"), recipe_out)
    _check_usage(arguments, earlier, recipe_out, has_budget)
    files.check()
    result = _score(out, model, arguments) if earlier is None else _solve(model, earlier, arguments)
    if not out.is_first:
        return
    files.write(result, model)
    if result.was_finished:
        out.note(f"{files.output} was already complete; nothing was run")
    _print_result(out, result)
    _print_next(out, model, result, files, has_budget)


@dataclass(frozen=True)
class SensitivityFiles:
    """The files that `sensitivity` writes: the result as JSON, as a page, and the recipe."""

    output: Path | None
    html: Path | None
    recipe_out: Path | None

    def check(self) -> None:
        """Refuse, before anything runs, what can't be written."""
        require_places(output=self.output, html=self.html, recipe_out=self.recipe_out)

    def write(self, result: Sensitivity, model: str) -> None:
        """The page and the recipe; the JSON is written when its run ends."""
        from quantkit.checkpoint.files import write_text
        from quantkit.checkpoint.hub import resolve_model
        from quantkit.schemes.mixed_recipe import recipe_text

        if self.html is not None:
            write_text(self.html, result.as_stored().to_html())
        if self.recipe_out is not None:
            text = recipe_text(result.recipe(resolve_model(model)), _recipe_comments(result))
            write_text(self.recipe_out, text)


def _check_usage(
    arguments: Mapping[str, Any], earlier: Path | None, recipe_out: Path | None, has_budget: bool
) -> None:
    """Raises UsageError for options that don't go together."""
    if recipe_out is not None and not has_budget:
        raise click.UsageError(
            "--recipe-out writes the recipe for a budget; give --max-size or --max-kld"
        )
    if arguments["resume"] and (arguments["output"] is None or earlier is not None):
        raise click.UsageError(
            "--resume continues a run that was interrupted: give the same -o FILE as before, and"
            " not --from, which runs nothing"
        )


def _score(out: Output, model: str, arguments: dict[str, Any]) -> Sensitivity:
    from quantkit.api.sensitivity import sensitivity

    recipe = recipe_argument(arguments)
    output = arguments["output"]
    keeps = output is not None and not _is_device(output)
    with out.run("sensitivity", arguments["device"], stops=keeps) as run:
        return sensitivity(model, recipe, **arguments, **run)


def _is_device(output: Path) -> bool:
    return output.exists() and not output.is_file()


def _solve(model: str, earlier: Path, arguments: Mapping[str, Any]) -> Sensitivity:
    """An earlier run's result with another budget's solution, written to -o if that is given."""
    from quantkit.checkpoint.files import write_json
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.layer_sensitivity.advice import read_earlier_result

    if arguments["scheme"] is not None or arguments["recipe"] is not None:
        raise click.UsageError(
            "--from takes the recipe of the earlier run; leave out --scheme and --recipe"
        )
    known = read_earlier_result(earlier, Checkpoint.open(resolve_model(model)))
    budget = {name: arguments[name] for name in ("max_size", "max_kld", "alternatives")}
    result = known.solve(**budget)
    if arguments["output"] is not None:
        write_json(arguments["output"], result.to_json())
    return result


def _print_next(
    out: Output, model: str, result: Sensitivity, files: SensitivityFiles, has_budget: bool
) -> None:
    if files.recipe_out is not None:
        # The new recipe needs a calibration of its own if the old one needed one.
        command_name = "quantize" if result.base_recipe.needs_calibration else "export"
        out.note(
            f"Next: quantkit {command_name} {shlex.quote(model)} -o OUT --recipe"
            f" {shlex.quote(str(files.recipe_out))}"
        )
    elif not has_budget:
        stored = shlex.quote(str(files.output)) if files.output else "RESULT.json (written with -o)"
        out.note(
            f"Next: quantkit sensitivity {shlex.quote(model)} --from {stored} --max-size +5%"
            " --recipe-out FILE.yaml"
        )


def _print_result(out: Output, result: Sensitivity) -> None:
    from quantkit.cli.tables import print_table
    from quantkit.layer_sensitivity.report import (
        GROUP_COLUMNS,
        LINE_COLUMNS,
        SHOWN,
        group_rows,
        line_rows,
        sensitivity_remarks,
        sensitivity_title,
    )

    out.json(result)
    if not out.as_json:
        shown, total = None if out.verbose else SHOWN, len(result.order)
        more = "" if shown is None or total <= shown else f"; {shown} of {total} (all with -v)"
        print_table(
            GROUP_COLUMNS,
            group_rows(result, shown),
            sensitivity_title(result) + more,
            right=tuple(number for number in range(len(GROUP_COLUMNS)) if number != 1),
            important=(1, 2, 3),
            whole_with="-o FILE",
            verbose=out.verbose,
        )
        print_table(
            LINE_COLUMNS,
            line_rows(result),
            "the worst layer groups with another scheme, or in their stored dtype",
            right=(2, 3, 4, 5),
            whole_with="-o FILE",
            verbose=out.verbose,
        )
    for remark in sensitivity_remarks(result):
        out.note(remark)


def _recipe_comments(result: Sensitivity) -> list[str]:
    """What a reader of the written recipe should know."""
    from quantkit.checkpoint.units import format_bytes

    solution = result.solution
    assert solution is not None  # of the budget that --recipe-out needs
    budget = " and ".join(
        f"--max-{what} {value}"
        for what, value in (("size", solution.max_size), ("kld", solution.max_kld))
        if value is not None
    )
    return [
        (
            f"Written by quantkit sensitivity for {budget}: {solution.moved} of"
            f" {len(result.order)} layer groups differ from the original recipe."
        ),
        (
            f"{format_bytes(solution.bytes)} of weights, predicted KL"
            f" {solution.kld_predicted:.4f} on {result.tokens_scored} tokens."
        ),
    ]
