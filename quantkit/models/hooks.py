"""Forward hooks on modules of a block, installed while a context lasts: observe or replace inputs
and outputs, and end a forward early.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

# (module's name, its input) → None
Before = Callable[[str, Tensor], None]
# (module's name, its output) → a replacement of the output, or None to keep it
After = Callable[[str, Any], Any]


class EnoughSeen(Exception):
    """Raised by a hook to end a forward whose rest isn't needed. The caller suppresses it."""


@contextmanager
def capture(
    modules: Mapping[str, nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call `before(name, input)` and `after(name, output)` whenever one of the modules runs, in any
    thread.

    modules: name → module. The input is the module's first argument.
    before, after: see Before and After; None installs no such hook.
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
    """Hook modules, and yield a function that captures their inputs.

    The function calls its argument, which runs a forward, until every module was called. It returns
    module name → input, as rows [rows, features]. Modules that weren't called are missing. Several
    threads may call the function at once.
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
