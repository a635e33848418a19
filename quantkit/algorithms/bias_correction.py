"""Bias correction (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction"; here with the mean from data).

Quantizing shifts the mean of a Linear's outputs, since inputs aren't centred and rounding errors
don't cancel. Where a bias b exists it can take that back, at no cost:

    b ← b + E[W x − Q x̂] = b + W E[x] − Q E[x̂]

with x the exact inputs and x̂ those that the quantized Linear sees.
"""

from __future__ import annotations

from torch import Tensor


def corrected_bias(
    bias: Tensor, weight: Tensor, values: Tensor, exact_mean: Tensor, seen_mean: Tensor
) -> Tensor:
    """b, float32. bias: [out_features]; weight, values: W and what Q's codes stand for,
    [out_features, in_features]; the means of x and x̂: [in_features].
    """
    return bias.float() + weight.float() @ exact_mean - values @ seen_mean
