"""SmoothQuant (Xiao et al. 2022): move the difficulty of quantizing from a Linear's inputs X to its weight W.

Y = X Wᵀ = (X diag(s)⁻¹) (W diag(s))ᵀ for any s > 0. A large channel of X costs all others their codes, because a token's scale follows its largest
value; divided by s it costs less, and the weight's columns, multiplied by s, have room to spare. The paper's scale for a strength α is

    s_j = max|X_j|^α / max|W_j|^(1-α)

It takes one α for a whole model. Here each set of Linears that read one input gets its own, the one whose quantized output is nearest to the exact
one, and root mean squares are tried in place of the maxima: a channel whose one outlier was seen once shouldn't be treated like one that is always large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import ops
from quantkit.quantize import quantize
from quantkit.scheme import QuantScheme

STRENGTHS = tuple(step / 10 for step in range(3, 11))
# A channel that was never or hardly used says nothing of its scale: it is taken for one this much smaller than the largest.
LEAST_SHARE = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """scale: s, [in_features] float32. error, plain_error: squared error of the quantized outputs with it and without, over that of the exact outputs."""

    scale: Tensor
    strength: float
    measure: str
    error: float
    plain_error: float


def smoothing_scale(inputs: Tensor, weight: Tensor, strength: float) -> Tensor:
    """s of the formula above with a geometric mean of 1. inputs, weight: what measures each channel's magnitude, [in_features]."""
    x = inputs.clamp(min=max(float(inputs.max()) * LEAST_SHARE, 1e-30))
    w = weight.clamp(min=max(float(weight.max()) * LEAST_SHARE, 1e-30))
    log_scale = strength * x.log() - (1 - strength) * w.log()
    return (log_scale - log_scale.mean()).exp()


def output_error(
    rows: Tensor, weights: Sequence[Tensor], schemes: Sequence[QuantScheme], scale: Tensor | None, exact: Sequence[Tensor], importance: Tensor | None = None
) -> float:
    """Squared error of what quantized Linears make of these rows [n, in_features], over the squares of the exact outputs.

    In the exact stored arithmetic: weights with their rounded scales, inputs as the scheme quantizes them. importance: of each row, [n, 1], or None for all alike.
    """
    importance = torch.ones(1, 1, device=rows.device) if importance is None else importance
    error = size = 0.0
    known: dict[object, Tensor] = {}
    for weight, scheme, expected in zip(weights, schemes, exact):
        if scheme.input not in known:
            smoothed = rows if scale is None else rows / scale
            known[scheme.input] = smoothed if scheme.input is None else quantize(smoothed, scheme.input).dequantize()
        values = ops.dequantize(ops.quantize(weight if scale is None else weight * scale, scheme.weight))
        error += float(((known[scheme.input] @ values.T - expected).square() * importance).sum())
        size += float((expected.square() * importance).sum())
    return error / size if size else 0.0


def search_smoothing(
    rows: Tensor, weights: Sequence[Tensor], schemes: Sequence[QuantScheme], strength: float | None = None, tied_channels: Tensor | None = None,
    importance: Tensor | None = None,
) -> Smoothing | None:  # fmt: skip
    """The best s for Linears that read one input, or None where leaving them alone is best.

    rows: inputs [n, in_features] float32; weights: [out_features, in_features] float32 each; strength: α, or None to search it. tied_channels: for each
    input channel the number of a group that must share a scale (heads of values that several query heads read), [in_features], or None. importance: of each
    row, [n, 1], or None.
    """
    exact = [rows @ weight.T for weight in weights]
    plain = output_error(rows, weights, schemes, None, exact, importance)
    measures = {"amax": (rows.abs().amax(0), torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))}
    if strength is None:
        squares = sum(weight.square().sum(0) for weight in weights)
        weighted = rows.square() if importance is None else rows.square() * importance
        measures["rms"] = (weighted.mean(0).sqrt(), squares.sqrt())
    best: Smoothing | None = None
    for measure, (x, w) in measures.items():
        if tied_channels is not None:
            x, w = _largest_of_group(x, tied_channels), _largest_of_group(w, tied_channels)
        for alpha in STRENGTHS if strength is None else (strength,):
            scale = smoothing_scale(x, w, alpha)
            error = output_error(rows, weights, schemes, scale, exact, importance)
            if best is None or error < best.error:
                best = Smoothing(scale, alpha, measure, error, plain)
    return best if strength is not None or best.error < plain else None


def _largest_of_group(values: Tensor, groups: Tensor) -> Tensor:
    largest = torch.zeros(int(groups.max()) + 1, device=values.device).scatter_reduce(0, groups, values, "amax")
    return largest[groups]
