"""GPTQ (Frantar et al. 2022): round a weight's columns one after the other, and let the columns
that follow compensate for each error.

The codes Q minimize ‖(W − Q) X̂‖², where X̂, [in_features, tokens], are the quantized inputs of the
quantized Linear. With H = X̂ X̂ᵀ, U the upper Cholesky factor of H⁻¹, and column j rounded to q_j,

    e = (w_j − q_j) / U_jj        w_k ← w_k − e U_jk  for k > j

With `correct_inputs`, W is first replaced by W*, the least-squares fit of W X from X̂, where X are
the inputs before they are quantized:

    W* = W + W (X − X̂) X̂ᵀ H⁻¹

‖W X − Q X̂‖² is ‖(W* − Q) X̂‖² plus a constant. The fit reduces the weight of inputs that are mostly
rounding noise. It has in_features² parameters: where the noise is small, it overfits the
calibration text.

Coordinate descent (coordinate_descent.py) then rounds columns again while all others are known.
Scales are given, or absmax scales. The codes and scales are stored as they are here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.coordinate_descent import descend
from quantkit.algorithms.layer_group import INPUT_SUMS, InputSums, LayerGroup, Needs
from quantkit.checkpoint.units import counted
from quantkit.ops.reference import (
    QuantizedTensor,
    block_amax,
    choose_scale,
    encode_codes,
    expand_scale,
    quantize,
)
from quantkit.schemes.algorithms import Description
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.recipe import Algorithm

# Columns after a block receive the errors of the whole block in one matrix product.
BLOCK_COLUMNS = 128
# If the Cholesky decomposition fails, damping is raised tenfold, at most this often.
RETRIES = 3


@dataclass(frozen=True)
class Solution:
    """Codes of one weight. Errors are ‖(W − Q) X̂‖², with W* for W where it was fitted.

    weight: codes and scales.
    error: of these codes.
    plain_error: of rounding to nearest.
    fallback: why the weight was rounded to nearest; "" where it wasn't.
    """

    weight: QuantizedTensor
    error: float
    plain_error: float
    fallback: str = ""


def corrected_weight(weight: Tensor, hessian: Tensor, deviation: Tensor, damping: float) -> Tensor:
    """W*, [out_features, in_features] float32.

    weight: W, [out_features, in_features] float32.
    hessian: X̂ X̂ᵀ, [in_features, in_features].
    deviation: (X − X̂) X̂ᵀ, [in_features, in_features].
    damping: added to the Hessian's diagonal, as a fraction of its mean; it pulls W* towards W.
    """
    factor = _cholesky(hessian, damping)
    if factor is None:
        return weight
    return weight + torch.cholesky_solve((weight.double() @ deviation.double()).T, factor).T.float()


def gptq(
    weight: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    target: Tensor | None = None,
    damping: float = 0.03,
    act_order: bool = True,
    scale: Tensor | None = None,
    passes: int = 3,
) -> Solution:
    """Codes and scales of a weight.

    weight: W, [out_features, in_features] float32.
    spec: the number format and granularity of the codes.
    hessian: H, [in_features, in_features].
    target: W*, [out_features, in_features]; None for W itself.
    damping: added to the Hessian's diagonal, as a fraction of its mean; raise it when codes overfit
        a small calibration.
    act_order: round columns with the largest inputs first, while the most columns can still
        compensate. The order isn't stored.
    scale: [block rows, block columns]; None for the absmax scale.
    passes: of coordinate descent after GPTQ.
    """
    target = weight if target is None else target
    plain = quantize(weight, spec, scale)
    plain_error = _error(plain.dequantize(), target, hessian)
    factor = _inverse_factor(hessian, damping, act_order)
    if factor is None:
        return Solution(
            plain,
            plain_error,
            plain_error,
            "the Gram matrix of its inputs can't be inverted, even with more damping",
        )
    scale = choose_scale(block_amax(target, spec.granularity), spec) if scale is None else scale
    order, upper = factor
    codes = _round_in_order(target, spec, scale, order, upper)
    solved = descend(target, QuantizedTensor(codes, scale, spec), hessian, passes, damping)
    error = _error(solved.dequantize(), target, hessian)
    if not error < plain_error:
        return Solution(
            plain, plain_error, plain_error, "rounding to nearest has the smaller error here"
        )
    return Solution(solved, error, plain_error)


def _error(values: Tensor, target: Tensor, hessian: Tensor) -> float:
    difference = (values - target).double()
    # Floating-point rounding may give a small negative number.
    return max(0.0, float(((difference @ hessian.double()) * difference).sum()))


def _cholesky(hessian: Tensor, damping: float) -> Tensor | None:
    """The lower Cholesky factor of the damped Hessian, [in_features, in_features] float64; None
    where it has none.
    """
    damped = hessian.double()
    mean = damped.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        return None
    for retry in range(RETRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(
            damped
            + torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
            * mean
            * damping
            * 10**retry
        )
        if not failed:
            return lower
    return None


def _inverse_factor(
    hessian: Tensor, damping: float, act_order: bool
) -> tuple[Tensor, Tensor] | None:
    """The order of the columns, [in_features], and U in that order, [in_features, in_features]: the
    upper Cholesky factor of the inverse of the damped Hessian. None where it can't be inverted.
    """
    diagonal = hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=diagonal.device)
    )
    lower = _cholesky(hessian[order][:, order], damping)
    if lower is None:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else (order, upper.float())


def _round_in_order(
    target: Tensor, spec: QuantSpec, scale: Tensor, order: Tensor, upper: Tensor
) -> Tensor:
    """The paper's algorithm 1; returns codes, [out_features, in_features].

    target: the weight to round, [out_features, in_features].
    scale: [block rows, block columns].
    order, upper: the order of the columns, and U in that order.
    """
    rows, columns = target.shape
    remaining = target[:, order].contiguous()
    scales = expand_scale(scale, spec.granularity, rows, columns).expand(rows, columns)[:, order]
    codes = torch.empty(
        rows, columns, dtype=getattr(torch, spec.format.torch_name), device=target.device
    )
    places = order.tolist()
    for first in range(0, columns, BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, columns)
        # Transposed and contiguous: each step reads and writes whole columns of the weight.
        block = remaining[:, first:last].T.contiguous()
        errors = torch.empty_like(block)
        factor = upper[first:last, first:last]
        for column in range(last - first):
            divisor = scales[:, first + column]
            rounded = encode_codes(block[column] / divisor, spec.format)
            codes[:, places[first + column]] = rounded
            errors[column] = (block[column] - rounded.float() * divisor) / factor[column, column]
            # Only to the block's end: columns after it receive the whole block's errors below.
            block[column + 1 :] -= torch.outer(factor[column, column + 1 :], errors[column])
        remaining[:, last:] -= errors.T @ upper[first:last, last:]
    return codes


# ---- As a step of the block quantizer.


def needs(settings: Algorithm) -> Needs:
    return INPUT_SUMS | Needs(gram=True, deviation=settings["correct_inputs"])


def quantize_group(group: LayerGroup, settings: Algorithm) -> None:
    """Make codes for all Linears of the group. Where no token reached it, they are left to rounding
    to nearest.
    """
    if any(linear.inputs is None for linear in group.linears.values()):
        for linear in group.linears.values():
            linear.described |= {"error": 0.0, "plain_error": 0.0, "reason": "no token reached it"}
        return
    targets = _targets(group, settings)
    scales = group.scales(targets)

    def solve(path: str) -> tuple[QuantizedTensor, tuple[float, float, str]]:
        linear = group.linears[path]
        solution = gptq(
            linear.weight,
            linear.scheme.weight,
            _hessian(linear.inputs),
            targets[path],
            settings["damping"],
            settings["act_order"],
            scales[path],
            settings["passes"],
        )
        return solution.weight, (solution.error, solution.plain_error, solution.fallback)

    for path, (error, plain_error, fallback) in group.make_codes(solve).items():
        group.linears[path].described |= {
            "algorithm": "rtn" if fallback else "gptq",
            "error": error,
            "plain_error": plain_error,
        } | ({"reason": fallback} if fallback else {})


def _targets(group: LayerGroup, settings: Algorithm) -> dict[str, Tensor]:
    """W* of each Linear by its path, or W without `correct_inputs`."""
    paths = list(group.linears)

    def correct(index: int) -> Tensor:
        linear = group.linears[paths[index]]
        if linear.inputs is None or linear.inputs.deviation is None:
            return linear.weight
        return corrected_weight(
            linear.weight, _hessian(linear.inputs), linear.inputs.deviation, settings["damping"]
        )

    return dict(zip(paths, group.workers.each(correct, range(len(paths)))))


def _hessian(inputs: InputSums | None) -> Tensor:
    assert inputs is not None and inputs.hessian is not None, "needs() asks for the Gram matrix"
    return inputs.hessian


def describe(report: Mapping[str, Any]) -> Description:
    return Description(tuple(_remarks(report["linears"])))


def _remarks(linears: list[dict[str, Any]]) -> Iterator[str]:
    rounded = [entry for entry in linears if entry["algorithm"] == "rtn"]
    yield f"gptq: codes of {counted(len(linears) - len(rounded), 'Linear')}"
    for reason, count in Counter(entry.get("reason", "") for entry in rounded).items():
        first = next(entry["name"] for entry in rounded if entry.get("reason", "") == reason)
        others = f" and {count - 1} others" if count > 1 else ""
        yield f"gptq rounded {first}{others} to nearest: {reason}"
