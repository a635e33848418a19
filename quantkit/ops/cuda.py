"""The CUDA implementation of the ops: calls into kernels/cuda/*.cu, on torch's current stream.

Each function has the name and the arguments of its op, which torch_ops.py documents. It returns
NotImplemented if no kernel supports the arguments; the reference (fallback.py) then runs. It raises
ValueError for a shape that a kernel would read out of bounds.

Nothing here synchronizes, and torch allocates all memory, so calls can be captured in a CUDA graph.
Activations are copied if their rows aren't aligned to 16 bytes or padded to a multiple of 16 codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.ops.arguments import (
    CODE_NUMBERS,
    FLOAT_NUMBERS,
    FORMAT_NUMBERS,
    LEAST_UNSAFE_INNER,
    PACKINGS,
    ROW_UNIT,
    RULE_NUMBERS,
    SCALE_BLOCK,
    activation_scales,
    check_scale,
    check_states,
    operand,
    optional_operand,
    pointer,
    rows_dense,
    scale_shape,
)
from quantkit.ops.fallback import plain_weight
from quantkit.ops.native import Product, cuda_kernels
from quantkit.ops.reference import code_dtype
from quantkit.schemes.number_formats import NUMBER_FORMATS

LEAST_CAPABILITY = (8, 0)
# Input features that one tensor-core instruction multiplies; group sizes are multiples of it.
GROUP_UNIT = 32
# The limit of kernels/cuda/matmul_decode.h. For more tokens, torch's library uses instructions of
# Blackwell's tensor cores (tcgen05) that these kernels don't use.
MOST_DECODE_TOKENS = 16


def missing_reason(device: str | torch.device | None = None) -> str | None:
    """Why no CUDA kernel can run on a device, or None if they can.

    device: None is the current device.
    """
    if cuda_kernels() is None:
        return (
            "this installation has no compiled CUDA kernels, or QUANTKIT_KERNELS switches them off"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            "CUDA kernels need compute capability 8.0 or newer, this device has"
            f" {capability[0]}.{capability[1]}"
        )
    return None


def what_runs(capability: tuple[int, int]) -> str:
    """A sentence for `doctor`: how a device of this compute capability multiplies each format."""
    if capability[0] == 9:
        return (
            f"FP8 and INT8 by wgmma, up to {MOST_DECODE_TOKENS} tokens and weights alone by"
            " mma.sync"
        )
    if capability[0] == 10:
        return (
            f"INT8 and weights alone by mma.sync, FP8 of more than {MOST_DECODE_TOKENS} tokens by"
            " torch._scaled_mm where it takes them, else by mma.sync"
        )
    return "INT8, FP8 and weights alone by mma.sync" + (
        "" if capability >= (8, 9) else ", E4M3 as float16, which is slower than bfloat16"
    )


def level(device: str | torch.device) -> str:
    """The architecture of a device, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor]:
    library, format_number = cuda_kernels(), FORMAT_NUMBERS.get(format)
    if library is None or format_number is None or not _is_ready(rows, 2):
        return NotImplemented
    rows = rows_dense(rows)
    count, columns = rows.shape
    codes = rows.new_empty(rows.shape, dtype=code_dtype(NUMBER_FORMATS[format]))
    scale = rows.new_empty(count, -(-columns // group), dtype=torch.float32)
    _run(
        library.qk_cuda_quantize_rows,
        rows,
        rows.data_ptr(),
        FLOAT_NUMBERS[rows.dtype],
        count,
        columns,
        _row_stride(rows),
        group,
        format_number,
        RULE_NUMBERS[rule],
        scale.data_ptr(),
        codes.data_ptr(),
    )
    return codes, scale


def quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor]:
    return quantize_rows(values, block_columns, format, rule) if block_rows == 1 else NotImplemented


def encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor:
    """Supports one scale for all values (static activations), or one for each row (channels)."""
    if (
        values.dim() != 2
        or block_columns < values.shape[1]
        or (block_rows != 1 and block_rows < values.shape[0])
    ):
        return NotImplemented
    heads = values.shape[0] if block_rows == 1 else 1
    check_scale(scale, (heads, 1))
    if values.numel() == 0:
        return NotImplemented
    states = rows_dense(values).unflatten(0, (1, heads, -1))
    codes = quantize_kv(states, scale.reshape(-1), format)
    return codes if codes is NotImplemented else codes.reshape(values.shape)


def quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor:
    check_states(states, scale)
    library, format_number = cuda_kernels(), FORMAT_NUMBERS.get(format)
    if library is None or format_number is None or not _is_ready(states, 4):
        return NotImplemented
    if states.stride(3) != 1:
        states = states.contiguous()
    scale = scale.float().contiguous()
    codes = states.new_empty(states.shape, dtype=code_dtype(NUMBER_FORMATS[format]))
    strides = (
        stride if size > 1 else 0 for size, stride in zip(states.shape[:3], states.stride()[:3])
    )
    _run(
        library.qk_cuda_quantize_kv,
        states,
        states.data_ptr(),
        FLOAT_NUMBERS[states.dtype],
        *states.shape,
        *strides,
        scale.data_ptr(),
        1 if scale.shape[0] > 1 else 0,
        format_number,
        codes.data_ptr(),
    )
    return codes


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    library, code_number = cuda_kernels(), CODE_NUMBERS.get(codes.dtype)
    output_number = FLOAT_NUMBERS.get(dtype or torch.float32)
    if (
        library is None
        or code_number is None
        or output_number is None
        or codes.dim() != 2
        or codes.numel() == 0
        or not _is_supported(codes)
    ):
        return NotImplemented
    codes, scale = rows_dense(codes), scale.float().contiguous()
    check_scale(scale, scale_shape(codes, block_rows, block_columns))
    values = codes.new_empty(codes.shape, dtype=dtype or torch.float32)
    _run(
        library.qk_cuda_dequantize,
        codes,
        codes.data_ptr(),
        code_number,
        *codes.shape,
        _row_stride(codes),
        block_rows,
        block_columns,
        scale.data_ptr(),
        output_number,
        values.data_ptr(),
    )
    return values


def pack_weight(codes: Tensor, packing: str) -> Tensor:
    return plain_weight(codes, packing)


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
    _check_operands(activations, torch.int8, packed)
    library, inner = cuda_kernels(), activations.shape[1]
    if (
        library is None
        or inner >= LEAST_UNSAFE_INNER
        or not _multiplies(activations, packed, group, dtype)
    ):
        return NotImplemented
    if zero_point is not None and (weight_sums is None or group < inner):
        raise ValueError("a zero point needs weight_sums and one group")
    return _multiply(
        library.qk_cuda_matmul_int8,
        activations,
        activation_scale,
        packed,
        weight_scale,
        group,
        bias,
        dtype,
        zero_point=zero_point,
        weight_sums=weight_sums,
    )


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
    _check_operands(activations, torch.float8_e4m3fn, packed)
    library = cuda_kernels()
    if library is None or not _multiplies(activations, packed, group, dtype):
        return NotImplemented
    if _is_for_torch(activations, packed, group, bias, dtype):
        rows = activations.shape[0]
        row_scale = operand(activation_scale, torch.float32, (1, rows), (1,))
        return torch._scaled_mm(
            activations.contiguous(),
            packed.view(torch.float8_e4m3fn).t(),
            scale_a=row_scale.expand(rows, 1).contiguous(),
            scale_b=operand(weight_scale, torch.float32, (1,), (packed.shape[0],)),
            out_dtype=dtype,
        )
    return _multiply(
        library.qk_cuda_matmul_fp8,
        activations,
        activation_scale,
        packed,
        weight_scale,
        group,
        bias,
        dtype,
    )


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
    if packing not in ("int8", "e4m3"):
        raise ValueError(
            f"matmul_weight_only takes int8 or e4m3, not '{packing}'; known packings:"
            f" {', '.join(PACKINGS)}"
        )
    _check_operands(inputs, torch.bfloat16, packed)
    library = cuda_kernels()
    if library is None or not _multiplies(inputs, packed, group, dtype):
        return NotImplemented
    code_number = CODE_NUMBERS[PACKINGS[packing].code_dtype]
    return _multiply(
        library.qk_cuda_matmul_weight_only,
        inputs,
        None,
        packed,
        weight_scale,
        group,
        bias,
        dtype,
        code_number,
    )


# ---- Shared by the functions above.


def _is_supported(tensor: Tensor) -> bool:
    """Whether the tensor's device can run the kernels. Tests run an emulated library on the CPU."""
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY


def _is_ready(values: Tensor, dimensions: int) -> bool:
    return (
        values.dim() == dimensions
        and values.numel() > 0
        and values.dtype in FLOAT_NUMBERS
        and _is_supported(values)
    )


def _row_stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _run(function: Callable[..., int], tensor: Tensor, *arguments: object) -> None:
    """Call a function of the library on the current stream of the tensor's device.

    Raises RuntimeError for an error of CUDA, and AssertionError for arguments that the kernel
    refuses.
    """
    if not tensor.is_cuda:  # an emulated library
        status = function(*arguments, None)
    elif tensor.device.index == torch.cuda.current_device():
        status = function(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        with torch.cuda.device(tensor.device):
            status = function(*arguments, torch.cuda.current_stream().cuda_stream)
    if status == 0:
        return
    library, name = cuda_kernels(), function.__name__
    if status == -1 or library is None:
        raise AssertionError(f"{name} refused its arguments")
    raise RuntimeError(f"{name} failed: {library.qk_cuda_error(status).decode()} ({status})")


def _check_operands(activations: Tensor, dtype: torch.dtype, packed: Tensor) -> None:
    """Raise ValueError for operands that neither the kernels nor the reference can multiply."""
    if activations.dim() != 2 or activations.dtype != dtype:
        raise ValueError(
            f"the activations are {activations.dtype} {list(activations.shape)}, not a matrix of"
            f" {dtype}"
        )
    inner = activations.shape[1]
    width = -(-inner // ROW_UNIT) * ROW_UNIT
    if (
        packed.dim() != 2
        or packed.shape[1] != width
        or packed.dtype != torch.uint8
        or not packed.is_contiguous()
    ):
        raise ValueError(
            f"the packed weight is {packed.dtype} {list(packed.shape)}; {inner} inputs need rows of"
            f" {width} bytes, as pack_weight on CUDA makes them"
        )
    if packed.device != activations.device:
        raise ValueError(
            f"the activations are on {activations.device}, the packed weight is on {packed.device}"
        )


def _multiplies(activations: Tensor, packed: Tensor, group: int, dtype: torch.dtype) -> bool:
    """Whether the kernels support a multiplication of these operands.

    dtype: of the output.
    """
    return (
        activations.numel() > 0
        and packed.shape[0] > 0
        and (group >= activations.shape[1] or group % GROUP_UNIT == 0)
        and dtype in FLOAT_NUMBERS
        and _is_supported(activations)
    )


def _is_for_torch(
    activations: Tensor, packed: Tensor, group: int, bias: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether torch._scaled_mm multiplies these operands.

    It does on Blackwell's data-center GPUs (10.x), because torch's library uses their fast FP8
    instructions (tcgen05). `what_runs` tells the user.
    """
    if (
        not activations.is_cuda
        or torch.cuda.get_device_capability(activations.device)[0] != 10
        or activations.shape[0] <= MOST_DECODE_TOKENS
    ):
        return False
    return (
        group >= activations.shape[1]
        and bias is None
        and dtype == torch.bfloat16
        and activations.shape[1] % 16 == 0
        and packed.shape[0] % 16 == 0
    )


def _on_16_bytes(matrix: Tensor) -> Tensor:
    """The matrix with rows that are aligned to 16 bytes and padded with zeros to a multiple of 16
    elements.

    Returns the matrix itself if its rows already are, else a copy.
    """
    inner = matrix.shape[1]
    if inner % ROW_UNIT == 0 and matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0:
        stride = _row_stride(matrix)
        if stride >= inner and stride % ROW_UNIT == 0:
            return matrix
    # As integers, because torch can fill and copy those on every device, unlike FP8.
    raw = torch.uint8 if matrix.element_size() == 1 else torch.int16
    padded = torch.zeros(
        matrix.shape[0], -(-inner // ROW_UNIT) * ROW_UNIT, dtype=raw, device=matrix.device
    )
    padded[:, :inner] = matrix.view(raw)
    return padded.view(matrix.dtype)


def _multiply(
    function: Callable[..., int],
    activations: Tensor,
    activation_scale: Tensor | None,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    *more: int,
    zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
) -> Tensor:
    """Call a multiplication of the library; returns [tokens, out_features] in `dtype`.

    more: arguments after the structure Product.
    """
    tokens, inner = activations.shape
    features = packed.shape[0]
    groups = -(-inner // group) if group < inner else 1
    aligned = _on_16_bytes(activations)
    row_step = group_step = 0
    if activation_scale is not None:
        activation_scale, row_step, group_step = activation_scales(
            activation_scale, tokens, inner, min(group, inner)
        )
    blocks = -(-features // SCALE_BLOCK)
    weight_scale = operand(weight_scale, torch.float32, (1, groups), (features, blocks))
    bias = optional_operand(bias, torch.float32, (features,))
    if zero_point is not None:
        zero_point = operand(zero_point, torch.int32, (1, tokens))
        weight_sums = optional_operand(weight_sums, torch.int32, (features,))
    output = activations.new_empty(tokens, features, dtype=dtype)
    product = Product(
        activations=aligned.data_ptr(),
        weight=packed.data_ptr(),
        tokens=tokens,
        features=features,
        inner=aligned.shape[1],
        group=group if group < inner else aligned.shape[1],
        row_stride=_row_stride(aligned),
        activation_scale=pointer(activation_scale),
        activation_row_step=row_step,
        activation_group_step=group_step,
        weight_scale=weight_scale.data_ptr(),
        weight_group_step=weight_scale.stride(0) if weight_scale.shape[0] > 1 else 0,
        scale_columns=1 if weight_scale.shape[1] == features else SCALE_BLOCK,
        bias=pointer(bias),
        zero_point=pointer(zero_point),
        zero_point_step=1 if zero_point is not None and zero_point.numel() > 1 else 0,
        weight_sums=None if zero_point is None else pointer(weight_sums),
        output=output.data_ptr(),
        output_type=FLOAT_NUMBERS[dtype],
    )
    _run(function, output, ctypes.byref(product), *more)
    return output
