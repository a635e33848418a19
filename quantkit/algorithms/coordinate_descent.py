"""Coordinate descent on codes (QuantEase, Behdin et al. 2023): round one column again while all
others are fixed, and repeat that for a few passes over the columns.

Let W be a weight, Q the values of its codes, and H = X̂ X̂ᵀ the Gram matrix of the quantized inputs.
The error ‖(W − Q) X̂‖² is a quadratic function of one column q_j, with its minimum at

    q_j − ((Q − W) H)_j / H_jj

The nearest value that the scale allows is therefore the best one, and no pass raises the error. The
start is GPTQ's result. GPTQ rounds a column before the columns after it; a pass sees all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops.reference import QuantizedTensor, encode_codes, expand_scale

# Columns after a block receive all changes of the block in one matrix product.
BLOCK_COLUMNS = 128
# Rows are independent of each other; so many at a time bound the memory of a large weight.
ROWS = 4096


def descend(
    target: Tensor, weight: QuantizedTensor, hessian: Tensor, passes: int, damping: float = 0.0
) -> QuantizedTensor:
    """Better codes for the same scales. Columns with the smallest inputs come first, so that the
    others compensate for them.

    target: W, [out_features, in_features] float32.
    weight: Q, [out_features, in_features].
    hessian: H, [in_features, in_features].
    passes: how often each column is rounded again.
    damping: added to H's diagonal, as a fraction of its mean. It keeps codes from fitting the noise
        of a small calibration.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, stable=True)
    gram = hessian[order][:, order].contiguous()
    gram.diagonal().add_(diagonal.mean() * damping)
    scales = expand_scale(weight.scale, weight.spec.granularity, *target.shape).expand(target.shape)
    found, values = torch.empty_like(weight.qdata), weight.dequantize()
    for first in range(0, len(target), ROWS):
        rows = slice(first, first + ROWS)
        # Transposed and contiguous: each step reads and writes whole columns of the weight.
        divisors, codes, rounded = (
            part[rows][:, order].T.contiguous() for part in (scales, weight.qdata, values)
        )
        difference = rounded - target[rows][:, order].T
        for _ in range(passes):
            for column in range(0, len(gram), BLOCK_COLUMNS):
                _pass_block(
                    slice(column, min(column + BLOCK_COLUMNS, len(gram))),
                    gram,
                    divisors,
                    codes,
                    rounded,
                    difference,
                    weight,
                )
        found[rows, order] = codes.T
    return QuantizedTensor(found, weight.scale, weight.spec)


def _pass_block(
    block: slice,
    gram: Tensor,
    scales: Tensor,
    codes: Tensor,
    values: Tensor,
    difference: Tensor,
    weight: QuantizedTensor,
) -> None:
    """One pass over the columns of a block, in place.

    gram: H with damping, [in_features, in_features].
    scales, codes, values: of Q, transposed, [in_features, out_features].
    difference: Q − W, transposed, [in_features, out_features].
    weight: gives the number format.
    """
    slopes = gram[block] @ difference
    for place, column in enumerate(range(block.start, block.stop)):
        curvature = gram[column, column]
        if not curvature > 0:
            continue
        codes[column] = encode_codes(
            (values[column] - slopes[place] / curvature) / scales[column], weight.spec.format
        )
        change = codes[column].float() * scales[column] - values[column]
        values[column] += change
        difference[column] += change
        slopes[place + 1 :] += torch.outer(gram[column, column + 1 : block.stop], change)
