"""A group of Linears that share an input (q, k and v; gate and up), while they are quantized.

Each algorithm of the recipe receives the group in turn (`quantize_group`). It may set the rule for
scales, a Linear's codes, its bias, and its entry in calibration.json. Linears without codes at the
end are rounded to nearest.
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

# (weights that share a scale, [out_features, in_features] each; their spec; the mean square of each
# input channel, [in_features], or None) → scales, [block rows, block columns], or None for absmax
# scales
ScaleRule = Callable[[Sequence[Tensor], QuantSpec, Tensor | None], Tensor | None]


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs measured before it runs.

    token_importance: how much an output error counts at each token.
    input_sums: means and mean squares of each group's inputs, weighted by token importance.
    gram: with input_sums, their Gram matrix X̂ X̂ᵀ as well.
    deviation: with gram, (X − X̂) X̂ᵀ as well.
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


# For algorithms that use means and mean squares of a group's inputs.
INPUT_SUMS = Needs(input_sums=True)


@dataclass(frozen=True)
class InputSums:
    """Sums of a Linear's inputs over all tokens, each token weighted by its importance.

    exact_mean: mean of X, the inputs before they are quantized, [in_features] float32.
    quantized_mean: mean of X̂, the quantized inputs, [in_features] float32.
    mean_squares: mean of X̂², [in_features] float32.
    hessian: Σ X̂ X̂ᵀ, [in_features, in_features] float32; None where no algorithm needs it.
    deviation: Σ (X − X̂) X̂ᵀ, [in_features, in_features] float32; None likewise.
    """

    exact_mean: Tensor
    quantized_mean: Tensor
    mean_squares: Tensor
    hessian: Tensor | None = None
    deviation: Tensor | None = None


@dataclass
class GroupLinear:
    """One Linear of a group, and what algorithms made of it so far.

    name: name on disk.
    scheme: number formats and scales of its weight and inputs.
    weight: W, [out_features, in_features] float32.
    bias: [out_features]; None where it has none, or none that can be stored.
    inputs: sums of its inputs; None where no token reached it, or no algorithm needs them.
    codes: its quantized weight; None until an algorithm has made it.
    described: its entry in calibration.json.
    bias_changed: whether an algorithm changed the bias.
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
    def mean_squares(self) -> Tensor | None:
        return None if self.inputs is None else self.inputs.mean_squares


def absmax_scale(
    weights: Sequence[Tensor], spec: QuantSpec, squares: Tensor | None = None
) -> Tensor | None:
    """The absmax scale of weights that share one scale, [1, 1] float32; None for one weight, whose
    scales follow from its own values.
    """
    if len(weights) == 1:
        return None
    largest = torch.stack([block_amax(weight, TENSOR) for weight in weights]).amax(0)
    return choose_scale(largest, spec)


@dataclass
class LayerGroup:
    """Linears that share an input.

    linears: by their paths in the block, in the order of their calls.
    workers: threads and ranks that compute.
    scale_rule: how scales follow from weights.
    """

    linears: dict[str, GroupLinear]
    workers: Workers
    scale_rule: ScaleRule = absmax_scale

    def scales(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Scales of each Linear by its path, [block rows, block columns]; None for absmax scales.

        targets: the weights to quantize, by path, [out_features, in_features].
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
            return self.scale_rule(weights, first.scheme.weight, first.mean_squares)

        scales = self.workers.shared(work, range(len(together)))
        for members, scale in zip(together, scales):
            found |= dict.fromkeys(members, scale)
        return found

    def round_to_nearest(self) -> None:
        """Round the Linears that have no codes yet."""
        missing = [path for path, linear in self.linears.items() if linear.codes is None]
        if not missing:
            return
        scales = self.scales({path: linear.weight for path, linear in self.linears.items()})
        for path in missing:
            linear, scale = self.linears[path], scales[path]
            spec = linear.scheme.weight
            linear.codes = (
                quantize_weight(linear.weight, spec)
                if scale is None
                else quantize(linear.weight, spec, scale)
            )

    def make_codes(self, solve: Callable[[str], tuple[QuantizedTensor, Found]]) -> dict[str, Found]:
        """Make codes for every Linear, each on one rank, and send them to the others.

        solve: gets a Linear's path; returns its codes and a result, which is returned by path.
        """
        paths = list(self.linears)

        def sent(index: int) -> tuple[Tensor, Tensor, Found]:
            """Codes as bytes, scales, and the result. The spec isn't sent: number formats are
            compared by identity. E4M3 tensors can't be sent as such.
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
