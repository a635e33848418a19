"""Stacked experts, which transformers keeps in 3-D tensors for each layer: their forward, and how
it is replaced in a model.

transformers selects the forward of most by name (`experts_implementation`). A few modules have a
forward of their own. It is replaced if it computes the same as the others on random numbers.
An example is Llama 4: its experts receive every token once for each expert, multiplied by the
router's score. The score is 0 where the router doesn't send the token to the expert.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from quantkit.models.linear_views import DOWN, GATE_UP, find_stacks
from quantkit.models.weight_map import WeightMap

# (module, hidden states [tokens, features], top_k_index [tokens, experts per token], top_k_weights
# [tokens, experts per token]) → [tokens, features]
ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class _Declared(Protocol):
    """The attributes that transformers gives to stacked experts.

    num_experts: how many experts the stacks hold.
    is_transposed: matrices are [in_features, out_features].
    has_bias: each Linear has a bias, `gate_up_proj_bias` and `down_proj_bias`.
    has_gate: act_fn(gate) * up stands between the two Linears, not act_fn(up) alone.
    """

    num_experts: int
    is_transposed: bool
    has_bias: bool
    has_gate: bool

    def act_fn(self, states: Tensor) -> Tensor: ...

    # Some have these two.
    def post_expert_norm(self, states: Tensor) -> Tensor: ...

    def _apply_gate(self, projected: Tensor) -> Tensor: ...


def _declared(module: nn.Module) -> _Declared:
    """The module with types: nn.Module declares none of these attributes."""
    return cast(_Declared, module)


# The shapes of a trial, and the standard deviation of its hidden states: some values exceed the
# clamping bounds of gates, some are near zero.
_TRIAL_EXPERTS, _TRIAL_TOKENS, _TRIAL_WIDTH, _TRIAL_SIZE = 3, 4, 16, 12.0


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in two stacks."""
    return all(
        isinstance(getattr(module, leaf, None), nn.Parameter) and getattr(module, leaf).dim() == 3
        for leaf in stack_names(module)
    )


def stack_names(module: nn.Module) -> tuple[str, str]:
    """The names of its two stacks: gate and up as one (or up alone), and down."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def has_selectable_forward(module: nn.Module) -> bool:
    """Whether transformers selects the forward of these stacked experts by name."""
    return hasattr(module, "is_concatenated")


# ---- Their forward.


def each_expert(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    output_of: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The forward of stacked experts, one expert after the other, as transformers' `eager` does it.
    Returns [tokens, features].

    hidden_states: [tokens, features].
    top_k_index: [tokens, experts per token]; a number that is no expert's is skipped.
    top_k_weights: [tokens, experts per token].
    output_of: gets an expert's number, the tokens that the router sends to it, [n], and their
        hidden states, [n, features]; returns the expert's output, [n, features].
    """
    output = torch.zeros_like(hidden_states)
    experts = _declared(module)
    for expert in range(experts.num_experts):
        # The order of tokens is that of transformers' eager forward.
        position, token = torch.where((top_k_index == expert).T)
        if not len(token):
            continue
        states = output_of(expert, token, hidden_states[token])
        if getattr(module, "has_post_expert_norm", False):
            states = experts.post_expert_norm(states)
        states = states * top_k_weights[token, position, None]
        output.index_add_(0, token, states.to(output.dtype))
    return output


def expert_linear(module: nn.Module, leaf: str, expert: int, states: Tensor) -> Tensor:
    """One expert's Linear. leaf: name of the stack; states: [n, in_features]."""
    experts = _declared(module)
    weight = getattr(module, leaf)[expert]
    bias = getattr(module, f"{leaf}_bias")[expert] if experts.has_bias else None
    if experts.is_transposed:
        return states @ weight if bias is None else states @ weight + bias
    return nn.functional.linear(states, weight, bias)


