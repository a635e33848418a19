"""Quantized layer groups, which replace the original ones while a variant runs.

Weights are quantized as `export` does it. If a calibration holds weights that algorithms quantized,
its codes are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.evaluation.quantized_experts import ExpertInput
from quantkit.exporter.plan import ExportPlan
from quantkit.exporter.tensor_maker import input_scale_of
from quantkit.layer_sensitivity.base_model import BaseModel
from quantkit.layer_sensitivity.choices import KEEP_NUMBER, RECIPE_NUMBER, Choices
from quantkit.layer_sensitivity.layer_groups import LayerGroup
from quantkit.layer_sensitivity.layer_sqnr import LayerSqnr
from quantkit.layer_sensitivity.variants import Swap
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.models.experts import is_experts, stack_names
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor
from quantkit.schemes.quant_spec import TENSOR

PERTURBED = 1 / 12  # fraction of outputs that a perturbation changes by one rounding step


@dataclass(frozen=True)
class Perturbation:
    """A place of variants that measures the noise floor, and isn't part of a budget.

    Any choice but the first perturbs the output of the block's last Linear.
    """

    block: int


@dataclass(frozen=True)
class LayerSwapper:
    """Makes the quantized modules of a block.

    base: the model whose blocks are changed.
    choices: the plans by which groups are quantized.
    places: the groups and perturbations that a variant has choices for.
    sqnr: measures each Linear that takes the recipe's choice, or None.
    """

    base: BaseModel
    choices: Choices
    places: Sequence[LayerGroup | Perturbation]
    sqnr: LayerSqnr | None = None

    def swaps(self, number: int, block: nn.Module, place: int, choice: int) -> list[Swap]:
        """The changes to a block in memory when a place takes a choice."""
        changed = self.places[place]
        if choice == KEEP_NUMBER:
            return []
        if isinstance(changed, Perturbation):
            paths = [
                path for path, module in block.named_modules() if isinstance(module, nn.Linear)
            ]
            return [
                _swap(block, path, _Perturbed(block.get_submodule(path))) for path in paths[-1:]
            ]
        prefix, members = self.base.blocks.block_name(number), set(changed.linears)
        swaps: list[Swap] = []
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                name = self.base.linear_name(f"{prefix}.{path}")
                if name is not None and name in members:
                    swaps.append(_swap(block, path, self._quantized(place, choice, name, module)))
            elif is_experts(module):
                swaps += self._stacked(choice, f"{prefix}.{path}", module, members)
        return swaps

    def _quantized(self, place: int, choice: int, name: str, linear: nn.Linear) -> QuantizedLinear:
        plan, blocks = self.choices.plan(choice), self.base.blocks
        info, device = plan.linears[name], blocks.device
        codes = self._codes(choice, info)
        codes = replace(codes, qdata=codes.qdata.to(device), scale=codes.scale.to(device))
        input_scale = None
        if info.scheme.needs_calibration:
            input_scale = input_scale_of(info, plan).reshape(1).to(device)
        dtype = blocks.model.config.dtype
        made = QuantizedLinear(codes, info.scheme, input_scale, linear.bias, dtype)
        if choice == RECIPE_NUMBER and self.sqnr is not None:
            self.sqnr.compare(place, name, linear, codes, made)
        return made

    def _codes(self, choice: int, info: QuantizedLinearInfo) -> QuantizedTensor:
        plan, spec = self.choices.plan(choice), info.scheme.weight
        if choice == RECIPE_NUMBER and plan.calibration:
            found = plan.calibration.quantized_weight(info.name, spec)
            if found is not None:
                return found
        amax = None
        if spec.granularity == TENSOR:
            # Fused Linears share one scale.
            members = plan.fused_with[info.name]
            amax = torch.stack([self._weight(member).abs().amax().float() for member in members])
            amax = amax.amax().reshape(1, 1)
        return ops.quantize(self._weight(info.name), spec, amax)

    def _weight(self, name: str) -> Tensor:
        return self.base.weights.read(f"{name}.weight")

    def _stacked(self, choice: int, path: str, module: nn.Module, members: set[str]) -> list[Swap]:
        """Changes to stacked experts: weights with the values of codes, and quantized inputs."""
        plan, weights = self.choices.plan(choice), self.base.weights
        swaps: list[Swap] = []
        inputs: dict[str, ExpertInput] = {}
        for leaf in stack_names(module):
            parameter = f"{path}.{leaf}"
            linears = [
                plan.linears[name]
                for name in self.base.stacked_linears(parameter)
                if name in members
            ]
            if not linears:
                continue
            codes = {linear.name: self._codes(choice, linear) for linear in linears}
            rounded = self.base.blocks.read_anew(
                parameter, partial(weights.read_rounded, codes=codes)
            )
            swaps.append(Swap(module, leaf, rounded))
            found = _expert_input(plan, linears)
            if found is not None:
                inputs[leaf] = found
        return [*swaps, Swap(module, "quantkit_inputs", inputs)] if swaps else []


def _expert_input(plan: ExportPlan, linears: Sequence[QuantizedLinearInfo]) -> ExpertInput | None:
    """How stacked experts quantize their common input; None if they don't all do it in one way."""
    specs = {linear.scheme.input for linear in linears}
    spec = specs.pop() if len(specs) == 1 else None
    if spec is None:
        return None
    if spec.dynamic:
        return ExpertInput(spec, None)
    scales = torch.stack([input_scale_of(linear, plan).reshape(()) for linear in linears])
    return ExpertInput(spec, scales.max().reshape(1))


def _swap(block: nn.Module, path: str, value: nn.Module) -> Swap:
    parent, _, leaf = path.rpartition(".")
    return Swap(block.get_submodule(parent), leaf, value)


class _Perturbed(nn.Module):
    """A Linear with one in twelve of its outputs larger by one step of its dtype.

    This has the effect of any small change on later roundings.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.linear(inputs)
        generator = torch.Generator().manual_seed(output.shape[-2])
        draws = torch.rand(output.shape, generator=generator).to(output.device)
        larger = (output.float() * (1 + torch.finfo(output.dtype).eps)).to(output.dtype)
        return torch.where(draws < PERTURBED, larger, output)

    def __getattr__(self, name: str) -> Any:
        """Models ask their Linears for their weight's dtype (T5)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("linear"), name)
