"""The reference arithmetic: choose scales, quantize, dequantize, multiply. Kernels are tested
against this file.

The same code handles every granularity, because a granularity is the shape of a block
(`quant_spec.Granularity`). All arithmetic is float32. Values are divided by their scale, not
multiplied by its reciprocal: the two can differ in the last bit, and then in the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.schemes.number_formats import E8M0, FP8_E4M3, NumberFormat
from quantkit.schemes.quant_spec import Granularity, QuantSpec

# Smallest dynamic per-token scales, as in vLLM, because eval must compute what a server computes.
FP8_DYNAMIC_FLOOR = 1.0 / (448.0 * 512.0)
INT8_DYNAMIC_FLOOR = torch.finfo(torch.float32).eps
# The smallest normal float32, exact in bfloat16 too. Division by a smaller number can overflow.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized matrix: codes, and the scales that multiply them into values.

    qdata: [rows, columns] in the format's torch dtype.
    scale: [block rows, block columns] float32, which is `granularity.scale_shape` of qdata's shape.
    spec: how the matrix was quantized.
    zero_point: always None, because every format that quantkit writes is symmetric.
    """

    qdata: Tensor
    scale: Tensor
    spec: QuantSpec
    zero_point: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values that the codes represent, [rows, columns] float32."""
        return dequantize(self.qdata, self.scale, self.spec.granularity)


def block_amax(values: Tensor, granularity: Granularity) -> Tensor:
    """The largest magnitude in each block.

    values: [rows, columns].

    Returns [block rows, block columns] float32. A NaN in a block makes its amax NaN.
    """
    rows, columns = values.shape
    blocks_down, blocks_across = granularity.scale_shape(rows, columns)
    if rows == 0 or columns == 0:
        return values.new_zeros(blocks_down, blocks_across, dtype=torch.float32)
    magnitudes = _in_blocks(values.abs(), granularity)
    return magnitudes.amax(dim=(1, 3)).float()


def block_sum(values: Tensor, granularity: Granularity) -> Tensor:
    """The sum of each block.

    values: [rows, columns].

    Returns [block rows, block columns] float32.
    """
    rows, columns = values.shape
    if rows == 0 or columns == 0:
        return values.new_zeros(granularity.scale_shape(rows, columns), dtype=torch.float32)
    return _in_blocks(values.float(), granularity).sum(dim=(1, 3))


def choose_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of each block, as it will be stored: it maps the block's amax to the format's
    largest code.

    amax: [block rows, block columns].

    Returns the same shape, float32. A block of zeros gets the scale 1, which keeps it zero.

    Static scales are rounded to bfloat16. Some runtimes keep scales in float32 and others cast them
    to the model's dtype; a scale that is exact in bfloat16 is the same in both. Codes are clamped,
    so rounding down changes only the largest value, by at most 0.2 %. Dynamic scales follow vLLM's
    formula and lower limit.
    """
    amax = amax.float()
    if spec.scale_format == E8M0:
        return _power_of_two_scale(amax, spec.format)
    # The divisor is a tensor: on CUDA, torch would multiply by a Python number's reciprocal.
    scale = amax / amax.new_full((), spec.format.max)
    if spec.dynamic:
        is_int = spec.format.kind == "int"
        return scale.clamp(min=INT8_DYNAMIC_FLOOR if is_int else FP8_DYNAMIC_FLOOR)
    stored = scale.bfloat16().float().clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, torch.ones_like(stored), stored)


def _power_of_two_scale(amax: Tensor, number_format: NumberFormat) -> Tensor:
    """The smallest power of two that fits each block without clipping, as runtimes compute it.

    Rounding the exponent down, as in the OCP specification's example, would saturate the top eighth
    of each octave.
    """
    # amax = m·2^e with m in [0.5, 1), and max = M·2^E. This is exact; a float32 log2 would be off
    # by one near powers of two.
    mantissa, exponent = torch.frexp(amax)
    largest_mantissa, largest_exponent = math.frexp(number_format.max)
    exponent = (exponent - largest_exponent + (mantissa > largest_mantissa)).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(amax), exponent)
    return torch.where(amax == 0, torch.ones_like(scale), torch.where(amax.isfinite(), scale, amax))


def code_dtype(number_format: NumberFormat) -> torch.dtype:
    """The torch dtype of a format's codes."""
    return getattr(torch, number_format.torch_name)


def encode_codes(scaled: Tensor, number_format: NumberFormat) -> Tensor:
    """Codes of float32 values that are already divided by their scale: round half to even, clamp,
    cast.

    The clamp comes before the cast, because an INT8 cast wraps, and an FP8 cast saturates or gives
    NaN depending on torch's version.
    """
    clamped = (scaled.round() if number_format.kind == "int" else scaled).clamp(
        number_format.min, number_format.max
    )
    return clamped.to(code_dtype(number_format))


