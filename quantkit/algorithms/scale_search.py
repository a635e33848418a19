"""Scale search (as in AWQ, Lin et al. 2023, for clipping): weight scales with the least squared
error, instead of absmax scales, which map the largest weight to the largest code.

For the weights w_j that share a scale s, over candidates around the absmax scale,

    minimize  Σ_j h_j (w_j − s·code(w_j / s))²

with h_j the mean square of input channel j, or 1 where inputs are unknown. A scale is rounded to
the format in which it is stored before it is used.

INT8 gains by clipping a single large weight, which gives all others finer steps. E4M3's steps grow
with the value: the error depends on where powers of two fall among the weights, so candidates span
one octave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.layer_group import INPUT_SUMS, LayerGroup, Needs
from quantkit.checkpoint.units import counted
from quantkit.ops.reference import block_amax, block_sum, choose_scale, quantize
from quantkit.schemes.algorithms import Description
from quantkit.schemes.number_formats import E8M0
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.recipe import Algorithm

# Candidates, as multiples of the absmax scale.
INTEGER_FACTORS = (
    *(1 - step / 200 for step in range(1, 11)),
    *(1 - step / 50 for step in range(3, 21)),
)
FLOAT_FACTORS = tuple(2 ** (step / 24) for step in range(-6, 24))
POWER_OF_TWO_FACTORS = (1.0, 0.5, 2.0)


def search_scale(
    weights: Sequence[Tensor], spec: QuantSpec, squares: Tensor | None = None
) -> Tensor:
    """The best scales, [block rows, block columns] float32. They are never worse than the absmax
    scales, which are among the candidates.

    weights: [out_features, in_features] each; several share one scale per tensor.
    squares: h, [in_features]; None for ones.
    """
    amax = torch.stack([block_amax(weight, spec.granularity) for weight in weights]).amax(0)
    factors = (
        POWER_OF_TWO_FACTORS
        if spec.scale_format == E8M0
        else FLOAT_FACTORS
        if spec.format.kind == "float"
        else INTEGER_FACTORS
    )

    def error_of(scale: Tensor) -> Tensor:
        errors = [scale_error(weight, spec, scale, squares) for weight in weights]
        return reduce(torch.add, errors)

    best = choose_scale(amax, spec)
    least = error_of(best)
    for factor in factors:
        scale = choose_scale(amax * factor, spec)
        error = error_of(scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def scale_error(
    weight: Tensor, spec: QuantSpec, scale: Tensor, squares: Tensor | None = None
) -> Tensor:
    """Σ_j h_j (w_j − s·code(w_j / s))² of each block, [block rows, block columns] float32."""
    difference = (weight.float() - quantize(weight, spec, scale).dequantize()).square()
    return block_sum(difference if squares is None else difference * squares, spec.granularity)


def needs(settings: Algorithm) -> Needs:
    return INPUT_SUMS


def quantize_group(group: LayerGroup, settings: Algorithm) -> None:
    """Search the scales of this group, for rounding to nearest as well as for GPTQ."""
    group.scale_rule = search_scale


def describe(report: Mapping[str, Any]) -> Description:
    return Description((f"scale_search: scales of {counted(len(report['linears']), 'Linear')}",))
