"""Experts that transformers stacks into one tensor, as a server runs them: each expert's two inputs are quantized as the scheme says.

Their weights lie in the stack dequantized, in the model's dtype. All of eval runs experts one after the other, base and candidates alike, so that
nothing but quantization tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.blockwise import BlockwiseModel
from quantkit.quantize import quantize
from quantkit.recording import expert_linear, first_and_down, gated, is_experts
from quantkit.scheme import QuantScheme, QuantSpec

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


def quantize_expert_inputs(model: BlockwiseModel, schemes: Mapping[str, QuantScheme], input_scale: Callable[[str], Tensor]) -> set[str]:
    """Have stacked experts quantize their inputs. schemes: of each quantized Linear, by its name on disk; input_scale: reads a static scale.

    Returns the Linears whose inputs are quantized now: an input that all experts of a layer quantize alike. Static scales of a layer's experts are merged
    into the largest, as vLLM does.
    """
    reached: set[str] = set()
    for name, module in model.model.named_modules():
        if not is_experts(module):
            continue
        inputs = {}
        for leaf in first_and_down(module):
            source = model.sources(f"{name}.{leaf}")
            linears = [tensor.removesuffix(".weight") for tensors in source.lists for tensor in tensors] if source else []
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
    """The forward of stacked experts, one after the other, as transformers' `eager` computes it where no input is quantized.

    hidden_states: [tokens, features]; top_k_index, top_k_weights: [tokens, experts per token].
    """
    leaf, down = first_and_down(module)
    output = torch.zeros_like(hidden_states)
    for expert in range(module.num_experts):
        position, token = torch.where((top_k_index == expert).T)  # in the order of the eager forward
        if not len(token):
            continue
        states = _product(module, leaf, expert, hidden_states[token])
        states = _product(module, down, expert, gated(module, states))
        if getattr(module, "has_post_expert_norm", False):
            states = module.post_expert_norm(states)
        states = states * top_k_weights[token, position, None]
        output.index_add_(0, token, states.to(output.dtype))
    return output


def _product(module: nn.Module, leaf: str, expert: int, states: Tensor) -> Tensor:
    quantizes = getattr(module, "quantkit_inputs", {}).get(leaf)
    if quantizes is None:
        return expert_linear(module, leaf, expert, states)
    # In float32: the values that codes stand for are no bfloat16 numbers.
    weight = getattr(module, leaf)[expert].float()
    product = quantizes(states) @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        product = product + getattr(module, f"{leaf}_bias")[expert].float()
    return product.to(states.dtype)


def register_serving_experts() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, serving_experts)
