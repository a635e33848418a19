"""How commands speak: data on stdout, all else on stderr, a refusal as one line with its exit code,
and the options that several commands share.

Nothing here imports torch or transformers before a command runs.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from quantkit.errors import Interrupted, QuantkitError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def one_line(text: str) -> str:
    """A message as one line without control characters: names in a checkpoint are its publisher's,
    and a terminal obeys escapes.
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


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
    """Turns quantkit's errors into one line and an exit code, in this one place. Other exceptions
    are bugs and keep their traceback.
    """

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except QuantkitError as error:
            raise _Refusal(str(error), error.exit_code) from None
        except KeyboardInterrupt:
            raise _Refusal(
                "interrupted; run the same command again, with --resume if it has one",
                Interrupted.exit_code,
            ) from None
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
            raise _Refusal(
                f"{error.strerror}{where}; {reasons[error.errno]} and run the command again, with"
                " --resume if it has one",
                1,
            ) from None


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

        run = click.option("-v", "--verbose", is_flag=True, help="Say more; let libraries log.")(
            run
        )
        run = click.option(
            "-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."
        )(run)
        run = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")(
            run
        )
        # The shared options come last in each help text.
        run.__click_params__ = run.__click_params__[-3:] + run.__click_params__[:-3]
        return click.command(name, context_settings=CONTEXT)(run)

    return decorate
