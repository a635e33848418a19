"""The options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS
from quantkit.cli.console import one_line
from quantkit.errors import QuantkitError
from quantkit.schemes.serving import RUNTIMES

# What `bench` measures.
BENCHMARK_KINDS = ("int8", "fp8", "weight-only", "bf16", "convert")


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
        return Path(super().convert(value, param, context)).expanduser()


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
            raise click.UsageError(
                f"{param.opts[0]} must be more than 0; write for example 5GB or 500MB", context
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
    help="Directory to write; appears when it is whole.",
)


def different_sources(
    _context: click.Context, _param: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    """The sources of --data, each of them once: a text that is given twice would count twice."""
    seen: set[str] = set()
    for name in names:
        source = name if name.startswith("dataset:") else os.path.realpath(os.path.expanduser(name))
        if source in seen:
            raise click.BadParameter(f"{one_line(name)} is given twice; name each source once")
        seen.add(source)
    return names


data_option = click.option(
    "--data",
    multiple=True,
    callback=different_sources,
    metavar="FILE",
    help=".txt, .jsonl (text or messages), .parquet, or dataset:NAME[:CONFIG[:SPLIT]].",
)
device_option = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu or cuda."
)
remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that lies in the checkpoint."
)
resume_options = options(
    click.option("--resume", is_flag=True, help="Continue an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace what is at the output."),
)
calibration_options = options(
    click.option(
        "--num-samples",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Windows of text.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        help="Tokens per window.  [default: 2048, or the model's positions]",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        help="Windows at a time.  [default: about 1024 tokens on a CPU, 8192 on a GPU]",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of the choice of windows."
    ),
    click.option(
        "--memory",
        type=Size(),
        help=(
            "What hidden states may hold, e.g. 8GB, before they go to a file.  [default: half of"
            " what is free]"
        ),
    ),
    click.option(
        "--all-experts",
        is_flag=True,
        help="Show every token to every expert; slower, and no expert starves.",
    ),
    device_option,
    remote_code_option,
)
recipe_options = options(
    click.option("--scheme", help="One of those that `quantkit schemes` lists."),
    click.option("--recipe", type=UserPath(), help="YAML file: a scheme with exceptions."),
)
export_options = options(
    click.option(
        "--calibration", type=UserPath(), metavar="CALIB", help="Statistics for static scales."
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Leave these Linears: a name, a glob, or re:REGEX.",
    ),
    click.option(
        "--observer",
        metavar="NAME",
        help=(
            "How static scales follow from statistics: absmax, percentile[:P], mse.  [default: the"
            " recipe's, or absmax]"
        ),
    ),
    click.option(
        "--kv-cache", type=click.Choice(["fp8"]), help="Write scales for a quantized KV cache."
    ),
    click.option(
        "--runtime", type=click.Choice(RUNTIMES), help="Refuse what this runtime can't load."
    ),
    click.option(
        "--format",
        "file_format",
        type=click.Choice(list(FORMATS)),
        default=DEFAULT_FORMAT,
        show_default=True,
        help="Layout of the files.",
    ),
    click.option(
        "--max-shard-size",
        type=Size(),
        default="5GB",
        show_default=True,
        help="Start a new file beyond this size.",
    ),
    click.option(
        "--allow-unreached",
        is_flag=True,
        help=(
            "Leave parameters that should be quantized but can't be, instead of refusing the model."
        ),
    ),
    click.option(
        "--dry-run", is_flag=True, help="Print what would become of every parameter; write nothing."
    ),
)


def recipe_of_options(
    scheme: str | None,
    recipe: Path | None,
    ignore: tuple[str, ...] = (),
    kv_cache: str | None = None,
    observer: str | None = None,
) -> Any:
    """The recipe that --scheme or --recipe names, with what other options add."""
    from quantkit.schemes.recipe import Recipe
    from quantkit.schemes.scheme import QuantScheme

    if (scheme is None) == (recipe is None):
        raise click.UsageError(
            "give either --scheme or --recipe; `quantkit schemes` lists the schemes"
        )
    chosen = Recipe.load(recipe) if recipe is not None else Recipe(QuantScheme.parse(scheme))
    return chosen.with_options(ignore, kv_cache, observer)
