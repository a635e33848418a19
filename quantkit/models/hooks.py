"""Forward hooks on modules of a block for as long as a context lasts: see or change what they are
given and return, and end a forward early.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

# (a module's name, its input)
Before = Callable[[str, Tensor], None]
# (a module's name, its output) → what takes the output's place, or None to leave it
After = Callable[[str, Any], Any]


class EnoughSeen(Exception):
    """A hook raises it to end a forward whose rest nobody needs; the caller suppresses it."""


@contextmanager
def capture(
    modules: Mapping[str, nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call before(name, input) and after(name, output) whenever one of these modules runs, in any
    thread. input: the module's first argument.
    """
    with ExitStack() as hooks:
        for name, module in modules.items():
            if before is not None:
                hooks.callback(module.register_forward_pre_hook(_pre_hook(name, before)).remove)
            if after is not None:
                hooks.callback(module.register_forward_hook(_post_hook(name, after)).remove)
        yield


def _pre_hook(name: str, before: Before) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        before(name, arguments[0])

    return hook


def _post_hook(name: str, after: After) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        return after(name, output)

    return hook


@contextmanager
def capture_inputs(
    modules: Mapping[str, nn.Module],
) -> Iterator[Callable[[Callable[[], Any]], dict[str, Tensor]]]:
    """A function that runs its argument until every module was called, and returns each module's
    input as rows [rows, features]. A module that the forward doesn't call is absent. Several
    threads may call it at once.
    """
    here = threading.local()

    def keep(name: str, inputs: Tensor) -> None:
        here.seen[name] = inputs.reshape(-1, inputs.shape[-1])
        if len(here.seen) == len(modules):
            raise EnoughSeen

    def inputs_of(run: Callable[[], Any]) -> dict[str, Tensor]:
        here.seen = {}
        with suppress(EnoughSeen):
            run()
        return dict(here.seen)

    with capture(modules, before=keep):
        yield inputs_of
