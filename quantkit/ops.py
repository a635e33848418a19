"""torch.ops.quantkit.*: each op's schema, its compiled CPU kernel where there is one, its reference everywhere else, its fake. CUDA kernels: cuda_ops.py.

    block_amax(values, block_rows, block_columns) -> amax
    encode_blocks(values, scale, block_rows, block_columns, format) -> codes
    quantize_blocks(values, block_rows, block_columns, format, rule) -> (codes, scale)
    dequantize_blocks(codes, scale, block_rows, block_columns, dtype=float32) -> values
    quantize_rows(rows, group, format, rule) -> (codes, scale): activations, each row cut into groups; a group as long as a row is per token
    observe_rows(rows, above, channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts): adds what calibration keeps
    quantize_kv(states, scale, format) -> codes: keys and values [batch, heads, tokens, width] by static scales, [1] or [heads]
    pack_weight(codes, packing) -> packed
    matmul_int8(activations, activation_scale, packed, weight_scale, group, zero_point, weight_sums, bias, dtype) -> output
    matmul_fp8(activations, activation_scale, packed, weight_scale, group, powers_of_two, bias, dtype) -> output
    matmul_weight_only(inputs, packed, packing, weight_scale, group, powers_of_two, bias, dtype) -> output
    matmul_bf16(inputs, packed, out_features, bias, dtype) -> output

A matrix [rows, columns] is cut into blocks of block_rows × block_columns, the last ones as large as what is left; amax and scale are
[block rows, block columns] float32. format: a NumberFormat's name. rule, how a scale follows from an amax: "stored" (rounded to bfloat16 for a
file), "power_of_two" (E8M0) or "dynamic" (a server's, with its floor). Kernels: kernels/cpu/quantize_blocks.cpp, equal to quantize.py bit for
bit for finite values; NaN gives NaN scales. They run in the calling thread without Python's lock, so callers may use several threads. observe_rows:
kernels/cpu/observe_rows.cpp.

Multiplications: activations are codes, or bfloat16 `inputs`, [tokens, in_features]; packed is a weight as pack_weight arranged it (PACKINGS, and
QkPacking in kernels/cpu/matmul.h; on CUDA as it is, rows padded to 16 bytes); output is [tokens, out_features] in `dtype`, bfloat16, float16 or float32. activation_scale: [tokens or 1,
groups or 1] float32; weight_scale: [groups or 1, out_features] float32; group: in_features that share scales, a multiple of 4 if there are several
groups. powers_of_two: all scales are (MX). bias: [out_features] float32. zero_point: [tokens] or [1] int32, of the activations; then weight_sums, [out_features]
int32, the sum of each output feature's codes, and one group. Sums are int32, exact below 131072 in_features, or float32. They run on
torch.get_num_threads() threads. Kernels: kernels/cpu/matmul_*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit import cuda_ops
from quantkit import quantize as reference
from quantkit.arguments import (
    FORMAT_NUMBERS,
    FORMATS,
    INPUT_NUMBERS,
    PACKINGS,
    ROW_UNIT,
    RULE_NUMBERS,
    SCALE_BLOCK,
    activation_scales,
    check_codes,
    check_states,
    out_features_of,
    packed_dtype,
    plain_weight,
    pointer,
    rows_dense,
    side,
    weight_scales,
)
from quantkit.formats import E8M0
from quantkit.native import cpu_kernels
from quantkit.quantize import QuantizedTensor
from quantkit.scheme import QuantSpec, block

_STATISTICS = {
    "channel_amax": torch.float32,
    "channel_sum_of_squares": torch.float64,
    "histogram": torch.int64,
    "token_histogram": torch.int64,
    "extremes": torch.float32,
    "counts": torch.int64,
}

# |x| is binned by the top bits of its float32: 8 of exponent, 4 of mantissa, so 16 bins an octave, from 2^-32 to 2^32. Fixed bins, so histograms add.
HISTOGRAM_BINS = 1024
HISTOGRAM_SHIFT = 19
HISTOGRAM_OFFSET = (127 - 32) << 4
_PACKED_TOGETHER = {"int8_dot": 4, "int8": 1, "e4m3": 1, "bf16": 2}  # input features side by side
_PANEL, _INNER_UNIT = 16, 64
_CHUNK = 64  # rows whose squares are summed in float32 before they go to float64


# ---- Schemas, and how a QuantSpec speaks to them.

_library = torch.library.Library("quantkit", "DEF")
_library.define("block_amax(Tensor values, int block_rows, int block_columns) -> Tensor")
_library.define("encode_blocks(Tensor values, Tensor scale, int block_rows, int block_columns, str format) -> Tensor")
_library.define("quantize_blocks(Tensor values, int block_rows, int block_columns, str format, str rule) -> (Tensor, Tensor)")
_library.define("dequantize_blocks(Tensor codes, Tensor scale, int block_rows, int block_columns, ScalarType? dtype=None) -> Tensor")
_library.define(
    "observe_rows(Tensor rows, float above, Tensor(a!) channel_amax, Tensor(b!) channel_sum_of_squares, Tensor(c!) histogram, "
    "Tensor(d!) token_histogram, Tensor(e!) extremes, Tensor(f!) counts) -> ()"
)

_library.define("quantize_rows(Tensor rows, int group, str format, str rule) -> (Tensor, Tensor)")
_library.define("quantize_kv(Tensor states, Tensor scale, str format) -> Tensor")
_library.define("pack_weight(Tensor codes, str packing) -> Tensor")
_library.define(
    "matmul_int8(Tensor activations, Tensor activation_scale, Tensor packed, Tensor weight_scale, int group, Tensor? zero_point, Tensor? weight_sums, "
    "Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define(
    "matmul_fp8(Tensor activations, Tensor activation_scale, Tensor packed, Tensor weight_scale, int group, bool powers_of_two, Tensor? bias, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "matmul_weight_only(Tensor inputs, Tensor packed, str packing, Tensor weight_scale, int group, bool powers_of_two, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define("matmul_bf16(Tensor inputs, Tensor packed, int out_features, Tensor? bias, ScalarType dtype) -> Tensor")


def quantize(values: Tensor, spec: QuantSpec, amax: Tensor | None = None) -> QuantizedTensor:
    """values [rows, columns] under `spec`, with scales from the values' own amax or from the one given (shared by a fused set)."""
    blocks = spec.granularity.block_shape(*values.shape)
    if amax is None:
        codes, scale = torch.ops.quantkit.quantize_blocks(values, *blocks, spec.format.name, scale_rule(spec))
    else:
        scale = reference.choose_scale(amax, spec)
        codes = torch.ops.quantkit.encode_blocks(values, scale, *blocks, spec.format.name)
    return QuantizedTensor(codes, scale, spec)


