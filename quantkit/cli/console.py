"""What all commands share: the options --json, --quiet and --verbose, messages on stderr, and
errors as one line with an exit code.

Nothing here imports torch or transformers before a command runs.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, Protocol

import click

from quantkit.cli.option_names import as_command_line, one_line
from quantkit.cli.processes import is_first_of_torchrun
from quantkit.errors import Interrupted, QuantkitError, QuantkitWarning

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


# What the user can do about an error of the operating system.
_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a directory",
}


class ErrorGroup(click.Group):
    """Ends every command's errors as one line on stderr and an exit code.

    Exceptions that are neither quantkit's nor the operating system's are bugs, and keep their
    traceback.
    """

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except QuantkitError as error:
            _end(as_command_line(str(error)), error.exit_code)
        except KeyboardInterrupt:
            _end(f"interrupted; {_again(context)}", Interrupted.exit_code)
        except BrokenPipeError:
            sys.stderr.close()  # The reader of stdout has gone: nothing can be printed any more.
            raise click.exceptions.Exit(0) from None
        except OSError as error:
            if error.errno not in _ADVICE:
                raise
            where = f" ({error.filename})" if error.filename else ""
            _end(
                f"{error.strerror}{where}; {_ADVICE[error.errno]} and {_again(context)}",
                QuantkitError.exit_code,
            )


def _again(context: click.Context) -> str:
    """How to go on with the command that ran."""
    group = context.command
    name = context.invoked_subcommand or ""
    command = group.commands.get(name) if isinstance(group, click.Group) else None
    can_resume = command is not None and any(each.name == "resume" for each in command.params)
    needs = " (which needs -o)" if name == "sensitivity" else ""
    return f"run the command again{f' with --resume{needs}' if can_resume else ''}"


def _end(message: str, exit_code: int) -> NoReturn:
    """End the process with a message, unless that is empty."""
    if message:
        click.echo(f"Error: {one_line(message)}", err=True)
    raise click.exceptions.Exit(exit_code) from None


class Result(Protocol):
    """What the library's functions return."""

    def to_json(self) -> dict[str, Any]: ...


class Output:
    """A command's messages. They go to stderr, because stdout is for data.

    quiet: print only warnings and errors.
    verbose: print details, and let libraries print.
    as_json: print the result as JSON.
    """

    def __init__(self, quiet: bool, verbose: bool, as_json: bool) -> None:
        self.is_first = is_first_of_torchrun()
        self.quiet, self.verbose = quiet or not self.is_first, verbose
        self.as_json = as_json
        self._warned: set[str] = set()

    def note(self, text: str) -> None:
        """Print a message, unless quiet."""
        if not self.quiet:
            click.echo(as_command_line(text), err=True)

    def warn(self, text: str) -> None:
        """Print a warning, but each text only once."""
        if text in self._warned:
            return
        self._warned.add(text)
        click.echo(f"Warning: {one_line(as_command_line(text))}", err=True)

    def json(self, result: Result) -> None:
        """Print a result as JSON on stdout, if --json is given."""
        if self.as_json and self.is_first:
            from quantkit.cli.tables import print_json

            print_json(result.to_json())

    @contextmanager
    def run(
        self,
        name: str,
        device: str | None = None,
        uses_transformers: bool = True,
        stops: bool = True,
    ) -> Iterator[dict[str, Any]]:
        """What a command gives a function of the library: a progress bar, and signals that stop it.

        name: what the bar shows first.
        device: where a command computes whose work torchrun's processes can share, else None.
        uses_transformers: whether its messages must be silenced; importing it takes a second.
        stops: whether a signal stops the function between two steps, so that finished work is kept;
            else it ends the process at once.
        """
        from quantkit.cli.interrupts import stop_on_signals
        from quantkit.cli.processes import process_group
        from quantkit.cli.tables import Progress

        if uses_transformers:
            self.quiet_libraries()
        with (
            process_group(device) if device is not None else nullcontext(),
            Progress(name, self.quiet) as progress,
            stop_on_signals() as should_stop,
        ):
            yield {"progress": progress} | ({"should_stop": should_stop} if stops else {})

    @contextmanager
    def library_messages(self) -> Iterator[None]:
        """Print the library's steps and warnings as they come."""
        import logging
        import warnings

        logger, handler = logging.getLogger("quantkit"), logging.Handler()
        handler.emit = lambda record: self.note(record.getMessage())  # type: ignore[method-assign]
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        with warnings.catch_warnings():
            show = warnings.showwarning

            def show_or_warn(message: Any, category: Any, *others: Any, **named: Any) -> None:
                if issubclass(category, QuantkitWarning):
                    self.warn(str(message))
                else:
                    show(message, category, *others, **named)

            warnings.simplefilter("always", QuantkitWarning)
            warnings.showwarning = show_or_warn
            try:
                yield
            finally:
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = propagate

    def quiet_libraries(self) -> None:
        """Switch off the progress bars and warnings of transformers and the hub, unless verbose."""
        if self.verbose:
            return
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        import warnings

        import transformers

        warnings.filterwarnings("ignore", module="(torch|transformers|huggingface_hub)")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function, and add the options of all commands.

    The function's first argument is an Output.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(quiet: bool, verbose: bool, as_json: bool, **arguments: Any) -> None:
            out = Output(quiet, verbose, as_json)
            with out.library_messages():
                function(out, **arguments)

        made = click.command(name, context_settings=CONTEXT)(run)
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
            click.Option(
                ["-q", "--quiet"], is_flag=True, help="Print only the result, warnings and errors."
            ),
            click.Option(
                ["-v", "--verbose"], is_flag=True, help="Print details and libraries' messages."
            ),
        ]
        return made

    return decorate
