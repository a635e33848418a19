"""A group of Linears that read one input, while their codes are made.

Each algorithm of the recipe in turn is given the group (`quantize_group`). It may set how scales
follow from weights, the codes of a Linear, its bias, and what calibration.json says of it. Linears
that still have no codes at the end are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantkit.models.tensor_roles import fused_layers
from quantkit.models.workers import Workers
from quantkit.ops.reference import QuantizedTensor, block_amax, choose_scale, quantize
from quantkit.ops.torch_ops import quantize as quantize_weight
from quantkit.schemes.quant_spec import TENSOR, QuantSpec
from quantkit.schemes.scheme import QuantScheme

Found = TypeVar("Found")

# (weights [out_features, in_features] that share a scale, their format, the mean square of each
# input channel [in_features] or None) → scales [block rows, block columns], None for the usual ones
ScaleRule = Callable[[Sequence[Tensor], QuantSpec, Tensor | None], Tensor | None]


@dataclass(frozen=True)
class Needs:
    """What an algorithm wants to be measured before it works.

    token_importance: how much an error counts at each token.
    input_sums: the means and mean squares of each group's inputs.
    gram: their Gram matrix X̂ X̂ᵀ too.
    deviation: (X − X̂) X̂ᵀ too.
    """

    token_importance: bool = False
    input_sums: bool = False
    gram: bool = False
    deviation: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.token_importance or other.token_importance,
            self.input_sums or other.input_sums,
            self.gram or other.gram,
            self.deviation or other.deviation,
        )


# What algorithms need that look at a group's inputs.
INPUT_SUMS = Needs(token_importance=True, input_sums=True)


@dataclass(frozen=True)
class InputSums:
    """What a Linear is given, over all tokens, each weighted by its importance.

    exact_mean: mean of X, the inputs before they are quantized, [in_features] float32.
    seen_mean: mean of X̂, the quantized inputs, [in_features].
    squares: mean of X̂², [in_features].
    hessian: sum X̂ X̂ᵀ, [in_features, in_features], or None where it isn't needed.
    deviation: sum (X − X̂) X̂ᵀ, [in_features, in_features], or None likewise.
    """

    exact_mean: Tensor
    seen_mean: Tensor
    squares: Tensor
    hessian: Tensor | None = None
    deviation: Tensor | None = None


@dataclass
class GroupLinear:
    """One Linear of a group, and what was decided for it.

    name: on disk.
    scheme: of its weight and inputs.
    weight: W, [out_features, in_features] float32.
    bias: [out_features], or None where there is none that can be stored.
    inputs: None where no token reached it, or no algorithm looks at inputs.
    codes: None until an algorithm has made them.
    described: its entry in calibration.json.
    bias_changed: whether an algorithm gave it another bias.
    """

    name: str
    scheme: QuantScheme
    weight: Tensor
    bias: Tensor | None
    inputs: InputSums | None = None
    codes: QuantizedTensor | None = None
    described: dict[str, Any] = field(default_factory=dict)
    bias_changed: bool = False

    def __post_init__(self) -> None:
        self.described = {"name": self.name, "algorithm": "rtn"} | self.described

    def set_bias(self, bias: Tensor) -> None:
        self.bias, self.bias_changed = bias, True

    @property
    def squares(self) -> Tensor | None:
        return None if self.inputs is None else self.inputs.squares


def usual_scale(
    weights: Sequence[Tensor], spec: QuantSpec, squares: Tensor | None = None
) -> Tensor | None:
    """Several weights that share one scale follow the largest value of all."""
    if len(weights) == 1:
        return None
    largest = torch.stack([block_amax(weight, TENSOR) for weight in weights]).amax(0)
    return choose_scale(largest, spec)


@dataclass
class LayerGroup:
    """linears: by their paths in the block, in the order of their calls.
    workers: who computes.
    scale_rule: how scales follow from weights.
    """

    linears: dict[str, GroupLinear]
    workers: Workers
    scale_rule: ScaleRule = usual_scale

    def scales(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Scales [block rows, block columns] for these values of the Linears' weights, by path;
        None for the usual ones.
        """
        found: dict[str, Tensor | None] = dict.fromkeys(targets)
        per_tensor = fused_layers(
            [path for path in targets if self.linears[path].scheme.weight.granularity == TENSOR]
        )
        together = [
            *per_tensor,
            *((path,) for path in targets if not any(path in members for members in per_tensor)),
        ]

        def work(index: int) -> Tensor | None:
            members = together[index]
            first = self.linears[members[0]]
            weights = [targets[path] for path in members]
            return self.scale_rule(weights, first.scheme.weight, first.squares)

        scales = self.workers.shared(work, range(len(together)))
        for members, scale in zip(together, scales):
            found |= dict.fromkeys(members, scale)
        return found

    def round_to_nearest(self) -> None:
        """Give codes to those Linears that have none."""
        left = [path for path, linear in self.linears.items() if linear.codes is None]
        if not left:
            return
        scales = self.scales({path: linear.weight for path, linear in self.linears.items()})
        for path in left:
            linear, scale = self.linears[path], scales[path]
            spec = linear.scheme.weight
            linear.codes = (
                quantize_weight(linear.weight, spec)
                if scale is None
                else quantize(linear.weight, spec, scale)
            )

    def make_codes(self, solve: Callable[[str], tuple[QuantizedTensor, Found]]) -> dict[str, Found]:
        """Codes for every Linear, each made by one rank. solve(path): the codes, and what else is
        to be known of them, which is returned by path.
        """
        paths = list(self.linears)

        def sent(index: int) -> tuple[Tensor, Tensor, Found]:
            """Codes as bytes, their scales, and no spec: neither E4M3 tensors nor formats, which
            are compared by identity, survive being sent.
            """
            codes, found = solve(paths[index])
            return codes.qdata.view(torch.uint8), codes.scale, found

        results: dict[str, Found] = {}
        shared = self.workers.shared(sent, range(len(paths)))
        for path, (content, scale, found) in zip(paths, shared):
            linear, device = self.linears[path], self.workers.device
            spec = linear.scheme.weight
            qdata = content.to(device).view(getattr(torch, spec.format.torch_name))
            linear.codes = QuantizedTensor(qdata, scale.to(device), spec)
            results[path] = found
        return results