def dequantize(quantized: QuantizedTensor) -> Tensor:
    """The values the codes stand for, [rows, columns] float32."""
    blocks = quantized.spec.granularity.block_shape(*quantized.qdata.shape)
    return torch.ops.quantkit.dequantize_blocks(quantized.qdata, quantized.scale, *blocks)


def scale_rule(spec: QuantSpec) -> str:
    if spec.scale_format is E8M0:
        return "power_of_two"
    return "dynamic" if spec.dynamic else "stored"


def histogram_edges() -> Tensor:
    """Lower edge of each bin of |x|, [HISTOGRAM_BINS] float32. The first bin holds all below its end, the last all from its edge on, and NaN."""
    edges = (torch.arange(HISTOGRAM_BINS, dtype=torch.int32) + HISTOGRAM_OFFSET << HISTOGRAM_SHIFT).view(torch.float32)
    edges[0] = 0.0
    return edges


# ---- Reference, for every device and for what the kernels don't take.


def _spec(format_name: str, rule: str, block_rows: int, block_columns: int) -> QuantSpec:
    return QuantSpec(FORMATS[format_name], block(block_rows, block_columns), rule == "dynamic", E8M0 if rule == "power_of_two" else None)


def _reference_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return reference.block_amax(values, block(block_rows, block_columns))


