"""Experts that transformers stacks into one tensor, as a server runs them: each expert's two inputs are quantized as the scheme says.

Their weights lie in the stack dequantized, in the model's dtype. All of eval runs experts one after the other, base and candidates alike, so that
nothing but quantization tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.blockwise import BlockwiseModel, build_skeleton
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.matrices import DOWN, GATE_UP, find_stacks
from quantkit.quantize import quantize
from quantkit.scheme import QuantScheme, QuantSpec
from quantkit.stacked import each_expert, expert_linear, first_and_down, gated, is_experts, register_experts, runs_as_told
from quantkit.weight_map import WeightMap

# The name under which transformers finds the experts' forward of this file.
EXPERTS_IMPLEMENTATION = "quantkit_serving"


@dataclass(frozen=True)
class ExpertInput:
    """How an input is quantized; scale: the static one, [1]."""

    spec: QuantSpec
    scale: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """states: [tokens, features]; returns what its codes stand for, float32."""
        scale = None if self.scale is None else self.scale.reshape(1, 1).float().to(states.device)
        return quantize(states, self.spec, scale).dequantize()


@dataclass(frozen=True)
class Restacked:
    """Experts that are quantized one by one though the model was published with stacks, which is all that transformers looks for.

    linears: stack, by its name on disk → the Linears of each expert. shapes: of the stacks as transformers expects them. transposed: those whose matrices lie as
    [in_features, out_features], which a square one doesn't tell of itself.
    """

    linears: dict[str, list[list[str]]]
    shapes: dict[str, tuple[int, ...]]
    transposed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, linears: Iterable[str]) -> Restacked:
        """linears: the quantized ones, by their names on disk."""
        counts: dict[str, int] = {}
        for name in linears:
            found = re.match(rf"(.*\.experts)\.(\d+)\.({'|'.join(GATE_UP + DOWN)})$", name)
            if found:
                counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
        unknown = set(WeightMap(model, [f"{module}.0.{DOWN[0]}.weight" for module in counts]).unexpected)
        counts = {module: count for module, count in counts.items() if f"{module}.0.{DOWN[0]}.weight" in unknown}
        stacks = {f"{module}.{leaf}": (module, leaves) for module in counts for leaf, leaves in (("gate_up_proj", GATE_UP), ("down_proj", DOWN))}
        targets, expected = WeightMap(model, list(stacks)).target_of, model.state_dict()
        known = {stack: parts for stack, parts in stacks.items() if stack in targets}
        shapes = {stack: tuple(expected[targets[stack]].shape) for stack in known}
        return cls(
            {stack: [[f"{module}.{expert}.{leaf}" for leaf in leaves] for expert in range(counts[module])] for stack, (module, leaves) in known.items()},
            shapes,
            frozenset(name for name, stack in find_stacks(shapes).items() if stack.is_transposed),
        )

    def parts(self) -> set[str]:
        return {linear for experts in self.linears.values() for linears in experts for linear in linears}

    def read(self, stack: str, weight: Callable[[str], Tensor]) -> Tensor:
        """weight: of a Linear, dequantized."""
        upright = torch.stack([torch.cat([weight(linear) for linear in linears]) for linears in self.linears[stack]])
        return upright.transpose(1, 2).contiguous() if stack in self.transposed else upright

    def names(self, tensor: str) -> list[str]:
        """The Linears that a tensor on disk stands for."""
        return [linear for linears in self.linears[tensor] for linear in linears] if tensor in self.linears else [tensor.removesuffix(".weight")]


def not_found_by_transformers(checkpoint: Checkpoint, linears: Iterable[str]) -> str:
    """Why transformers' loader would leave a checkpoint's experts random, or "". linears: the quantized ones, by their names on disk."""
    linears = list(linears)
    if not any(".experts." in name for name in linears):
        return ""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    try:
        model = build_skeleton(checkpoint)
    except CheckpointError:  # a model of remote code, or one that transformers doesn't know and so doesn't load
        return ""
    if any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules()):
        return ""  # it takes these apart itself where a checkpoint is quantized (Llama 4's)
    dropped = sorted(Restacked.of(model, linears).parts())
    if not dropped:
        return ""
    return f"transformers looks for these experts stacked and gives them random weights ({dropped[0]} and {len(dropped) - 1} more); leave them with --ignore"


def quantize_expert_inputs(
    model: BlockwiseModel, schemes: Mapping[str, QuantScheme], input_scale: Callable[[str], Tensor], names: Callable[[str], list[str]]
) -> set[str]:
    """Have stacked experts quantize their inputs. schemes: of each quantized Linear, by its name on disk; input_scale: reads a static scale;
    names: the Linears that a tensor stands for.

    Returns the Linears whose inputs are quantized now: an input that all experts of a layer quantize alike. Static scales of a layer's experts are merged
    into the largest, as vLLM does.
    """
    reached: set[str] = set()
    for name, module in model.model.named_modules():
        if not (is_experts(module) and runs_as_told(module)):
            continue
        inputs = {}
        for leaf in first_and_down(module):
            source = model.sources(f"{name}.{leaf}")
            linears = [linear for tensors in source.lists for tensor in tensors for linear in names(tensor)] if source else []
            specs = {schemes[linear].input if linear in schemes else None for linear in linears}
            if len(specs) != 1 or None in specs:
                continue
            spec = specs.pop()
            scales = None if spec.dynamic else torch.stack([input_scale(linear).reshape(()) for linear in linears]).max().reshape(1)
            inputs[leaf] = ExpertInput(spec, scales)
            reached.update(linears)
        module.quantkit_inputs = inputs
    return reached


def serving_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of stacked experts, as transformers' `eager` computes it where no input is quantized; see `stacked.each_expert`.

    hidden_states: [tokens, features]; top_k_index, top_k_weights: [tokens, experts per token].
    """
    leaf, down = first_and_down(module)

    def output_of(expert: int, _: Tensor, states: Tensor) -> Tensor:
        return _product(module, down, expert, gated(module, _product(module, leaf, expert, states)))

    return each_expert(module, hidden_states, top_k_index, top_k_weights, output_of)


def _product(module: nn.Module, leaf: str, expert: int, states: Tensor) -> Tensor:
    quantizes = (getattr(module, "quantkit_inputs", None) or {}).get(leaf)
    if quantizes is None:
        return expert_linear(module, leaf, expert, states)
    # In float32: the values that codes stand for are no bfloat16 numbers.
    weight = getattr(module, leaf)[expert].float()
    product = quantizes(states) @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        product = product + getattr(module, f"{leaf}_bias")[expert].float()
    return product.to(states.dtype)


def register_serving_experts() -> None:
    register_experts(EXPERTS_IMPLEMENTATION, serving_experts)
