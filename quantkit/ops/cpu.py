"""The CPU implementation of the ops: calls into kernels/cpu/*.cpp through kernels/cpu/dispatch.cpp.

Each function has the name and the arguments of its op, which torch_ops.py documents. It returns
NotImplemented if no kernel supports the arguments; the reference (fallback.py) then runs. It raises
ValueError for a shape that a kernel would read out of bounds. Input matrices may have strides;
outputs are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.ops.arguments import (
    CODE_NUMBERS,
    FLOAT_NUMBERS,
    FORMAT_NUMBERS,
    LEAST_UNSAFE_INNER,
    RULE_NUMBERS,
    activation_scales,
    check_codes,
    check_scale,
    operand,
    optional_operand,
    packed_shape,
    packing_named,
    pointer,
    rows_dense,
    scale_shape,
    weight_scales,
)
from quantkit.ops.fallback import check_statistics
from quantkit.ops.native import cpu_kernels
from quantkit.ops.reference import code_dtype
from quantkit.ops.score_logits import TokenScores
from quantkit.schemes.number_formats import NUMBER_FORMATS


def block_amax(values: Tensor, block_rows: int, block_columns: int) -> Tensor:
    library = cpu_kernels()
    if library is None or not _is_float_matrix(values):
        return NotImplemented
    values = rows_dense(values)
    amax = torch.empty(scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    _check(
        library.qk_block_amax(
            values.data_ptr(),
            FLOAT_NUMBERS[values.dtype],
            *_sizes(values),
            block_rows,
            block_columns,
            amax.data_ptr(),
        )
    )
    return amax


def encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor:
    library, format_number = cpu_kernels(), FORMAT_NUMBERS.get(format)
    if library is None or format_number is None or not _is_float_matrix(values):
        return NotImplemented
    values, scale = rows_dense(values), scale.float().contiguous()
    check_scale(scale, scale_shape(values, block_rows, block_columns))
    codes = torch.empty(values.shape, dtype=code_dtype(NUMBER_FORMATS[format]))
    _check(
        library.qk_encode_blocks(
            values.data_ptr(),
            FLOAT_NUMBERS[values.dtype],
            *_sizes(values),
            block_rows,
            block_columns,
            format_number,
            scale.data_ptr(),
            codes.data_ptr(),
        )
    )
    return codes


def quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    library, format_number = cpu_kernels(), FORMAT_NUMBERS.get(format)
    if library is None or format_number is None or not _is_float_matrix(values):
        return NotImplemented
    values = rows_dense(values)
    codes = torch.empty(values.shape, dtype=code_dtype(NUMBER_FORMATS[format]))
    scale = torch.empty(scale_shape(values, block_rows, block_columns), dtype=torch.float32)
    _check(
        library.qk_quantize_blocks(
            values.data_ptr(),
            FLOAT_NUMBERS[values.dtype],
            *_sizes(values),
            block_rows,
            block_columns,
            format_number,
            RULE_NUMBERS[rule],
            scale.data_ptr(),
            codes.data_ptr(),
        )
    )
    return codes, scale


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    library, code_number = cpu_kernels(), CODE_NUMBERS.get(codes.dtype)
    output_number = FLOAT_NUMBERS.get(dtype or torch.float32)
    if (
        library is None
        or code_number is None
        or output_number is None
        or codes.dim() != 2
        or codes.numel() == 0
    ):
        return NotImplemented
    codes, scale = rows_dense(codes), scale.float().contiguous()
    check_scale(scale, scale_shape(codes, block_rows, block_columns))
    values = torch.empty(codes.shape, dtype=dtype or torch.float32)
    _check(
        library.qk_dequantize_blocks(
            codes.data_ptr(),
            code_number,
            *_sizes(codes),
            block_rows,
            block_columns,
            scale.data_ptr(),
            output_number,
            values.data_ptr(),
        )
    )
    return values


def observe_rows(
    rows: Tensor,
    above: float,
    channel_amax: Tensor,
    channel_sum_of_squares: Tensor,
    histogram: Tensor,
    token_histogram: Tensor,
    extremes: Tensor,
    counts: Tensor,
) -> None:
    library = cpu_kernels()
    if library is None or not _is_float_matrix(rows):
        return NotImplemented
    check_statistics(
        rows, channel_amax, channel_sum_of_squares, histogram, token_histogram, extremes, counts
    )
    rows = rows_dense(rows)
    tokens, features, stride = _sizes(rows)
    token_amax = torch.empty(tokens, dtype=torch.float32)
    _check(
        library.qk_observe_rows(
            rows.data_ptr(),
            FLOAT_NUMBERS[rows.dtype],
            tokens,
            stride,
            0,
            features,
            above,
            channel_amax.data_ptr(),
            channel_sum_of_squares.data_ptr(),
            histogram.data_ptr(),
            extremes.data_ptr(),
            counts[1:].data_ptr(),
            token_amax.data_ptr(),
        )
    )
    _check(
        library.qk_count_magnitudes(token_amax.data_ptr(), 1, tokens, token_histogram.data_ptr())
    )
    counts[0] += tokens
    return None


def quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    return quantize_blocks(rows, 1, group, format, rule)


def quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    if scale.shape != (1,) or states.dim() != 4 or states.numel() == 0:
        return NotImplemented
    rows = states.reshape(-1, states.shape[-1])
    codes = encode_blocks(rows, scale.reshape(1, 1), rows.shape[0], rows.shape[1], format)
    return codes if codes is NotImplemented else codes.reshape(states.shape)


def pack_weight(codes: Tensor, packing: str) -> Tensor:
    check_codes(codes, packing)
    library = cpu_kernels()
    if library is None or codes.numel() == 0:
        return NotImplemented
    codes, arrangement = rows_dense(codes), packing_named(packing)
    out_features, in_features = codes.shape
    packed = torch.empty(packed_shape(out_features, in_features), dtype=arrangement.dtype)
    _check(
        library.qk_pack_weight(
            arrangement.number,
            codes.data_ptr(),
            out_features,
            in_features,
            max(codes.stride(0), in_features),
            packed.data_ptr(),
        )
    )
    return packed


def matmul_int8(
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
    library, out_features = cpu_kernels(), weight_scale.shape[1]
    _check_operands(activations, torch.int8, packed, out_features, "int8_dot")
    rows, inner = activations.shape
    if (
        library is None
        or inner >= LEAST_UNSAFE_INNER
        or not _multiplies(rows, inner, out_features, group, dtype)
    ):
        return NotImplemented
    activations = rows_dense(activations)
    scale, row_step, group_step = activation_scales(activation_scale, rows, inner, group)
    weight_scale, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = optional_operand(bias, torch.float32, (out_features,))
    weight_sums = optional_operand(weight_sums, torch.int32, (out_features,))
    zero_point = optional_operand(zero_point, torch.int32, (1, rows))
    output = torch.empty(rows, out_features, dtype=dtype)
    _check(
        library.qk_matmul_int8(
            *_pointer_and_sizes(activations),
            packed.data_ptr(),
            out_features,
            group,
            scale.data_ptr(),
            row_step,
            group_step,
            weight_scale.data_ptr(),
            weight_step,
            *_output(output, bias),
            pointer(zero_point),
            0 if zero_point is None or zero_point.numel() == 1 else 1,
            pointer(weight_sums),
        )
    )
    return output


def matmul_fp8(
    activations: Tensor,
    activation_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    library, out_features = cpu_kernels(), weight_scale.shape[1]
    _check_operands(activations, torch.float8_e4m3fn, packed, out_features, "e4m3")
    rows, inner = activations.shape
    if library is None or not _multiplies(rows, inner, out_features, group, dtype):
        return NotImplemented
    activations = rows_dense(activations)
    scale, row_step, group_step = activation_scales(activation_scale, rows, inner, group)
    weight_scale, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = optional_operand(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    _check(
        library.qk_matmul_fp8(
            *_pointer_and_sizes(activations),
            packed.data_ptr(),
            out_features,
            group,
            scale.data_ptr(),
            row_step,
            group_step,
            weight_scale.data_ptr(),
            weight_step,
            *_output(output, bias),
            powers_of_two,
        )
    )
    return output


def matmul_weight_only(
    inputs: Tensor,
    packed: Tensor,
    packing: str,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    library, out_features = cpu_kernels(), weight_scale.shape[1]
    _check_operands(inputs, torch.bfloat16, packed, out_features, packing)
    rows, inner = inputs.shape
    if library is None or not _multiplies(rows, inner, out_features, group, dtype):
        return NotImplemented
    inputs = rows_dense(inputs)
    weight_scale, weight_step = weight_scales(weight_scale, out_features, inner, group)
    bias = optional_operand(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    _check(
        library.qk_matmul_weight_only(
            *_pointer_and_sizes(inputs),
            packed.data_ptr(),
            packing_named(packing).number,
            out_features,
            group,
            weight_scale.data_ptr(),
            weight_step,
            *_output(output, bias),
            powers_of_two,
        )
    )
    return output


def matmul_bf16(
    inputs: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    library = cpu_kernels()
    _check_operands(inputs, torch.bfloat16, packed, out_features, "bf16")
    rows, inner = inputs.shape
    if library is None or not _multiplies(rows, inner, out_features, inner, dtype):
        return NotImplemented
    inputs = rows_dense(inputs)
    bias = optional_operand(bias, torch.float32, (out_features,))
    output = torch.empty(rows, out_features, dtype=dtype)
    _check(
        library.qk_matmul_bf16(
            *_pointer_and_sizes(inputs), packed.data_ptr(), out_features, *_output(output, bias)
        )
    )
    return output


def score_logits(
    hidden: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    vocabulary: int,
    own_hidden: Tensor | None = None,
    own_packed: Tensor | None = None,
    own_bias: Tensor | None = None,
) -> TokenScores:
    _check_head(hidden, packed, vocabulary)
    if own_hidden is not None:
        _check_head(own_hidden, own_packed, vocabulary)
    targets = operand(targets, torch.int64, (hidden.shape[0],))
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < vocabulary):
        raise ValueError(
            f"a target is no token of the {vocabulary}: they are {int(targets.min())} to"
            f" {int(targets.max())}"
        )
    library, is_pair = cpu_kernels(), own_hidden is not None
    if (
        library is None
        or hidden.numel() == 0
        or (own_hidden is not None and own_hidden.shape != hidden.shape)
    ):
        return NotImplemented
    positions, own_positions = hidden.shape[0], hidden.shape[0] if is_pair else 0
    nll = torch.empty(positions, dtype=torch.float64)
    confidence = torch.empty(positions, dtype=torch.float64)
    own_nll = torch.empty(own_positions, dtype=torch.float64)
    kld = torch.empty(own_positions, dtype=torch.float64)
    index = torch.empty(positions, dtype=torch.int64)
    own_index = torch.empty(own_positions, dtype=torch.int64)
    bias = optional_operand(bias, torch.float32, (vocabulary,))
    own_bias = optional_operand(own_bias, torch.float32, (vocabulary,))
    hidden, own_hidden = rows_dense(hidden), None if own_hidden is None else rows_dense(own_hidden)
    _check(
        library.qk_score_logits(
            positions,
            hidden.shape[1],
            vocabulary,
            targets.data_ptr(),
            hidden.data_ptr(),
            max(hidden.stride(0), hidden.shape[1]),
            packed.data_ptr(),
            pointer(bias),
            nll.data_ptr(),
            index.data_ptr(),
            confidence.data_ptr(),
            pointer(own_hidden),
            0 if own_hidden is None else max(own_hidden.stride(0), own_hidden.shape[1]),
            pointer(own_packed),
            pointer(own_bias),
            own_nll.data_ptr(),
            own_index.data_ptr(),
            kld.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return nll, index, confidence, own_nll, own_index, kld


# ---- Shared by the functions above.


def _is_float_matrix(values: Tensor) -> bool:
    return values.dim() == 2 and values.numel() > 0 and values.dtype in FLOAT_NUMBERS


def _sizes(matrix: Tensor) -> tuple[int, int, int]:
    """Rows, columns and row stride of a matrix whose rows are dense."""
    rows, columns = matrix.shape
    return rows, columns, max(matrix.stride(0), columns) if rows > 1 else columns


def _pointer_and_sizes(matrix: Tensor) -> tuple[int, int, int, int]:
    """Address, rows, columns and row stride of a matrix whose rows are dense."""
    return matrix.data_ptr(), *_sizes(matrix)


def _output(output: Tensor, bias: Tensor | None) -> tuple[int | None, int, int, int]:
    """The last arguments of a multiplication: bias, output, the output's dtype, number of
    threads.
    """
    return pointer(bias), output.data_ptr(), FLOAT_NUMBERS[output.dtype], torch.get_num_threads()


def _check(status: int) -> None:
    """Raise AssertionError if a kernel returned an error status."""
    if status != 0:
        raise AssertionError("a kernel refused its arguments")


def _check_operands(
    activations: Tensor, dtype: torch.dtype, packed: Tensor, out_features: int, packing: str
) -> None:
    """Raise ValueError for operands that neither the kernels nor the reference can multiply."""
    if activations.dim() != 2 or activations.dtype != dtype:
        raise ValueError(
            f"the activations are {activations.dtype} {list(activations.shape)}, not a matrix of"
            f" {dtype}"
        )
    inner = activations.shape[1]
    needed = packed_shape(out_features, inner)
    if (
        tuple(packed.shape) != needed
        or packed.dtype != packing_named(packing).dtype
        or not packed.is_contiguous()
    ):
        raise ValueError(
            f"the packed weight is {packed.dtype} {list(packed.shape)}; {out_features} output"
            f" features of {inner} inputs need {list(needed)}"
        )


def _multiplies(rows: int, inner: int, out_features: int, group: int, dtype: torch.dtype) -> bool:
    """Whether the kernels support a multiplication of these sizes.

    dtype: of the output.
    """
    return (
        rows * inner > 0
        and out_features > 0
        and (group >= inner or group % 4 == 0)
        and dtype in FLOAT_NUMBERS
    )


def _check_head(hidden: Tensor, packed: Tensor | None, vocabulary: int) -> None:
    """Raise ValueError unless these are hidden states and a packed lm_head for them."""
    if hidden.dim() != 2 or hidden.dtype != torch.bfloat16:
        raise ValueError(
            f"the hidden states are {hidden.dtype} {list(hidden.shape)}, not a matrix of bfloat16"
        )
    needed = packed_shape(vocabulary, hidden.shape[1])
    if (
        packed is None
        or tuple(packed.shape) != needed
        or packed.dtype != torch.bfloat16
        or not packed.is_contiguous()
    ):
        found = "missing" if packed is None else f"{packed.dtype} {list(packed.shape)}"
        raise ValueError(
            f"the packed lm_head is {found}; {vocabulary} tokens of {hidden.shape[1]} hidden"
            f" features need {list(needed)}"
        )
