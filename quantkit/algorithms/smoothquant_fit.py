"""The smoothing scale s (see `smoothquant`) with the least rounding noise, for INT8 per channel and
per token: codes are then evenly spaced, and the noise has a closed form.

A token's codes are max|x_t| / 127 apart, those of a weight row max|W_o| / 127. Rounding adds noise
with a variance of a twelfth of that step squared. With inputs x_t divided by s and weight columns
multiplied by s, the noise of the outputs is, up to a constant factor,

    A B + C D    with    A = Σ_t c_t max_j (x_tj / s_j)²    B = Σ_oj (W_oj s_j)²
                         C = Σ_o max_j (W_oj s_j)²          D = Σ_tj c_t (x_tj / s_j)²

where c_t is the importance of token t. Its logarithm is convex in log s, so there is one minimum
(Boyd et al. 2007, "A tutorial on geometric programming"). Adam (Kingma and Ba 2015) descends to it.
A weak pull to the start keeps channels there that few tokens use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantkit.schemes.number_formats import INT8
from quantkit.schemes.quant_spec import CHANNEL, TOKEN
from quantkit.schemes.scheme import QuantScheme

STEPS = 40
# Adam's learning rate for log s in the first step; it falls linearly to zero.
STEP_SIZE = 0.05
# How strongly log s is pulled to its start.
HOLD = 1e-3
# So many rows at a time fit a processor's cache.
ROWS_AT_ONCE = 256


def has_uniform_steps(scheme: QuantScheme) -> bool:
    """Whether codes are evenly spaced: INT8 weights per channel, and inputs per token or
    unquantized.
    """
    weight, inputs = scheme.weight, scheme.input
    return (
        weight.format == INT8
        and weight.granularity == CHANNEL
        and (inputs is None or (inputs.format == INT8 and inputs.granularity == TOKEN))
    )


def mean_squares(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Σ_t c_t x_tj² / Σ_t c_t, [in_features] float32.

    rows: x, [n, in_features].
    importance: c, [n, 1]; None for ones.
    """
    counts = torch.ones(len(rows), 1, device=rows.device) if importance is None else importance
    return (
        sum((chunk.float().square() * count).sum(0) for chunk, count in _chunks(rows, counts))
        / counts.sum()
    )


def fitted_scale(
    rows: Tensor,
    weights: Sequence[Tensor],
    begin: Tensor,
    quantizes_inputs: bool,
    tied_channels: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """s with a geometric mean of 1, [in_features] float32.

    rows: x, [n, in_features].
    weights: W of each Linear that reads x, [out_features, in_features] float32.
    begin: the scale to start from, [in_features].
    quantizes_inputs: False drops the term A B.
    tied_channels: for each input channel the number of a group that shares one scale,
        [in_features]; None where none are tied.
    importance: c, [n, 1]; None for ones.
    """
    groups = (
        torch.arange(len(begin), device=begin.device) if tied_channels is None else tied_channels
    )
    counts = torch.ones(len(rows), 1, device=rows.device) if importance is None else importance
    matrix = torch.cat(list(weights))
    rows_of_weights = torch.ones(len(matrix), 1, device=matrix.device)
    columns, squares = matrix.square().sum(0), mean_squares(rows, counts)
    counts = counts / counts.sum()
    start = torch.zeros(int(groups.max()) + 1, device=begin.device)
    start[groups] = begin.float().log()
    logs, momentum, speed = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(STEPS):
        scale = logs[groups].exp()
        passed, largest_of_weights, spread = (
            columns * scale**2,
            _largest(matrix, scale, rows_of_weights),
            squares / scale**2,
        )
        noise = largest_of_weights.sum() * spread.sum()
        gradient = largest_of_weights * spread.sum() - spread * largest_of_weights.sum()
        if quantizes_inputs:
            largest = _largest(rows, 1 / scale, counts)
            noise = noise + largest.sum() * passed.sum()
            gradient = gradient + passed * largest.sum() - largest * passed.sum()
        if not noise > 0:
            break
        slope = torch.zeros_like(logs).index_add_(0, groups, 2 * gradient / noise) + HOLD * (
            logs - start
        )
        momentum, speed = 0.9 * momentum + 0.1 * slope, 0.99 * speed + 0.01 * slope**2
        direction = (
            momentum / (1 - 0.9 ** (step + 1)) / ((speed / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        )
        logs = logs - STEP_SIZE * (1 - step / STEPS) * direction
    found = logs[groups]
    return (found - found.mean()).exp()


def _largest(rows: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """Σ_t c_t max_j (x_tj f_j)², split into the parts of each channel j that holds a row's maximum,
    [in_features].

    rows: x, [n, in_features]; factors: f, [in_features]; counts: c, [n, 1].
    """
    found = torch.zeros_like(factors)
    for chunk, count in _chunks(rows, counts):
        values, places = (chunk.float().abs() * factors).max(1)
        found.index_add_(0, places, values.square() * count[:, 0])
    return found


def _chunks(rows: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(rows.split(ROWS_AT_ONCE), counts.split(ROWS_AT_ONCE))
