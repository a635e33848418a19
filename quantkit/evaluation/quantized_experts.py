"""Experts that transformers stacks into one tensor, as a server runs them: each expert's two inputs
are quantized as the scheme says.

Their weights lie in the stack dequantized, in the model's dtype. All of eval runs experts one after
the other, base and candidates alike, so that nothing but quantization tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.experts import (
    each_expert,
    expert_linear,
    first_and_down,
    gated,
    is_experts,
    register_experts,
    runs_as_told,
)
from quantkit.ops.reference import quantize
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.scheme import QuantScheme

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


def quantize_expert_inputs(
    model: BlockwiseModel,
    schemes: Mapping[str, QuantScheme],
    input_scale: Callable[[str], Tensor],
    names: Callable[[str], list[str]],
) -> set[str]:
    """Have stacked experts quantize their inputs. schemes: of each quantized Linear, by its name on
    disk; input_scale: reads a static scale; names: the Linears that a tensor stands for.

    Returns the Linears whose inputs are quantized now: an input that all experts of a layer
    quantize alike. Static scales of a layer's experts are merged into the largest, as vLLM does.
    """
    reached: set[str] = set()
    for name, module in model.model.named_modules():
        if not (is_experts(module) and runs_as_told(module)):
            continue
        inputs = {}
        for leaf in first_and_down(module):
            source = model.sources(f"{name}.{leaf}")
            linears = (
                [
                    linear
                    for tensors in source.lists
                    for tensor in tensors
                    for linear in names(tensor)
                ]
                if source
                else []
            )
            specs = {schemes[linear].input if linear in schemes else None for linear in linears}
            spec = specs.pop() if len(specs) == 1 else None
            if spec is None:
                continue
            scales = (
                None
                if spec.dynamic
                else torch.stack([input_scale(linear).reshape(()) for linear in linears])
                .max()
                .reshape(1)
            )
            inputs[leaf] = ExpertInput(spec, scales)
            reached.update(linears)
        module.quantkit_inputs = inputs
    return reached


def serving_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of stacked experts, as transformers' `eager` computes it where no input is
    quantized; see `experts.each_expert`.

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
