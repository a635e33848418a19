"""The options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS
from quantkit.cli.option_names import one_line
from quantkit.errors import QuantkitError
from quantkit.schemes.serving import RUNTIMES

if TYPE_CHECKING:
    from quantkit.schemes.recipe import Recipe


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class UserPath(click.Path):
    """A path as the shell would have it: `~` is the home directory also in --option=~/x."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Path:
        return Path(os.fsdecode(super().convert(value, param, context))).expanduser()


class Size(click.ParamType):
    """A number of bytes, one at least, written as 8GB."""

    name = "size"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        from quantkit.checkpoint.units import parse_bytes

        try:
            count = parse_bytes(value)
        except QuantkitError as error:
            self.fail(one_line(str(error)), param, context)
        if not count:
            option = param.opts[0] if param else self.name
            raise click.UsageError(
                f"{option} must be more than 0; write for example 5GB or 500MB", context
            )
        return count


class Shape(click.ParamType):
    """Input and output features, written as 4096x14336."""

    name = "KxN"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", value)
        if not match or not int(match[1]) or not int(match[2]):
            self.fail(
                f"'{one_line(value)}' is no shape; write for example 4096x14336", param, context
            )
        return int(match[1]), int(match[2])


class Device(click.ParamType):
    """Where torch computes."""

    name = "text"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> str:
        if not re.fullmatch(r"auto|(cpu|cuda)(:\d{1,3})?", value):
            self.fail(
                f"unknown device '{one_line(value)}'; choose auto, cpu or cuda", param, context
            )
        return value


model_argument = click.argument("model")
directory_output = click.option(
    "-o",
    "--output",
    required=True,
    type=UserPath(),
    help="Directory to write. It appears only when it is complete.",
)


@dataclass(frozen=True)
class FileName:
    """The name of a file, as the user wrote it. The library takes a text without a path's type as
    the text itself if there is no such file.
    """

    name: str

    def __fspath__(self) -> str:
        return self.name


def different_sources(
    _context: click.Context, _param: click.Parameter, names: tuple[str, ...]
) -> tuple[FileName, ...]:
    """The sources of --data. Raises BadParameter where one is given twice: it would count twice."""
    from quantkit.data.sources import repeated_source

    twice = repeated_source(names)
    if twice is not None:
        raise click.BadParameter(f"{one_line(twice)} is given twice; name each source once")
    return tuple(FileName(name) for name in names)


data_option = click.option(
    "--data",
    multiple=True,
    callback=different_sources,
    metavar="FILE",
    help=".txt, .jsonl or .parquet (text, messages), or dataset:NAME[:CONFIG[:SPLIT]]; repeatable.",
)
device_option = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu or cuda[:N]."
)
remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code from the checkpoint."
)
resume_options = options(
    click.option("--resume", is_flag=True, help="Continue an interrupted run."),
    click.option(
        "--overwrite", is_flag=True, help="Replace an existing output, or an interrupted run."
    ),
)
calibration_options = options(
    click.option(
        "--num-samples",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Number of calibration windows.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        help="Tokens per window.  [default: 2048, or the model's positions if fewer]",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        help="Windows per batch.  [default: about 1024 tokens on a CPU, 8192 on a GPU]",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Seed for sampling calibration windows.",
    ),
    click.option(
        "--memory",
        type=Size(),
        help=(
            "Memory for hidden states, e.g. 8GB; what exceeds it is stored in a file.  [default:"
            " half of the free memory]"
        ),
    ),
    click.option(
        "--all-experts",
        is_flag=True,
        help="Run every token through every expert: slower, but no expert sees too few tokens.",
    ),
    device_option,
    remote_code_option,
)
recipe_options = options(
    click.option("--scheme", help="A scheme; `quantkit schemes` lists them."),
    click.option(
        "--recipe",
        type=UserPath(),
        help="YAML file: a scheme, other schemes for some layers, algorithms.",
    ),
)
export_options = options(
    click.option(
        "--calibration",
        type=UserPath(),
        metavar="CALIB",
        help="Output directory of `quantkit calibrate`, for static scales and algorithms.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Don't quantize these Linears: a name, a glob, or re:REGEX; repeatable.",
    ),
    click.option(
        "--observer",
        metavar="NAME",
        help=(
            "How static scales are computed from statistics: absmax, percentile[:P] or mse."
            "  [default: the recipe's, or absmax]"
        ),
    ),
    click.option(
        "--kv-cache", type=click.Choice(["fp8"]), help="Also write scales for a quantized KV cache."
    ),
    click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        help="Refuse the export if this runtime can't load it.",
    ),
    click.option(
        "--format",
        type=click.Choice(list(FORMATS)),
        default=DEFAULT_FORMAT,
        show_default=True,
        help="Checkpoint format.",
    ),
    click.option(
        "--max-shard-size",
        type=Size(),
        default="5GB",
        show_default=True,
        help="Maximum size of a weight file.",
    ),
    click.option(
        "--allow-unreached",
        is_flag=True,
        help=(
            "Skip parameters that should be quantized but can't be, instead of refusing the model."
        ),
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Print the plan for each parameter, without writing anything.",
    ),
)


def recipe_argument(arguments: dict[str, Any]) -> Recipe | Path:
    """Take --scheme and --recipe out of a command's arguments, as the library's `recipe`.

    Raises UsageError unless exactly one is given.
    """
    recipe = optional_recipe(arguments)
    if recipe is None:
        raise click.UsageError(_ONE_RECIPE)
    return recipe


def optional_recipe(arguments: dict[str, Any]) -> Recipe | Path | None:
    """As `recipe_argument`, but None if neither is given."""
    from quantkit.schemes.recipe import Recipe

    scheme, recipe = arguments.pop("scheme"), arguments.pop("recipe")
    if scheme is not None and recipe is not None:
        raise click.UsageError(_ONE_RECIPE)
    return Recipe(scheme) if scheme is not None else recipe


_ONE_RECIPE = "give either --scheme or --recipe; `quantkit schemes` lists the schemes"