def quantize(values: Tensor, spec: QuantSpec, scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize a matrix.

    values: [rows, columns].
    scale: [block rows, block columns]; None chooses it from the values.
    """
    if scale is None:
        scale = choose_scale(block_amax(values, spec.granularity), spec)
    scaled = values.float() / expand_scale(scale, spec.granularity, *values.shape)
    return QuantizedTensor(encode_codes(scaled, spec.format), scale, spec)


def dequantize(codes: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """Codes times scales, [rows, columns] float32."""
    return codes.float() * expand_scale(scale, granularity, *codes.shape)


def expand_scale(scale: Tensor, granularity: Granularity, rows: int, columns: int) -> Tensor:
    """Scales [block rows, block columns] as a matrix that broadcasts to [rows, columns]."""
    block_rows, block_columns = granularity.block_shape(rows, columns)
    if 1 < scale.shape[0] < rows:
        scale = scale.repeat_interleave(block_rows, dim=0)[:rows]
    if 1 < scale.shape[1] < columns:
        scale = scale.repeat_interleave(block_columns, dim=1)[:, :columns]
    return scale


def _in_blocks(values: Tensor, granularity: Granularity) -> Tensor:
    """[rows, columns] as [block rows, rows per block, block columns, columns per block],
    zero-padded at the ends.
    """
    rows, columns = values.shape
    block_rows, block_columns = granularity.block_shape(rows, columns)
    blocks_down, blocks_across = granularity.scale_shape(rows, columns)
    missing_rows, missing_columns = (
        blocks_down * block_rows - rows,
        blocks_across * block_columns - columns,
    )
    if missing_rows or missing_columns:
        values = torch.nn.functional.pad(values, (0, missing_columns, 0, missing_rows))
    return values.reshape(blocks_down, block_rows, blocks_across, block_columns)


def quantized_linear(
    inputs: Tensor,
    weight: QuantizedTensor,
    input_spec: QuantSpec | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The output of one quantized Linear, as a runtime computes it; the reference of every GEMM
    kernel.

    inputs: [tokens, in_features].
    weight: its qdata is [out_features, in_features].
    input_spec: how inputs are quantized; None if they aren't.
    input_scale: the static scale [1]; None if the scheme is dynamic or doesn't quantize inputs.
    bias: [out_features] or None.

    Returns [tokens, out_features] in the dtype of the inputs.

    Products of codes are accumulated in int32 (INT8, exact) or float32 (FP8). Scales and bias are
    applied in float32, and the result is rounded once. If scales change along in_features (groups,
    blocks), the operands are dequantized first: the same sum in another order.
    """
    weight_scale = weight.scale
    if input_spec is None:
        activations, scale = inputs.float(), None
    else:
        fixed = None if input_scale is None else input_scale.reshape(1, 1).float()
        quantized = quantize(inputs, input_spec, fixed)
        activations, scale = quantized.qdata, quantized.scale
    if input_spec is None or scale is None:
        output = activations @ weight.dequantize().T
    elif weight_scale.shape[1] > 1 or scale.shape[1] > 1:
        values = dequantize(activations, scale, input_spec.granularity)
        output = values @ weight.dequantize().T
    else:
        output = _code_products(activations, weight.qdata)
        per_output = expand_scale(weight_scale, weight.spec.granularity, *weight.qdata.shape)
        output = output.mul_(scale).mul_(per_output.reshape(1, -1))
    if bias is not None:
        output = output + bias.float()
    return output.to(inputs.dtype)


def _code_products(activations: Tensor, weight: Tensor) -> Tensor:
    """Sums of products of codes, [tokens, out_features] float32.

    An INT8 sum is exact until it is converted to float32.
    """
    if activations.dtype == torch.int8:
        if activations.device.type == "cpu" and activations.shape[0] and activations.shape[1]:
            return torch._int_mm(activations, weight.T).float()
        # float64 holds every sum of fewer than 2^37 products of two bytes exactly.
        return (activations.double() @ weight.double().T).float()
    return activations.float() @ weight.float().T


def sqnr_db(reference: Tensor, approximation: Tensor, dim: int | None = None) -> Tensor:
    """Signal-to-quantization-noise ratio 10·log₁₀(Σx²/Σ(x−x̂)²) in dB, float64.

    dim: dimension of the sums; None sums over all elements.
    """
    signal = reference.double().square()
    noise = (reference.double() - approximation.double()).square()
    if dim is None:
        return power_ratio_db(signal.sum(), noise.sum())
    return power_ratio_db(signal.sum(dim), noise.sum(dim))


def power_ratio_db(signal: Tensor, noise: Tensor) -> Tensor:
    """10·log₁₀(signal/noise) of sums of squares: +inf without noise, −inf for noise without
    signal.
    """
    return torch.where(noise == 0, torch.inf, 10 * torch.log10(signal / noise))


def power_ratio_db_of_floats(signal: float, noise: float) -> float:
    """`power_ratio_db` of two Python numbers."""
    return math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def kv_scale(amax: Tensor) -> Tensor:
    """The static FP8 scale of keys or values with this amax, [1] float32."""
    return choose_scale(
        amax.reshape(1, 1), QuantSpec(FP8_E4M3, Granularity("tensor", None, None))
    ).reshape(1)
