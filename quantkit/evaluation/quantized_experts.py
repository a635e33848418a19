"""Experts that transformers stacks into one tensor, with quantized inputs as a server runs them:
each expert's two inputs are quantized as its scheme says.

Their weights are dequantized into the stack, in the model's dtype. `eval` runs the experts of base
and quantized models one after the other, so that quantization is the only difference.
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
    gated,
    has_selectable_forward,
    is_experts,
    register_experts,
    stack_names,
)
from quantkit.ops.reference import quantize
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.scheme import QuantScheme

# The name under which `serving_experts` is registered with transformers.
EXPERTS_IMPLEMENTATION = "quantkit_serving"


@dataclass(frozen=True)
class ExpertInput:
    """How an expert's input is quantized.

    spec: format and granularity.
    scale: the static scale, [1]; None if scales are dynamic.
    """

    spec: QuantSpec
    scale: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """Quantize and dequantize. states: [tokens, features]; returns the same shape, float32."""
        scale = None if self.scale is None else self.scale.reshape(1, 1).float().to(states.device)
        return quantize(states, self.spec, scale).dequantize()


def quantize_expert_inputs(
    model: BlockwiseModel,
    schemes: Mapping[str, QuantScheme],
    input_scale: Callable[[str], Tensor],
    names: Callable[[str], list[str]],
) -> set[str]:
    """Make stacked experts quantize their inputs, where all experts of a layer have the same spec.
    Static scales of a layer's experts are replaced by the largest, as vLLM does.

    schemes: quantized Linear, by its name on disk → its scheme.
    input_scale: reads the static scale of a Linear's input, [1].
    names: returns the Linears whose weights a tensor contains.

    Returns the names of the Linears whose inputs are quantized now.
    """
    quantized: set[str] = set()
    for name, module in model.model.named_modules():
        if not (is_experts(module) and has_selectable_forward(module)):
            continue
        inputs = {}
        for leaf in stack_names(module):
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
            scale = (
                None
                if spec.dynamic
                else torch.stack([input_scale(linear).reshape(()) for linear in linears])
                .max()
                .reshape(1)
            )
            inputs[leaf] = ExpertInput(spec, scale)
            quantized.update(linears)
        module.quantkit_inputs = inputs
    return quantized


def serving_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of stacked experts. Without quantized inputs, it computes the same as the `eager`
    implementation of transformers; see `experts.each_expert`.

    hidden_states: [tokens, features].
    top_k_index: the experts of each token, [tokens, experts per token].
    top_k_weights: their weights, [tokens, experts per token].
    """
    leaf, down = stack_names(module)

    def output_of(expert: int, _: Tensor, states: Tensor) -> Tensor:
        return _product(module, down, expert, gated(module, _product(module, leaf, expert, states)))

    return each_expert(module, hidden_states, top_k_index, top_k_weights, output_of)


def _product(module: nn.Module, leaf: str, expert: int, states: Tensor) -> Tensor:
    """One expert's Linear, [tokens, out_features]. states: [tokens, in_features]."""
    quantize_input = (getattr(module, "quantkit_inputs", None) or {}).get(leaf)
    if quantize_input is None:
        return expert_linear(module, leaf, expert, states)
    # In float32, because bfloat16 can't represent dequantized values exactly.
    weight = getattr(module, leaf)[expert].float()
    product = quantize_input(states) @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        product = product + getattr(module, f"{leaf}_bias")[expert].float()
    return product.to(states.dtype)


def register_serving_experts() -> None:
    """Register `serving_experts` with transformers as EXPERTS_IMPLEMENTATION."""
    register_experts(EXPERTS_IMPLEMENTATION, serving_experts)