def gated(module: nn.Module, projected: Tensor) -> Tensor:
    """act(gate)·up from the first Linear's output, [n, gate and up features]; act(up) without a
    gate.
    """
    experts = _declared(module)
    if not experts.has_gate:
        return experts.act_fn(projected)
    if hasattr(module, "_apply_gate"):
        return experts._apply_gate(projected)
    gate, up = projected.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def intermediate(module: nn.Module, expert: int, states: Tensor) -> Tensor:
    """The input of the expert's down Linear. states: [n, features]."""
    return gated(module, expert_linear(module, stack_names(module)[0], expert, states))


def plain_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of stacked experts, with nothing added."""

    def output_of(expert: int, _: Tensor, states: Tensor) -> Tensor:
        return expert_linear(
            module, stack_names(module)[1], expert, intermediate(module, expert, states)
        )

    return each_expert(module, hidden_states, top_k_index, top_k_weights, output_of)


# ---- Experts with a forward of their own.


def register_experts(name: str, forward: ExpertsForward) -> None:
    """Register a forward with transformers under a name, for `experts_implementation`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def adopt_experts(model: nn.Module, name: str) -> None:
    """Replace the forward of a model's experts that have one of their own by a registered one.

    Experts that compute something else, by trial, are skipped.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    forward: ExpertsForward | None = ALL_EXPERTS_FUNCTIONS.get(name)
    if forward is None:
        return
    for module in model.modules():
        if is_experts(module) and not has_selectable_forward(module):
            _adopt(module, forward)


def _adopt(module: nn.Module, forward: ExpertsForward) -> None:
    """Give experts the attributes and the forward that transformers' decorator gives to others."""
    (count, rows, columns), (_, down_rows, down_columns) = (
        getattr(module, leaf).shape for leaf in stack_names(module)
    )
    is_transposed = (rows, columns) == (down_columns, 2 * down_rows)
    takes = len(inspect.signature(module.forward).parameters)
    if takes not in _WAYS or not (
        is_transposed or (rows, columns) == (2 * down_columns, down_rows)
    ):
        return
    described = {
        "is_concatenated": True,
        "is_transposed": is_transposed,
        "has_bias": False,
        "has_gate": True,
        "has_post_expert_norm": False,
    }
    if _computes_alike(module, described, takes):
        vars(module).update(described | {"num_experts": count})
        module.forward = types.MethodType(_WAYS[takes](forward), module)


