"""How commands speak: data on stdout, all else on stderr, a refusal as one line with its exit code, and the options that several commands share.

Nothing here imports torch or transformers before a command runs.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quantkit.errors import Interrupted, QuantkitError

RUNTIME_NAMES = ("vllm", "sglang", "tensorrt-llm", "transformers")
FORMAT_NAMES = ("compressed-tensors", "fp8", "modelopt")
PROTOCOL_NAMES = ("gptq", "llamacpp", "lmeval")
HARDWARE_NAMES = ("blackwell", "hopper", "ada", "ampere", "turing", "cpu")
BENCHMARK_KINDS = ("int8", "fp8", "weight-only", "bf16", "convert")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def one_line(text: str) -> str:
    """A message as one line without control characters: names in a checkpoint are its publisher's, and a terminal obeys escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


class _Refusal(click.ClickException):
    """A QuantkitError on its way to stderr and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: Any = None) -> None:
        if not self.message:
            return
        click.echo(f"Error: {one_line(self.format_message())}", file=file, err=file is None)


class ErrorGroup(click.Group):
    """Turns quantkit's errors into one line and an exit code, in this one place. Other exceptions are bugs and keep their traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except QuantkitError as error:
            raise _Refusal(str(error), error.exit_code) from None
        except KeyboardInterrupt:
            raise _Refusal("interrupted; run the same command again, with --resume if it has one", Interrupted.exit_code) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader of stdout has gone; nothing is left to say
            raise click.exceptions.Exit(0) from None
        except OSError as error:
            reasons = {
                errno.ENOSPC: "make room",
                errno.EDQUOT: "make room",
                errno.EROFS: "choose another place",
                errno.EACCES: "choose another place or mend its permissions",
                errno.ENAMETOOLONG: "choose a shorter name",
                errno.EISDIR: "give a file",
                errno.ENOTDIR: "give a directory",
            }
            if error.errno not in reasons:
                raise
            where = f" ({error.filename})" if error.filename else ""
            raise _Refusal(f"{error.strerror}{where}; {reasons[error.errno]} and run the command again, with --resume if it has one", 1) from None


class Output:
    """What a command says: data on stdout, everything else on stderr."""

    def __init__(self, quiet: bool, verbose: bool, as_json: bool) -> None:
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        self._warned: set[str] = set()

    def note(self, text: str) -> None:
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """Once: `quantize` finds the same in its plan and in its result."""
        if text in self._warned:
            return
        self._warned.add(text)
        click.echo(f"Warning: {one_line(text)}", err=True)

    def quiet_libraries(self) -> None:
        """transformers and the hub report with their own bars and warnings; -v lets them."""
        if self.verbose:
            return
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        import warnings

        import transformers

        warnings.filterwarnings("ignore", module="(torch|transformers|huggingface_hub)")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command with the options that all share; its function gets an Output first."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(quiet: bool, verbose: bool, as_json: bool, **arguments: Any) -> None:
            function(Output(quiet, verbose, as_json), **arguments)

        run = click.option("-v", "--verbose", is_flag=True, help="Say more; let libraries log.")(run)
        run = click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")(run)
        run = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")(run)
        # The shared options come last in each help text.
        run.__click_params__ = run.__click_params__[-3:] + run.__click_params__[:-3]
        return click.command(name, context_settings=CONTEXT)(run)

    return decorate


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class UserPath(click.Path):
    """A path as the shell would have it: `~` is the home directory also in --option=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        return Path(super().convert(value, param, context)).expanduser()


class Size(click.ParamType):
    """A number of bytes, one at least, written as 8GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        from quantkit.output import parse_bytes

        try:
            count = parse_bytes(value)
        except QuantkitError as error:
            self.fail(one_line(str(error)), param, context)
        if not count:
            raise click.UsageError(f"{param.opts[0]} must be more than 0; write for example 5GB or 500MB", context)
        return count


class Shape(click.ParamType):
    """Input and output features, written as 4096x14336."""

    name = "KxN"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", value)
        if not match or not int(match[1]) or not int(match[2]):
            self.fail(f"'{one_line(value)}' is no shape; write for example 4096x14336", param, context)
        return int(match[1]), int(match[2])


class Device(click.ParamType):
    """Where torch computes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        if not re.fullmatch(r"auto|(cpu|cuda)(:\d{1,3})?", value):
            self.fail(f"unknown device '{one_line(value)}'; choose auto, cpu or cuda", param, context)
        return value


model_argument = click.argument("model")
directory_output = click.option("-o", "--output", required=True, type=UserPath(), help="Directory to write; appears when it is whole.")


def different_sources(_context: click.Context, _param: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """The sources of --data, each of them once: a text that is given twice would count twice."""
    seen: set[str] = set()
    for name in names:
        source = name if name.startswith("dataset:") else os.path.realpath(os.path.expanduser(name))
        if source in seen:
            raise click.BadParameter(f"{one_line(name)} is given twice; name each source once")
        seen.add(source)
    return names


data_option = click.option(
    "--data", multiple=True, callback=different_sources, metavar="FILE", help=".txt, .jsonl (text or messages), .parquet, or dataset:NAME[:CONFIG[:SPLIT]]."
)
device_option = click.option("--device", type=Device(), default="auto", show_default=True, help="auto, cpu or cuda.")
remote_code_option = click.option("--trust-remote-code", is_flag=True, help="Run Python code that lies in the checkpoint.")
resume_options = options(
    click.option("--resume", is_flag=True, help="Continue an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace what is at the output."),
)
calibration_options = options(
    click.option("--num-samples", type=click.IntRange(1), default=128, show_default=True, help="Windows of text."),
    click.option("--seq-len", type=click.IntRange(2), help="Tokens per window.  [default: 2048, or the model's positions]"),
    click.option("--batch-size", type=click.IntRange(1), help="Windows at a time.  [default: about 1024 tokens on a CPU, 8192 on a GPU]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of windows."),
    click.option("--memory", type=Size(), help="What hidden states may hold, e.g. 8GB, before they go to a file.  [default: half of what is free]"),
    click.option("--all-experts", is_flag=True, help="Show every token to every expert; slower, and no expert starves."),
    device_option,
    remote_code_option,
)
recipe_options = options(
    click.option("--scheme", help="One of those that `quantkit schemes` lists."),
    click.option("--recipe", type=UserPath(), help="YAML file: a scheme with exceptions."),
)
export_options = options(
    click.option("--calibration", type=UserPath(), metavar="CALIB", help="Statistics for static scales."),
    click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave these Linears: a name, a glob, or re:REGEX."),
    click.option(
        "--observer", metavar="NAME", help="How static scales follow from statistics: absmax, percentile[:P], mse.  [default: the recipe's, or absmax]"
    ),
    click.option("--kv-cache", type=click.Choice(["fp8"]), help="Write scales for a quantized KV cache."),
    click.option("--runtime", type=click.Choice(RUNTIME_NAMES), help="Refuse what this runtime can't load."),
    click.option("--format", "layout", type=click.Choice(FORMAT_NAMES), default="compressed-tensors", show_default=True, help="Layout of the files."),
    click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Start a new file beyond this size."),
    click.option("--allow-unreached", is_flag=True, help="Leave parameters that should be quantized but can't be, instead of refusing the model."),
    click.option("--dry-run", is_flag=True, help="Print what would become of every parameter; write nothing."),
)