def _reference_encode_blocks(values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str) -> Tensor:
    return reference.quantize(values, _spec(format, "stored", block_rows, block_columns), scale).qdata


def _reference_quantize_blocks(values: Tensor, block_rows: int, block_columns: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    quantized = reference.quantize(values, _spec(format, rule, block_rows, block_columns))
    return quantized.qdata, quantized.scale


def _reference_dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype | None = None) -> Tensor:
    return reference.dequantize(codes, scale, block(block_rows, block_columns)).to(dtype or torch.float32)


def _reference_observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    """Add the statistics of rows [tokens, features], of any floating-point type, to:

    channel_amax: [features] float32, of |x|. A NaN makes it NaN.
    channel_sum_of_squares: [features] float64. Chunks of 64 rows, counted from the first of this call, are summed row by row in float32.
    histogram: [HISTOGRAM_BINS] int64 of |x|; NaN is in the last bin.
    token_histogram: [HISTOGRAM_BINS] int64 of each row's largest |x|.
    extremes: [2] float32, minimum and maximum, without the sign of zeros. A NaN makes both NaN.
    counts: [2] int64, rows, and how many |x| > above, compared in float32; NaN is not above.
    """
    _check_statistics(rows, channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts)
    counts[0] += rows.shape[0]
    if not rows.numel():
        return
    values = rows.detach().float()
    magnitudes = values.abs()
    torch.maximum(channel_amax, magnitudes.amax(0), out=channel_amax)
    chunks = torch.nn.functional.pad(values.square(), (0, 0, 0, -rows.shape[0] % _CHUNK)).unflatten(0, (-1, _CHUNK))
    for chunk_sum in sum(chunks.unbind(1)):
        channel_sum_of_squares += chunk_sum
    histogram += _count_bins(magnitudes)
    token_histogram += _count_bins(magnitudes.amax(1))
    low, high = values.aminmax()
    extremes.copy_(torch.stack([torch.minimum(extremes[0], low + 0.0), torch.maximum(extremes[1], high + 0.0)]))
    counts[1] += (magnitudes > torch.tensor(above, dtype=torch.float32)).sum()


def _count_bins(magnitudes: Tensor) -> Tensor:
    """[HISTOGRAM_BINS] int64."""
    # A NaN keeps its sign bit through abs().
    keys = (magnitudes.contiguous().view(torch.int32) & 0x7FFFFFFF) >> HISTOGRAM_SHIFT
    return torch.bincount((keys - HISTOGRAM_OFFSET).clamp_(0, HISTOGRAM_BINS - 1).flatten(), minlength=HISTOGRAM_BINS)


