"""SmoothQuant (Xiao et al. 2022): move the difficulty of quantization from a Linear's inputs X to
its weight W, by a scale s for each input channel.

Y = X Wᵀ = (X diag(s)⁻¹) (W diag(s))ᵀ for any s > 0. A token's scale follows its largest value, so
one large channel of X costs precision in all others. The paper's scale for a strength α is

    s_j = max|X_j|^α / max|W_j|^(1-α)

The paper uses one α for a model. Here Linears that share an input are searched on their own: the
best candidate has the smallest error of quantized outputs, on rows that no candidate was computed
from. Candidates also use root mean squares instead of maxima, which a single outlier doesn't
dominate. For INT8 per channel, the scale is fitted (`smoothquant_fit`), starting from root mean
squares with α = ½.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from quantkit import ops
from quantkit.algorithms.smoothquant_fit import fitted_scale, has_uniform_steps, mean_squares
from quantkit.ops.reference import quantize
from quantkit.schemes.scheme import QuantScheme

STRENGTHS = tuple(step / 10 for step in range(3, 11))
# A channel that was hardly used gives no scale: its magnitude is raised to this fraction of the
# largest.
LEAST_SHARE = 1e-5
# From this many rows on, a quarter of them, at most HELD_OUT, is held out to compare candidates.
ROWS_TO_DIVIDE, HELD_OUT = 1024, 4096


@dataclass(frozen=True)
class Smoothing:
    """A smoothing scale, and what it gains.

    scale: s, [in_features] float32.
    strength: its α, or the α that the fit started from.
    measure: what its channel magnitudes are: "amax", "rms", or "fitted".
    error: squared error of the quantized outputs, over the squares of the exact outputs.
    plain_error: the same without smoothing.
    """

    scale: Tensor
    strength: float
    measure: str
    error: float
    plain_error: float


def smoothing_scale(inputs: Tensor, weight: Tensor, strength: float) -> Tensor:
    """The paper's s, normalized to a geometric mean of 1, [in_features] float32.

    inputs: max|X_j|, or another magnitude of each input channel, [in_features].
    weight: max|W_j| likewise, [in_features].
    strength: α.
    """
    x = inputs.clamp(min=max(float(inputs.max()) * LEAST_SHARE, 1e-30))
    w = weight.clamp(min=max(float(weight.max()) * LEAST_SHARE, 1e-30))
    log_scale = strength * x.log() - (1 - strength) * w.log()
    return (log_scale - log_scale.mean()).exp()


def output_error(
    rows: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    scale: Tensor | None,
    exact: Sequence[Tensor],
    importance: Tensor | None = None,
) -> float:
    """Squared error of quantized Linears' outputs, over the squares of the exact outputs. The
    arithmetic is that of the stored checkpoint: weight scales are rounded, inputs quantized.

    rows: X, [n, in_features].
    weights: W of each Linear, [out_features, in_features].
    schemes: of each Linear.
    scale: s, [in_features]; None for no smoothing.
    exact: X Wᵀ of each Linear, [n, out_features].
    importance: how much each row's error counts, [n, 1]; None for all alike.
    """
    importance = torch.ones(1, 1, device=rows.device) if importance is None else importance
    error = size = 0.0
    known: dict[object, Tensor] = {}
    for weight, scheme, expected in zip(weights, schemes, exact):
        if scheme.input not in known:
            smoothed = rows if scale is None else rows / scale
            known[scheme.input] = (
                smoothed if scheme.input is None else quantize(smoothed, scheme.input).dequantize()
            )
        values = ops.dequantize(
            ops.quantize(weight if scale is None else weight * scale, scheme.weight)
        )
        error += float(((known[scheme.input] @ values.T - expected).square() * importance).sum())
        size += float((expected.square() * importance).sum())
    return error / size if size else 0.0


def search_smoothing(
    rows: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    strength: float | None = None,
    tied_channels: Tensor | None = None,
    importance: Tensor | None = None,
) -> Smoothing | None:
    """The best s for Linears that share an input, or None where no smoothing is best.

    rows: X, [n, in_features].
    weights: W of each Linear, [out_features, in_features] float32.
    schemes: of each Linear.
    strength: α, or None to search it.
    tied_channels: for each input channel the number of a group that shares one scale (a value head
        that several query heads read), [in_features]; None where none are tied.
    importance: how much each row's error counts, [n, 1]; None for all alike.
    """
    (seen, counts), (held_out, held_out_importance) = _divided(rows, importance)
    held_out = held_out.float()
    exact = [held_out @ weight.T for weight in weights]

    def error(scale: Tensor | None) -> float:
        return output_error(held_out, weights, schemes, scale, exact, held_out_importance)

    plain = error(None)
    best: Smoothing | None = None
    for scale, alpha, measure in _candidates(
        seen, weights, schemes, strength, tied_channels, counts
    ):
        found = error(scale)
        if best is None or found < best.error:
            best = Smoothing(scale, alpha, measure, found, plain)
    assert best is not None, "there is always a candidate"
    return best if strength is not None or best.error < plain else None


def _divided(rows: Tensor, importance: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Rows to compute scales from, and held-out rows to compare candidates on, each with their
    importance. Where rows are few, both are all rows.
    """
    if len(rows) < ROWS_TO_DIVIDE:
        return [(rows, importance)] * 2
    border = len(rows) - min(len(rows) // 4, HELD_OUT)
    return [
        (rows[part], None if importance is None else importance[part])
        for part in (slice(border), slice(border, None))
    ]


def _candidates(
    rows: Tensor,
    weights: Sequence[Tensor],
    schemes: Sequence[QuantScheme],
    strength: float | None,
    groups: Tensor | None,
    importance: Tensor | None,
) -> Iterator[tuple[Tensor, float, str]]:
    """Candidate scales, each with its strength and measure (see Smoothing)."""
    largest = (
        rows.abs().amax(0).float(),
        torch.stack([weight.abs().amax(0) for weight in weights]).amax(0),
    )
    if strength is not None:
        yield _grouped_scale(*largest, strength, groups), strength, "amax"
        return
    typical = (
        mean_squares(rows, importance).sqrt(),
        reduce(torch.add, [weight.square().sum(0) for weight in weights]).sqrt(),
    )
    if all(has_uniform_steps(scheme) for scheme in schemes):
        begin = _grouped_scale(*typical, 0.5, groups)
        yield begin, 0.5, "rms"
        yield (
            fitted_scale(
                rows,
                weights,
                begin,
                any(scheme.input is not None for scheme in schemes),
                groups,
                importance,
            ),
            0.5,
            "fitted",
        )
        return
    for measure, measured in {"amax": largest, "rms": typical}.items():
        for alpha in STRENGTHS:
            yield _grouped_scale(*measured, alpha, groups), alpha, measure


def _grouped_scale(
    inputs: Tensor, weight: Tensor, strength: float, groups: Tensor | None
) -> Tensor:
    if groups is not None:
        inputs, weight = _largest_of_group(inputs, groups), _largest_of_group(weight, groups)
    return smoothing_scale(inputs, weight, strength)


def _largest_of_group(values: Tensor, groups: Tensor) -> Tensor:
    largest = torch.zeros(int(groups.max()) + 1, device=values.device).scatter_reduce(
        0, groups, values, "amax"
    )
    return largest[groups]
