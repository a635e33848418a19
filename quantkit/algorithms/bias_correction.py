"""Bias correction (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction"; here with means from calibration data).

Quantization shifts the mean of a Linear's outputs: inputs aren't centred and rounding errors don't
cancel. Where a Linear has a bias b, the shift is subtracted from it at no cost:

    b ← b + E[W x − Q x̂] = b + W E[x] − Q E[x̂]

with x the exact inputs, x̂ the inputs of the quantized Linear, W its weight, and Q the values of its
codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from quantkit.algorithms.layer_group import INPUT_SUMS, GroupLinear, LayerGroup, Needs
from quantkit.checkpoint.units import counted
from quantkit.schemes.algorithms import Description
from quantkit.schemes.recipe import Algorithm


def corrected_bias(
    bias: Tensor, weight: Tensor, values: Tensor, exact_mean: Tensor, quantized_mean: Tensor
) -> Tensor:
    """The new b, [out_features] float32.

    bias: b, [out_features].
    weight: W, [out_features, in_features].
    values: Q, [out_features, in_features].
    exact_mean: E[x], [in_features].
    quantized_mean: E[x̂], [in_features].
    """
    return bias.float() + weight.float() @ exact_mean - values @ quantized_mean


def needs(settings: Algorithm) -> Needs:
    return INPUT_SUMS


def quantize_group(group: LayerGroup, settings: Algorithm) -> None:
    """Correct the bias of each Linear that has one, for its present codes."""
    group.round_to_nearest()
    for linear in group.linears.values():
        is_possible = linear.bias is not None and linear.inputs is not None
        if is_possible:
            # Computed on rank 0 for all ranks: another machine may round sums differently.
            linear.set_bias(group.workers.ranks.broadcast_from_first(partial(_corrected, linear)))
        linear.described["bias_corrected"] = is_possible


def _corrected(linear: GroupLinear) -> Tensor:
    bias, codes, inputs = linear.bias, linear.codes, linear.inputs
    assert bias is not None and codes is not None and inputs is not None
    corrected = corrected_bias(
        bias, linear.weight, codes.dequantize(), inputs.exact_mean, inputs.quantized_mean
    )
    return corrected.to(bias.dtype)


def describe(report: Mapping[str, Any]) -> Description:
    corrected = sum(entry.get("bias_corrected", False) for entry in report["linears"])
    none = "" if corrected else "; no quantized Linear has a bias"
    return Description((f"bias_correction: biases of {counted(corrected, 'Linear')}{none}",))