def _computes_alike(module: nn.Module, described: Mapping[str, bool], takes: int) -> bool:
    """Whether small experts of this class return the same as `plain_experts` with these attributes.

    described: the attributes. takes: how many arguments their forward has.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    leaf, down = stack_names(module)
    features = getattr(module, down).shape[2 if described["is_transposed"] else 1]
    shapes = {leaf: (features, 2 * _TRIAL_WIDTH), down: (_TRIAL_WIDTH, features)}
    weights = {
        name: random(_TRIAL_EXPERTS, *shape) * shape[0] ** -0.5 for name, shape in shapes.items()
    }
    weights = {
        name: weight if described["is_transposed"] else weight.mT.contiguous()
        for name, weight in weights.items()
    }
    small = copy.copy(module)
    small._parameters = module._parameters | {
        name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()
    }
    vars(small).update({**described, "num_experts": _TRIAL_EXPERTS})
    arguments: tuple[Tensor, ...] = (
        random(_TRIAL_TOKENS, features) * _TRIAL_SIZE,
        torch.tensor([[0, 1], [1, 2], [1, 0], [0, 1]]),
        random(_TRIAL_TOKENS, 2).abs(),
    )
    if takes == 1:  # Tokens arrive sorted by expert and scaled by the router.
        scores = torch.zeros(_TRIAL_TOKENS, _TRIAL_EXPERTS).scatter(1, *arguments[1:])
        arguments = ((arguments[0] * scores.T[..., None]).flatten(0, 1),)
    try:
        theirs = small.forward(*arguments)
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        LookupError,
    ):  # it asks for what others don't have
        return False
    ours = _WAYS[takes](plain_experts)(small, *arguments)
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    )


def _of_routed(forward: ExpertsForward) -> Callable[[nn.Module, Tensor], Tensor]:
    """A forward for experts that receive [experts · tokens, features], with zero rows where the
    router doesn't send a token to the expert. Each other row counts as a token.

    Only these rows are multiplied. The result is that of all rows, up to the order of sums in a
    matrix product.
    """

    def run(module: nn.Module, routed: Tensor) -> Tensor:
        rows = routed.reshape(-1, routed.shape[-1])
        count = _declared(module).num_experts
        expert = torch.arange(count, device=rows.device).repeat_interleave(rows.shape[0] // count)
        sent_to = torch.where(rows.any(-1), expert, count)[:, None]
        return forward(module, rows, sent_to, torch.ones_like(sent_to, dtype=rows.dtype))

    return run


# By the number of arguments of their own forward: 3 as ExpertsForward, 1 for rows that the router
# has sorted and scaled.
_WAYS: dict[int, Callable[[ExpertsForward], Callable[..., Tensor]]] = {
    3: lambda forward: forward,
    1: _of_routed,
}


@dataclass(frozen=True)
class Restacked:
    """Experts that are quantized as single Linears, where transformers finds only stacks.

    linears: name of a stack on disk → names of the Linears of each expert.
    shapes: name of a stack → the shape that transformers expects.
    transposed: stacks of [in_features, out_features] matrices; a square one doesn't show it.
    """

    linears: dict[str, list[list[str]]]
    shapes: dict[str, tuple[int, ...]]
    transposed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, linears: Iterable[str]) -> Restacked:
        """linears: names on disk of the quantized Linears."""
        counts: dict[str, int] = {}
        for name in linears:
            found = re.match(rf"(.*\.experts)\.(\d+)\.({'|'.join(GATE_UP + DOWN)})$", name)
            if found:
                counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
        unknown = set(
            WeightMap(model, [f"{module}.0.{DOWN[0]}.weight" for module in counts]).unexpected
        )
        counts = {
            module: count
            for module, count in counts.items()
            if f"{module}.0.{DOWN[0]}.weight" in unknown
        }
        stacks = {
            f"{module}.{leaf}": (module, leaves)
            for module in counts
            for leaf, leaves in (("gate_up_proj", GATE_UP), ("down_proj", DOWN))
        }
        targets, expected = WeightMap(model, list(stacks)).target_of, model.state_dict()
        known = {stack: parts for stack, parts in stacks.items() if stack in targets}
        shapes = {stack: tuple(expected[targets[stack]].shape) for stack in known}
        return cls(
            {
                stack: [
                    [f"{module}.{expert}.{leaf}" for leaf in leaves]
                    for expert in range(counts[module])
                ]
                for stack, (module, leaves) in known.items()
            },
            shapes,
            frozenset(name for name, stack in find_stacks(shapes).items() if stack.is_transposed),
        )

    def parts(self) -> set[str]:
        """The Linears of all experts, by their names on disk."""
        return {
            linear for experts in self.linears.values() for linears in experts for linear in linears
        }

    def read(self, stack: str, weight: Callable[[str], Tensor]) -> Tensor:
        """A stack as transformers expects it. weight: reads a Linear's dequantized weight."""
        stacked = torch.stack(
            [torch.cat([weight(linear) for linear in linears]) for linears in self.linears[stack]]
        )
        return stacked.transpose(1, 2).contiguous() if stack in self.transposed else stacked

    def names(self, tensor: str) -> list[str]:
        """The Linears in a stack; for another tensor, its own Linear."""
        return (
            [linear for linears in self.linears[tensor] for linear in linears]
            if tensor in self.linears
            else [tensor.removesuffix(".weight")]
        )
