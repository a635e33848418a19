"""Tracing which module's output feeds which Linear inside a block, by running it instead of using a
table of architectures.

A norm feeds a Linear if the Linear is given the very tensor that the norm returned. Linears that
are given the same tensor share their input (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quantkit.models.hooks import capture


@dataclass
class KnownTensors:
    """Names of tensors seen during a forward, looked up by a tensor's address and size."""

    _names: dict[tuple[int, int], str] = field(default_factory=dict)
    # Keeps the tensors alive, so that no other tensor gets their address.
    _alive: list[Tensor] = field(default_factory=list)

    def remember(self, name: str, tensor: Any) -> None:
        """Store a tensor's name; a later name replaces it. Anything but a tensor is ignored."""
        if isinstance(tensor, Tensor):
            self._names[tensor.data_ptr(), tensor.numel()] = name
            self._alive.append(tensor)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a remembered tensor, or None."""
        return self._names.get((tensor.data_ptr(), tensor.numel()))


@dataclass(frozen=True)
class Trace:
    """The dataflow in one forward of a block. All names are paths inside the block.

    order: the Linears that ran, in the order of their first calls.
    shared_inputs: the same Linears, grouped by shared input tensor.
    norm_of: Linear → the norm that returned its input, if a norm did.
    """

    order: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    norm_of: Mapping[str, str]


def trace(block: nn.Module, run: Callable[[], Any]) -> Trace:
    """Run a block once and trace its nn.Linear modules.

    run: calls the block.
    """
    modules = dict(block.named_modules())
    linears = {path: each for path, each in modules.items() if isinstance(each, nn.Linear)}
    norms = {path: each for path, each in modules.items() if is_scaled_by_vector(each)}
    inputs, outputs = KnownTensors(), KnownTensors()
    groups: dict[str, list[str]] = {}  # by their first Linear
    order: dict[str, None] = {}
    norm_of: dict[str, str] = {}

    def arrive(path: str, tensor: Tensor) -> None:
        if not tensor.numel():
            return  # empty tensors share an address without sharing anything
        if path not in order:
            first = inputs.name_of(tensor)
            if first is None:
                inputs.remember(path, tensor)
            groups.setdefault(first or path, []).append(path)
            order[path] = None
        norm = outputs.name_of(tensor)
        # A norm of single heads has a weight for one head's channels only.
        if norm is not None and norms[norm].weight.numel() == linears[path].in_features:
            norm_of[path] = norm

    with capture(linears, before=arrive), capture(norms, after=outputs.remember):
        run()
    return Trace(tuple(order), tuple(map(tuple, groups.values())), norm_of)


def is_scaled_by_vector(module: nn.Module) -> bool:
    """Whether a module's only parameters are a weight vector and possibly a bias; such a module is
    most likely a norm.
    """
    parameters = dict(module.named_parameters())
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(
        parameter.dim() == 1 for parameter in parameters.values()
    )
