"""The ops on the CPU: through the compiled kernels where those take the arguments, by the reference
where they don't.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops.arguments import (
    FORMAT_NUMBERS,
    FORMATS,
    INPUT_NUMBERS,
    PACKINGS,
    RULE_NUMBERS,
    activation_scales,
    check_codes,
    packed_dtype,
    pointer,
    rows_dense,
    scale_shape,
    side,
    weight_scales,
)
from quantkit.ops.fallback import (
    check_statistics,
    packed_shape,
    reference_block_amax,
    reference_dequantize_blocks,
    reference_encode_blocks,
    reference_matmul_bf16,
    reference_matmul_fp8,
    reference_matmul_int8,
    reference_matmul_weight_only,
    reference_observe_rows,
    reference_pack_weight,
    reference_quantize_blocks,
    reference_quantize_kv,
)
from quantkit.ops.native import cpu_kernels


def _matrix(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, ...]:
    rows, columns = values.shape
    return (
        rows,
        columns,
        max(values.stride(0), columns) if rows > 1 else columns,
        block_rows,
        block_columns,
    )


def _is_ready(values: Tensor) -> bool:
    """Whether a kernel takes this: a matrix of a known type that has elements."""
    return (
        cpu_kernels() is not None
        and values.dim() == 2
        and values.numel() > 0
        and values.dtype in INPUT_NUMBERS
    )


def ran(status: int) -> None:
    if status != 0:
        raise AssertionError("a kernel refused its arguments")


def cpu_block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    if not _is_ready(values):
        return reference_block_amax(values, block_rows, block_columns)
    values = rows_dense(values)
    amax = torch.empty(scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    ran(
        cpu_kernels().qk_block_amax(
            values.data_ptr(),
            INPUT_NUMBERS[values.dtype],
            *_matrix(values, block_rows, block_columns),
            amax.data_ptr(),
        )
    )
    return amax


def cpu_encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor:
    if not _is_ready(values):
        return reference_encode_blocks(values, scale, block_rows, block_columns, format)
    values, scale = rows_dense(values), scale.float().contiguous()
    if tuple(scale.shape) != scale_shape(values, block_rows, block_columns):
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}, the blocks need"
            f" {list(scale_shape(values, block_rows, block_columns))}"
        )
    codes = torch.empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    arguments = (
        values.data_ptr(),
        INPUT_NUMBERS[values.dtype],
        *_matrix(values, block_rows, block_columns),
        FORMAT_NUMBERS[format],
    )
    ran(cpu_kernels().qk_encode_blocks(*arguments, scale.data_ptr(), codes.data_ptr()))
    return codes


def cpu_quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    if not _is_ready(values):
        return reference_quantize_blocks(values, block_rows, block_columns, format, rule)
    values = rows_dense(values)
    codes = torch.empty(values.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    scale = torch.empty(scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    arguments = (
        values.data_ptr(),
        INPUT_NUMBERS[values.dtype],
        *_matrix(values, block_rows, block_columns),
        FORMAT_NUMBERS[format],
        RULE_NUMBERS[rule],
    )
    ran(cpu_kernels().qk_quantize_blocks(*arguments, scale.data_ptr(), codes.data_ptr()))
    return codes, scale


def cpu_dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    number_format, dtype = (
        {torch.int8: 0, torch.float8_e4m3fn: 1}.get(codes.dtype),
        dtype or torch.float32,
    )
    if (
        cpu_kernels() is None
        or number_format is None
        or dtype not in INPUT_NUMBERS
        or codes.dim() != 2
        or not codes.numel()
    ):
        return reference_dequantize_blocks(codes, scale, block_rows, block_columns, dtype)
    codes, scale = rows_dense(codes), scale.float().contiguous()
    if tuple(scale.shape) != scale_shape(codes, block_rows, block_columns):
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}, the blocks need"
            f" {list(scale_shape(codes, block_rows, block_columns))}"
        )
    values = torch.empty(codes.shape, dtype=dtype)
    matrix = _matrix(codes, block_rows, block_columns)
    ran(
        cpu_kernels().qk_dequantize_blocks(
            codes.data_ptr(),
            number_format,
            *matrix,
            scale.data_ptr(),
            INPUT_NUMBERS[dtype],
            values.data_ptr(),
        )
    )
    return values


def cpu_observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    statistics = (
        channel_amax,
        channel_sum_of_squares,
        histogram,
        token_histogram,
        extremes,
        counts,
    )
    if not _is_ready(rows):
        return reference_observe_rows(rows, above, *statistics)
    check_statistics(rows, *statistics)
    rows = rows_dense(rows)
    tokens, features = rows.shape
    stride = max(rows.stride(0), features) if tokens > 1 else features
    magnitudes = torch.empty(tokens, dtype=torch.float32)
    pointers = [
        tensor.data_ptr()
        for tensor in (
            channel_amax,
            channel_sum_of_squares,
            histogram,
            extremes,
            counts[1:],
            magnitudes,
        )
    ]
    ran(
        cpu_kernels().qk_observe_rows(
            rows.data_ptr(),
            INPUT_NUMBERS[rows.dtype],
            tokens,
            stride,
            0,
            features,
            above,
            *pointers,
        )
    )
    ran(
        cpu_kernels().qk_count_magnitudes(
            magnitudes.data_ptr(), 1, tokens, token_histogram.data_ptr()
        )
    )
    counts[0] += tokens
    return None


def cpu_quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return cpu_quantize_blocks(rows, 1, group, format, rule)


def cpu_quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    if scale.shape != (1,) or states.dim() != 4:
        return reference_quantize_kv(states, scale, format)
    rows = states.reshape(-1, states.shape[-1])
    return cpu_encode_blocks(rows, scale.reshape(1, 1), *rows.shape, format).reshape(states.shape)


def cpu_pack_weight(codes: Tensor, packing: str) -> Tensor:
    check_codes(codes, packing)
    if cpu_kernels() is None or not codes.numel():
        return reference_pack_weight(codes, packing)
    codes = rows_dense(codes)
    packed = torch.empty(packed_shape(*codes.shape), dtype=packed_dtype(packing))
    stride = max(codes.stride(0), codes.shape[1])
    ran(
        cpu_kernels().qk_pack_weight(
            list(PACKINGS).index(packing), codes.data_ptr(), *codes.shape, stride, packed.data_ptr()
        )
    )
    return packed


def _multiplies(
    activations: Tensor,
    dtype: torch.dtype,
    packed: Tensor,
    out_features: int,
    packing: str,
    group: int | None = None,
) -> bool:
    """Whether a kernel takes this, after refusing what would be read beyond its end."""
    inner = activations.shape[1] if activations.dim() == 2 else 0
    if activations.dim() != 2 or activations.dtype != dtype:
        raise ValueError(
            f"the activations are {activations.dtype} {list(activations.shape)}, not a matrix of"
            f" {dtype}"
        )
    needed = packed_shape(out_features, inner)
    if (
        tuple(packed.shape) != needed
        or packed.dtype != packed_dtype(packing)
        or not packed.is_contiguous()
    ):
        raise ValueError(
            f"the packed weight is {packed.dtype} {list(packed.shape)}; {out_features} output"
            f" features of {inner} inputs need {list(needed)}"
        )
    whole = group is None or group >= inner or group % 4 == 0
    fits_int32 = packing != "int8_dot" or inner < 1 << 17
    return (
        cpu_kernels() is not None
        and activations.numel() > 0
        and out_features > 0
        and whole
        and fits_int32
    )


def _matrix_of(activations: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    activations = rows_dense(activations)
    rows, inner = activations.shape
    return activations, (activations.data_ptr(), rows, inner, max(activations.stride(0), inner))


def cpu_matmul_int8(
    activations: Tensor,
    activation_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    zero_point: Tensor | None,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out_features = weight_scale.shape[1]
    if not _multiplies(activations, torch.int8, packed, out_features, "int8_dot", group):
        return reference_matmul_int8(
            activations,
            activation_scale,
            packed,
            weight_scale,
            group,
            zero_point,
            weight_sums,
            bias,
            dtype,
        )
    activations, matrix = _matrix_of(activations)
    rows, inner = activations.shape
    own, *own_steps = activation_scales(activation_scale, rows, inner, group)
    weight, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias, sums = (
        side(bias, torch.float32, (out_features,)),
        side(weight_sums, torch.int32, (out_features,)),
    )
    zero = side(zero_point, torch.int32, (1, rows))
    output = torch.empty(rows, out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    scales = (own.data_ptr(), *own_steps, weight.data_ptr(), weight_step)
    zeros = (pointer(zero), 0 if zero is None or zero.numel() == 1 else 1, pointer(sums))
    ran(
        cpu_kernels().qk_matmul_int8(
            *matrix, packed.data_ptr(), out_features, group, *scales, *to, *zeros
        )
    )
    return output


def cpu_matmul_fp8(
    activations: Tensor,
    activation_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out_features = weight_scale.shape[1]
    if not _multiplies(activations, torch.float8_e4m3fn, packed, out_features, "e4m3", group):
        return reference_matmul_fp8(
            activations, activation_scale, packed, weight_scale, group, powers_of_two, bias, dtype
        )
    activations, matrix = _matrix_of(activations)
    rows, inner = activations.shape
    own, *own_steps = activation_scales(activation_scale, rows, inner, group)
    weight, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = side(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    scales = (own.data_ptr(), *own_steps, weight.data_ptr(), weight_step)
    ran(
        cpu_kernels().qk_matmul_fp8(
            *matrix, packed.data_ptr(), out_features, group, *scales, *to, powers_of_two
        )
    )
    return output


def cpu_matmul_weight_only(
    inputs: Tensor,
    packed: Tensor,
    packing: str,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out_features = weight_scale.shape[1]
    if not _multiplies(inputs, torch.bfloat16, packed, out_features, packing, group):
        return reference_matmul_weight_only(
            inputs, packed, packing, weight_scale, group, powers_of_two, bias, dtype
        )
    inputs, matrix = _matrix_of(inputs)
    rows, inner = inputs.shape
    weight, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = side(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    which = list(PACKINGS).index(packing)
    ran(
        cpu_kernels().qk_matmul_weight_only(
            *matrix,
            packed.data_ptr(),
            which,
            out_features,
            group,
            weight.data_ptr(),
            weight_step,
            *to,
            powers_of_two,
        )
    )
    return output


def cpu_matmul_bf16(
    inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not _multiplies(inputs, torch.bfloat16, packed, out_features, "bf16"):
        return reference_matmul_bf16(inputs, packed, out_features, bias, dtype)
    inputs, matrix = _matrix_of(inputs)
    bias = side(bias, torch.float32, (out_features,))
    output = torch.empty(inputs.shape[0], out_features, dtype=dtype)
    to = (pointer(bias), output.data_ptr(), INPUT_NUMBERS[dtype], torch.get_num_threads())
    ran(cpu_kernels().qk_matmul_bf16(*matrix, packed.data_ptr(), out_features, *to))
    return output
