"""Which module feeds which inside a block, found by running it and not by a table of architectures.

A Linear is fed by a norm if it is given the very tensor that the norm returned. Linears that are
given the same tensor share their input (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from quantkit.models.hooks import capture


@dataclass
class KnownTensors:
    """Names of tensors that were seen while a model ran, found again by where a tensor is in
    memory.
    """

    _names: dict[tuple[int, int], str] = field(default_factory=dict)
    # While they live, no other tensor gets their address.
    _alive: list[Tensor] = field(default_factory=list)

    def remember(self, name: str, tensor: Any) -> None:
        """The last name counts. What is no tensor is ignored."""
        if isinstance(tensor, Tensor):
            self._names[tensor.data_ptr(), tensor.numel()] = name
            self._alive.append(tensor)

    def name_of(self, tensor: Tensor) -> str | None:
        return self._names.get((tensor.data_ptr(), tensor.numel()))


@dataclass(frozen=True)
class Trace:
    """How one forward of a block went. All names are paths inside the block.

    order: the Linears that ran, in the order of their first calls.
    shared_inputs: the same Linears; those that were given one tensor stand together.
    norm_of: Linear → the norm that returned its input, where one did.
    """

    order: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    norm_of: Mapping[str, str]


def trace(block: nn.Module, run: Callable[[], Any]) -> Trace:
    """Run a block once and trace its nn.Linear modules. run: calls the block."""
    modules = dict(block.named_modules())
    linears = {path: each for path, each in modules.items() if isinstance(each, nn.Linear)}
    norms = {path: each for path, each in modules.items() if is_scaled_by_vector(each)}
    inputs, outputs = KnownTensors(), KnownTensors()
    groups: dict[str, list[str]] = {}  # by their first Linear
    order: dict[str, None] = {}
    norm_of: dict[str, str] = {}

    def arrive(path: str, tensor: Tensor) -> None:
        if path not in order:
            first = inputs.name_of(tensor)
            if first is None:
                inputs.remember(path, tensor)
            groups.setdefault(first or path, []).append(path)
            order[path] = None
        norm = outputs.name_of(tensor)
        # A norm of each head by itself has a weight for the head's channels only.
        if norm is not None and norms[norm].weight.numel() == linears[path].in_features:
            norm_of[path] = norm

    with capture(linears, before=arrive), capture(norms, after=outputs.remember):
        run()
    return Trace(tuple(order), tuple(map(tuple, groups.values())), norm_of)


def is_scaled_by_vector(module: nn.Module) -> bool:
    """Whether all parameters of a module are one vector of weights, and maybe a bias: most likely
    a norm.
    """
    parameters = dict(module.named_parameters())
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(
        parameter.dim() == 1 for parameter in parameters.values()
    )