def _check_statistics(rows: Tensor, *statistics: Tensor) -> None:
    """Refuse what a kernel would write beyond."""
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"the rows are {rows.dtype} {list(rows.shape)}, not a floating-point matrix")
    features = rows.shape[1]
    for (name, dtype), length, tensor in zip(_STATISTICS.items(), (features, features, HISTOGRAM_BINS, HISTOGRAM_BINS, 2, 2), statistics):
        if tensor.shape != (length,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; needed is a contiguous {dtype} [{length}]")


def _reference_quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return _reference_quantize_blocks(rows, 1, group, format, rule)


def _reference_quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    check_states(states, scale)
    return reference.encode_codes(states.float() / scale.float().reshape(1, -1, 1, 1), FORMATS[format])


def packed_shape(out_features: int, in_features: int, device: str = "cpu") -> tuple[int, ...]:
    if device == "cuda":
        return out_features, -(-in_features // ROW_UNIT) * ROW_UNIT
    return -(-out_features // _PANEL), -(-in_features // _INNER_UNIT) * _INNER_UNIT, _PANEL


def _reference_pack_weight(codes: Tensor, packing: str) -> Tensor:
    """[panels of 16 output features, in_features padded to 64, 16]: see QkPacking in kernels/cpu/matmul.h for the order within a panel."""
    check_codes(codes, packing)
    if codes.device.type == "cuda":
        return plain_weight(codes, packing)
    panels, inner, _ = packed_shape(*codes.shape)
    padding = (0, inner - codes.shape[1], 0, panels * _PANEL - codes.shape[0])
    padded = torch.nn.functional.pad(codes.view(packed_dtype(packing)), padding)
    if packing == "int8_dot":
        padded = padded ^ 0x80  # code + 128
    together = _PACKED_TOGETHER[packing]
    return padded.reshape(panels, _PANEL, inner // together, together).transpose(1, 2).reshape(panels, inner, _PANEL)


def unpack_weight(packed: Tensor, packing: str, out_features: int, in_features: int) -> Tensor:
    """The codes that pack_weight arranged, [out_features, in_features]."""
    if packed.dim() == 2:
        return packed[:, :in_features].contiguous().view(PACKINGS[packing])
    panels, inner, _ = packed.shape
    together = _PACKED_TOGETHER[packing]
    codes = packed.reshape(panels, inner // together, _PANEL, together).transpose(1, 2).reshape(panels * _PANEL, inner)[:out_features, :in_features]
    return (codes ^ 0x80 if packing == "int8_dot" else codes).contiguous().view(PACKINGS[packing])


def scale_per_feature(weight_scale: Tensor, packed: Tensor) -> Tensor:
    """[groups or 1, out_features]: on CUDA a scale may serve a block of 128 output features."""
    features = out_features_of(packed, weight_scale)
    return weight_scale if weight_scale.shape[1] == features else weight_scale.repeat_interleave(SCALE_BLOCK, 1)[:, :features]


def _reference_product(left: Tensor, left_scale: Tensor | None, right: Tensor, right_scale: Tensor, group: int) -> Tensor:
    """left [tokens, in_features] times right [out_features, in_features] transposed, each with its scales, float32."""
    if group >= left.shape[1]:
        return left.float() @ right.float().T * (1.0 if left_scale is None else left_scale) * right_scale
    across = block(1, group)
    values = left.float() if left_scale is None else reference.dequantize(left, left_scale, across)
    return values @ reference.dequantize(right, right_scale.T, across).T


def _finished(output: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (output if bias is None else output + bias).to(dtype)


def _reference_matmul_int8(
    activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, group: int,
    zero_point: Tensor | None, weight_sums: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight_scale = scale_per_feature(weight_scale, packed)
    codes = unpack_weight(packed, "int8_dot", weight_scale.shape[1], activations.shape[1])
    if group < activations.shape[1]:
        return _finished(_reference_product(activations, activation_scale, codes, weight_scale, group), bias, dtype)
    # float64 holds every sum of fewer than 2^37 products of two bytes exactly.
    sums = activations.double() @ codes.double().T
    if zero_point is not None:
        sums -= zero_point.reshape(-1, 1).double() * weight_sums.double()
    return _finished(sums.float() * activation_scale * weight_scale, bias, dtype)


def _reference_matmul_fp8(
    activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, group: int,
    powers_of_two: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight_scale = scale_per_feature(weight_scale, packed)
    codes = unpack_weight(packed, "e4m3", weight_scale.shape[1], activations.shape[1])
    return _finished(_reference_product(activations, activation_scale, codes, weight_scale, group), bias, dtype)


def _reference_matmul_weight_only(
    inputs: Tensor, packed: Tensor, packing: str, weight_scale: Tensor, group: int, powers_of_two: bool, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weight_scale = scale_per_feature(weight_scale, packed)
    codes = unpack_weight(packed, packing, weight_scale.shape[1], inputs.shape[1])
    return _finished(_reference_product(inputs, None, codes, weight_scale, group), bias, dtype)


def _reference_matmul_bf16(inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = unpack_weight(packed, "bf16", out_features, inputs.shape[1])
    return _finished(inputs.float() @ weight.float().T, bias, dtype)


# ---- CPU kernels.


def _matrix(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, ...]:
    rows, columns = values.shape
    return rows, columns, max(values.stride(0), columns) if rows > 1 else columns, block_rows, block_columns


def _scale_shape(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, int]:
    return block(block_rows, block_columns).scale_shape(*values.shape)


def _is_ready(values: Tensor) -> bool:
    """Whether a kernel takes this: a matrix of a known type that has elements."""
    return cpu_kernels() is not None and values.dim() == 2 and values.numel() > 0 and values.dtype in INPUT_NUMBERS


def ran(status: int) -> None:
    if status != 0:
        raise AssertionError("a kernel refused its arguments")


def _cpu_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    if not _is_ready(values):
        return _reference_block_amax(values, block_rows, block_columns)
    values = rows_dense(values)
    amax = torch.empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    ran(cpu_kernels().qk_block_amax(values.data_ptr(), INPUT_NUMBERS[values.dtype], *_matrix(values, block_rows, block_columns), amax.data_ptr()))
    return amax


def _cpu_encode_blocks(values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str) -> Tensor:
    if not _is_ready(values):
        return _reference_encode_blocks(values, scale, block_rows, block_columns, format)
    values, scale = rows_dense(values), scale.float().contiguous()
    if tuple(scale.shape) != _scale_shape(values, block_rows, block_columns):
        raise ValueError(f"the scale has the shape {list(scale.shape)}, the blocks need {list(_scale_shape(values, block_rows, block_columns))}")
    codes = torch.empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    arguments = (values.data_ptr(), INPUT_NUMBERS[values.dtype], *_matrix(values, block_rows, block_columns), FORMAT_NUMBERS[format])
    ran(cpu_kernels().qk_encode_blocks(*arguments, scale.data_ptr(), codes.data_ptr()))
    return codes


def _cpu_quantize_blocks(values: Tensor, block_rows: int, block_columns: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    if not _is_ready(values):
        return _reference_quantize_blocks(values, block_rows, block_columns, format, rule)
    values = rows_dense(values)
    codes = torch.empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    scale = torch.empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    arguments = (values.data_ptr(), INPUT_NUMBERS[values.dtype], *_matrix(values, block_rows, block_columns), FORMAT_NUMBERS[format], RULE_NUMBERS[rule])
    ran(cpu_kernels().qk_quantize_blocks(*arguments, scale.data_ptr(), codes.data_ptr()))
    return codes, scale


def _cpu_dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype | None = None) -> Tensor:
    number_format, dtype = {torch.int8: 0, torch.float8_e4m3fn: 1}.get(codes.dtype), dtype or torch.float32
    if cpu_kernels() is None or number_format is None or dtype not in INPUT_NUMBERS or codes.dim() != 2 or not codes.numel():
        return _reference_dequantize_blocks(codes, scale, block_rows, block_columns, dtype)
    codes, scale = rows_dense(codes), scale.float().contiguous()
    if tuple(scale.shape) != _scale_shape(codes, block_rows, block_columns):
        raise ValueError(f"the scale has the shape {list(scale.shape)}, the blocks need {list(_scale_shape(codes, block_rows, block_columns))}")
    values = torch.empty(codes.shape, dtype=dtype)
    matrix = _matrix(codes, block_rows, block_columns)
    ran(cpu_kernels().qk_dequantize_blocks(codes.data_ptr(), number_format, *matrix, scale.data_ptr(), INPUT_NUMBERS[dtype], values.data_ptr()))
    return values


def _cpu_observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    statistics = (channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts)
    if not _is_ready(rows):
        return _reference_observe_rows(rows, above, *statistics)
    _check_statistics(rows, *statistics)
    rows = rows_dense(rows)
    tokens, features = rows.shape
    stride = max(rows.stride(0), features) if tokens > 1 else features
    magnitudes = torch.empty(tokens, dtype=torch.float32)
    pointers = [tensor.data_ptr() for tensor in (channel_amax, channel_sum_of_squares, histogram, extremes, counts[1:], magnitudes)]
    ran(cpu_kernels().qk_observe_rows(rows.data_ptr(), INPUT_NUMBERS[rows.dtype], tokens, stride, 0, features, above, *pointers))
    ran(cpu_kernels().qk_count_magnitudes(magnitudes.data_ptr(), 1, tokens, token_histogram.data_ptr()))
    counts[0] += tokens
    return None


def _cpu_quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return _cpu_quantize_blocks(rows, 1, group, format, rule)


def _cpu_quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    if scale.shape != (1,) or states.dim() != 4:
        return _reference_quantize_kv(states, scale, format)
    rows = states.reshape(-1, states.shape[-1])
    return _cpu_encode_blocks(rows, scale.reshape(1, 1), *rows.shape, format).reshape(states.shape)


def _cpu_pack_weight(codes: Tensor, packing: str) -> Tensor:
    check_codes(codes, packing)
    if cpu_kernels() is None or not codes.numel():
        return _reference_pack_weight(codes, packing)
    codes = rows_dense(codes)
    packed = torch.empty(packed_shape(*codes.shape), dtype=packed_dtype(packing))
    stride = max(codes.stride(0), codes.shape[1])
    ran(cpu_kernels().qk_pack_weight(list(PACKINGS).index(packing), codes.data_ptr(), *codes.shape, stride, packed.data_ptr()))
    return packed


def _multiplies(activations: Tensor, dtype: torch.dtype, packed: Tensor, out_features: int, packing: str, group: int | None = None) -> bool:
    """Whether a kernel takes this, after refusing what would be read beyond its end."""
    inner = activations.shape[1] if activations.dim() == 2 else 0
    if activations.dim() != 2 or activations.dtype != dtype:
        raise ValueError(f"the activations are {activations.dtype} {list(activations.shape)}, not a matrix of {dtype}")
    needed = packed_shape(out_features, inner)
    if tuple(packed.shape) != needed or packed.dtype != packed_dtype(packing) or not packed.is_contiguous():
        raise ValueError(f"the packed weight is {packed.dtype} {list(packed.shape)}; {out_features} output features of {inner} inputs need {list(needed)}")
    whole = group is None or group >= inner or group % 4 == 0
    fits_int32 = packing != "int8_dot" or inner < 1 << 17
    return cpu_kernels() is not None and activations.numel() > 0 and out_features > 0 and whole and fits_int32


def _matrix_of(activations: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    activations = rows_dense(activations)
    rows, inner = activations.shape
    return activations, (activations.data_ptr(), rows, inner, max(activations.stride(0), inner))


def _cpu_matmul_int8(
    activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, group: int,
    zero_point: Tensor | None, weight_sums: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out_features = weight_scale.shape[1]
    if not _multiplies(activations, torch.int8, packed, out_features, "int8_dot", group):
        return _reference_matmul_int8(activations, activation_scale, packed, weight_scale, group, zero_point, weight_sums, bias, dtype)
    activations, matrix = _matrix_of(activations)
    rows, inner = activations.shape
    own, *own_steps = activation_scales(activation_scale, rows, inner, group)
    weight, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias, sums = side(bias, torch.float32, (out_features,)), side(weight_sums, torch.int32, (out_features,))
    zero = side(zero_point, torch.int32, (1, rows))
    output = torch.empty(rows, out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    scales = (own.data_ptr(), *own_steps, weight.data_ptr(), weight_step)
    zeros = (pointer(zero), 0 if zero is None or zero.numel() == 1 else 1, pointer(sums))
    ran(cpu_kernels().qk_matmul_int8(*matrix, packed.data_ptr(), out_features, group, *scales, *to, *zeros))
    return output


def _cpu_matmul_fp8(
    activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, group: int,
    powers_of_two: bool, bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out_features = weight_scale.shape[1]
    if not _multiplies(activations, torch.float8_e4m3fn, packed, out_features, "e4m3", group):
        return _reference_matmul_fp8(activations, activation_scale, packed, weight_scale, group, powers_of_two, bias, dtype)
    activations, matrix = _matrix_of(activations)
    rows, inner = activations.shape
    own, *own_steps = activation_scales(activation_scale, rows, inner, group)
    weight, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = side(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    scales = (own.data_ptr(), *own_steps, weight.data_ptr(), weight_step)
    ran(cpu_kernels().qk_matmul_fp8(*matrix, packed.data_ptr(), out_features, group, *scales, *to, powers_of_two))
    return output


def _cpu_matmul_weight_only(
    inputs: Tensor, packed: Tensor, packing: str, weight_scale: Tensor, group: int, powers_of_two: bool, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out_features = weight_scale.shape[1]
    if not _multiplies(inputs, torch.bfloat16, packed, out_features, packing, group):
        return _reference_matmul_weight_only(inputs, packed, packing, weight_scale, group, powers_of_two, bias, dtype)
    inputs, matrix = _matrix_of(inputs)
    rows, inner = inputs.shape
    weight, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = side(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    which = list(PACKINGS).index(packing)
    ran(cpu_kernels().qk_matmul_weight_only(*matrix, packed.data_ptr(), which, out_features, group, weight.data_ptr(), weight_step, *to, powers_of_two))
    return output


def _cpu_matmul_bf16(inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if not _multiplies(inputs, torch.bfloat16, packed, out_features, "bf16"):
        return _reference_matmul_bf16(inputs, packed, out_features, bias, dtype)
    inputs, matrix = _matrix_of(inputs)
    bias = side(bias, torch.float32, (out_features,))
    output = torch.empty(inputs.shape[0], out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    ran(cpu_kernels().qk_matmul_bf16(*matrix, packed.data_ptr(), out_features, *to))
    return output


# ---- Fakes: shapes and dtypes only.


def _fake_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return values.new_empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)


def _fake_encode_blocks(values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str) -> Tensor:
    return values.new_empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))


def _fake_quantize_blocks(values: Tensor, block_rows: int, block_columns: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    codes = values.new_empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    return codes, values.new_empty(_scale_shape(values, block_rows, block_columns), dtype=torch.float32)


def _fake_dequantize_blocks(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype | None = None) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype or torch.float32)


def _fake_observe_rows(rows: Tensor, above: float, *statistics: Tensor) -> None:
    _check_statistics(rows, *statistics)


def _fake_quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return _fake_quantize_blocks(rows, 1, group, format, rule)


def _fake_quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    check_states(states, scale)
    return states.new_empty(states.shape, dtype=getattr(torch, FORMATS[format].torch_name))


def _fake_pack_weight(codes: Tensor, packing: str) -> Tensor:
    check_codes(codes, packing)
    return codes.new_empty(packed_shape(*codes.shape, codes.device.type), dtype=packed_dtype(packing))


def _fake_matmul_int8(activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    return activations.new_empty(activations.shape[0], out_features_of(packed, weight_scale), dtype=rest[-1])


def _fake_matmul_fp8(activations: Tensor, activation_scale: Tensor, packed: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    return activations.new_empty(activations.shape[0], out_features_of(packed, weight_scale), dtype=rest[-1])


def _fake_matmul_weight_only(inputs: Tensor, packed: Tensor, packing: str, weight_scale: Tensor, *rest: Any) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features_of(packed, weight_scale), dtype=rest[-1])


def _fake_matmul_bf16(inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features, dtype=dtype)


def _kernel_or_reference(kernel: Callable[..., Any], reference_of: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        result = kernel(*arguments)
        return reference_of(*arguments) if result is None else result

    return run


for _name in (
    "block_amax", "encode_blocks", "quantize_blocks", "dequantize_blocks", "observe_rows", "quantize_rows",
    "quantize_kv", "pack_weight", "matmul_int8", "matmul_fp8", "matmul_weight_only", "matmul_bf16",
):  # fmt: skip
    _library.impl(_name, globals()[f"_reference_{_name}"], "CompositeExplicitAutograd")
    _library.impl(_name, globals()[f"_cpu_{_name}"], "CPU")
    torch.library.register_fake(f"quantkit::{_name}", globals()[f"_fake_{_name}"], lib=_library)
    if _name in cuda_ops.KERNELS:
        _library.impl(_name, _kernel_or_reference(cuda_ops.KERNELS[_name], globals()[f"_reference_{_name}"]), "CUDA")
