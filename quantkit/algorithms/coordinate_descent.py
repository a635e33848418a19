"""Coordinate descent on codes (QuantEase, Behdin et al. 2023): choose each code anew with all
others fixed, until that has been done a few times.

For the codes Q of a weight W and the Gram matrix H of the quantized Linear's inputs, ‖(W − Q) X̂‖²
is a quadratic function of one column q_j, least at

    q_j − ((Q − W) H)_j / H_jj

The nearest of the values that the scale allows is therefore the best of them: a pass never raises
the error. GPTQ's codes, where it starts, were chosen when the columns behind them were not yet
rounded; a pass sees all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops.reference import QuantizedTensor, encode_codes, expand_scale

# Columns beyond a block see the block's changes in one product.
BLOCK_COLUMNS = 128
ROWS = 4096


def descend(
    target: Tensor, weight: QuantizedTensor, hessian: Tensor, passes: int, damping: float = 0.0
) -> QuantizedTensor:
    """Better codes for the same scales.

    target: W, [out_features, in_features] float32; weight: Q, of the same shape; hessian: H,
    [in_features, in_features]. damping: added to H's diagonal, as a fraction of its mean, so that
    codes don't fit the noise of a small calibration. The columns with the smallest inputs come
    first: the others then make up for them.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, stable=True)
    gram = hessian[order][:, order].contiguous()
    gram.diagonal().add_(diagonal.mean() * damping)
    scales = expand_scale(weight.scale, weight.spec.granularity, *target.shape).expand(target.shape)
    found, values = torch.empty_like(weight.qdata), weight.dequantize()
    # Rows know nothing of each other: so many at a time bound the memory that a large matrix takes.
    for first in range(0, len(target), ROWS):
        rows = slice(first, first + ROWS)
        # Columns lie one after the other here: each step reads and writes whole ones.
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
    """A pass over some columns, in place. scales, codes, values, difference: [in_features,
    out_features].
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
