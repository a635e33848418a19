"""Scale search: the weight scales with the least squared error, instead of those that map the
largest weight to the largest code.

For each block of a weight W that shares a scale s, over candidates around the usual one,

    minimize  Σ_j h_j (w_j − s·code(w_j / s))²

with h_j the mean square of input channel j, or 1 where nothing is known of the inputs. Codes and
scales are those that would be stored: a scale is rounded first, and only then used. Integers gain
by clipping a lone large weight, so that all others get finer steps; E4M3's steps grow with the
value, so it is where its powers of two fall among a row's weights that matters, and one octave of
scales shows all of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

# What the usual scale is multiplied by.
INTEGER_FACTORS = (
    *(1 - step / 200 for step in range(1, 11)),
    *(1 - step / 50 for step in range(3, 21)),
)
FLOAT_FACTORS = tuple(2 ** (step / 24) for step in range(-6, 24))
POWER_OF_TWO_FACTORS = (1.0, 0.5, 2.0)


def search_scale(
    weights: Sequence[Tensor], spec: QuantSpec, squares: Tensor | None = None
) -> Tensor:
    """The scales [block rows, block columns] float32 of a weight [out_features, in_features], or of
    several that share one scale (per tensor, they must).

    squares: h, [in_features]. Never worse than the usual scale, which is among the candidates.
    """
    amax = torch.stack([block_amax(weight, spec.granularity) for weight in weights]).amax(0)
    best, least = choose_scale(amax, spec), None
    factors = (
        POWER_OF_TWO_FACTORS
        if spec.scale_format is E8M0
        else FLOAT_FACTORS
        if spec.format.kind == "float"
        else INTEGER_FACTORS
    )
    for factor in (1.0, *factors):
        scale = choose_scale(amax * factor, spec)
        error = sum(scale_error(weight, spec, scale, squares) for weight in weights)
        if least is None:
            least = error
            continue
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def scale_error(
    weight: Tensor, spec: QuantSpec, scale: Tensor, squares: Tensor | None = None
) -> Tensor:
    """The sum above for each block, [block rows, block columns] float32."""
    difference = (weight.float() - quantize(weight, spec, scale).dequantize()).square()
    return block_sum(difference if squares is None else difference * squares, spec.granularity)


def needs(settings: Algorithm) -> Needs:
    return INPUT_SUMS


def quantize_group(group: LayerGroup, settings: Algorithm) -> None:
    """Scales are searched wherever they are chosen: for rounding to nearest, and by GPTQ for the
    weights that it works on.
    """
    group.scale_rule = search_scale


def describe(chosen: Mapping[str, Any]) -> Description:
    return Description((f"scale_search: scales of {counted(len(chosen['linears']), 'Linear')}",))
