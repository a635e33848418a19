"""The library's messages in the words of the command line.

The library names parameters as Python does, in backticks. Here they get the names of the commands'
options:

    `seq_len`                        --seq-len
    `overwrite=True`                 --overwrite
    `cache=False`                    --no-cache
    `kv_cache='fp8'`                 --kv-cache fp8
    `quantkit.verify('OUT')`         `quantkit verify OUT`

The names are read from the commands themselves, so they can't differ from `--help`.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping

import click

from quantkit.schemes.scheme import SCHEMES

# Where a command's name or option isn't the name of the function or parameter.
_COMMANDS = {"evaluate": "eval"}
_PARAMETERS = {"check=False": "--no-judge", "check_tokens": "--judge-tokens"}


def as_command_line(text: str) -> str:
    """A message with options in place of the parameters in backticks. Outside of a command, where
    nothing has options, it stays as it is.
    """
    context = click.get_current_context(silent=True)
    if context is None or "`" not in text:
        return text
    names = known_names(context)
    return re.sub(r"`([^`]+)`", lambda found: _translated(found[1], names) or found[0], text)


def known_names(context: click.Context) -> dict[str, str]:
    """Parameter → option, or argument in upper case, of all commands. The command that runs comes
    first: `base` is an argument of `eval` and an option of `verify`.
    """
    root = context.find_root()
    commands = root.command.commands if isinstance(root.command, click.Group) else {}
    running = commands.get(root.invoked_subcommand or "", context.command)
    found = dict(_PARAMETERS)
    for command in (*commands.values(), running):
        found |= _names_of(command)
    return found


def _names_of(command: click.Command) -> dict[str, str]:
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            found[parameter.name or ""] = re.sub(r"\W", "", parameter.make_metavar(_CONTEXT))
            continue
        option, long = parameter.opts[0], parameter.opts[-1].removeprefix("--")
        found[parameter.name or ""] = option
        # Click's name differs where Python has another word for the value, such as a shorter one.
        found[long.replace("-", "_")] = option
        if long.startswith("no-"):
            found[f"{long[3:].replace('-', '_')}=False"] = option
    return found


_CONTEXT = click.Context(click.Command("quantkit"))


def _translated(text: str, names: Mapping[str, str]) -> str | None:
    """A parameter, with a value or without one, or a call, as an option or a command; None for any
    other text.
    """
    if text in names:
        return names[text]
    name, _, value = text.partition("=")
    if name in names and value:
        return _with_value(name, value, names)
    if text.startswith("quantkit."):
        command = _command_of(text, names)
        return None if command is None else f"`{command}`"
    return None


def _with_value(name: str, source: str, names: Mapping[str, str]) -> str | None:
    """An option with a value. source: the value in Python; None is returned if it isn't plain."""
    try:
        value = ast.literal_eval(source)
    except (SyntaxError, ValueError):
        return None
    if value is True:
        return names[name]
    if name == "recipe" and str(value).lower() in SCHEMES:
        name = "scheme"  # the library's `recipe` takes both
    return " ".join(f"{names[name]} {word}" for word in _words(value))


def _command_of(source: str, names: Mapping[str, str]) -> str | None:
    """The command for a call such as `quantkit.calibrate('MODEL', output='CALIB')`."""
    try:
        call = ast.parse(source, mode="eval").body
    except SyntaxError:
        return None
    if isinstance(call, ast.Attribute):  # a function without arguments
        return f"quantkit {_COMMANDS.get(call.attr, call.attr)}"
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return None
    words = ["quantkit", _COMMANDS.get(call.func.attr, call.func.attr)]
    for argument in call.args:
        words += _words(ast.literal_eval(argument))
    for keyword in call.keywords:
        option = names.get(f"{keyword.arg}={ast.unparse(keyword.value)}") or _with_value(
            keyword.arg or "", ast.unparse(keyword.value), names
        )
        words.append(option or "")
    return " ".join(words)


def _words(value: object) -> list[str]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [shlex.quote(str(each)) for each in values]


def one_line(text: str) -> str:
    """A message as one line without control characters.

    A message may quote names from a checkpoint that anyone made, and a terminal obeys escape
    sequences.
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )
