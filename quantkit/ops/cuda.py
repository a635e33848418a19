"""torch.ops.quantkit.* on CUDA: the compiled kernels (kernels/cuda/*.cu) on torch's current stream.

Each function returns None where no kernel takes its arguments; torch_ops.py then runs the
reference. Nothing here synchronizes, and all memory is torch's, so calls may be captured in a CUDA
graph. Weights stand as pack_weight leaves them on CUDA: [out_features, in_features padded to 16]
bytes. Activations whose rows don't begin on 16 bytes, or end within 16 codes, are copied to rows
that do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.ops.arguments import (
    FORMAT_NUMBERS,
    FORMATS,
    INPUT_NUMBERS,
    PACKINGS,
    ROW_UNIT,
    RULE_NUMBERS,
    SCALE_BLOCK,
    activation_scales,
    check_states,
    plain_weight,
    pointer,
    rows_dense,
    side,
)
from quantkit.ops.native import Product, cuda_kernels

LEAST_CAPABILITY = (8, 0)
GROUP_UNIT = 32  # input features of one tensor-core instruction: groups are multiples
# As matmul_decode.h: with more tokens than that, Blackwell's tensor cores want other instructions
# than ours, which torch has.
MOST_DECODE_TOKENS = 16


def missing_reason(device: str | torch.device | None = None) -> str | None:
    """Why no CUDA kernel runs on this device (default: the current one), or None where they do."""
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
    """How a device of this compute capability multiplies."""
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
    """The architecture whose kernels run on a device: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def quantize_rows(rows: Tensor, group: int, format: str, rule: str) -> tuple[Tensor, Tensor] | None:
    if not _is_ready(rows) or rows.dim() != 2 or rows.dtype not in INPUT_NUMBERS:
        return None
    rows = rows_dense(rows)
    count, columns = rows.shape
    codes = rows.new_empty(rows.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    scale = rows.new_empty(count, -(-columns // group), dtype=torch.float32)
    numbers = (
        INPUT_NUMBERS[rows.dtype],
        count,
        columns,
        _row_stride(rows),
        group,
        FORMAT_NUMBERS[format],
        RULE_NUMBERS[rule],
    )
    _run(
        "qk_cuda_quantize_rows", rows, rows.data_ptr(), *numbers, scale.data_ptr(), codes.data_ptr()
    )
    return codes, scale


def quantize_blocks(
    values: Tensor, block_rows: int, block_columns: int, format: str, rule: str
) -> tuple[Tensor, Tensor] | None:
    return quantize_rows(values, block_columns, format, rule) if block_rows == 1 else None


def encode_blocks(
    values: Tensor, scale: Tensor, block_rows: int, block_columns: int, format: str
) -> Tensor | None:
    """One scale for all, or one for each row: the static scales of activations and the scales of
    channels.
    """
    if (
        values.dim() != 2
        or block_columns < values.shape[1]
        or (block_rows != 1 and block_rows < values.shape[0])
    ):
        return None
    heads = values.shape[0] if block_rows == 1 else 1
    if tuple(scale.shape) != (heads, 1):
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}, the blocks need {[heads, 1]}"
        )
    states = rows_dense(values).unflatten(0, (1, heads, -1)) if values.numel() else values
    codes = quantize_kv(states, scale.reshape(-1), format) if values.numel() else None
    return None if codes is None else codes.reshape(values.shape)


def quantize_kv(states: Tensor, scale: Tensor, format: str) -> Tensor | None:
    check_states(states, scale)
    if not _is_ready(states) or states.dtype not in INPUT_NUMBERS:
        return None
    if states.stride(3) != 1:
        states = states.contiguous()
    scale = scale.float().contiguous()
    codes = states.new_empty(states.shape, dtype=getattr(torch, FORMATS[format].torch_name))
    shape = (
        *states.shape,
        *(stride if size > 1 else 0 for size, stride in zip(states.shape[:3], states.stride()[:3])),
    )
    own = 1 if scale.shape[0] > 1 else 0
    _run(
        "qk_cuda_quantize_kv",
        states,
        states.data_ptr(),
        INPUT_NUMBERS[states.dtype],
        *shape,
        scale.data_ptr(),
        own,
        FORMAT_NUMBERS[format],
        codes.data_ptr(),
    )
    return codes


def dequantize_blocks(
    codes: Tensor,
    scale: Tensor,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    number_format, dtype = (
        {torch.int8: 0, torch.float8_e4m3fn: 1}.get(codes.dtype),
        dtype or torch.float32,
    )
    if (
        not _is_ready(codes)
        or codes.dim() != 2
        or number_format is None
        or dtype not in INPUT_NUMBERS
    ):
        return None
    codes, scale = rows_dense(codes), scale.float().contiguous()
    needed = (-(-codes.shape[0] // block_rows), -(-codes.shape[1] // block_columns))
    if tuple(scale.shape) != needed:
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}, the blocks need {list(needed)}"
        )
    values = codes.new_empty(codes.shape, dtype=dtype)
    sizes = (*codes.shape, _row_stride(codes), block_rows, block_columns)
    _run(
        "qk_cuda_dequantize",
        codes,
        codes.data_ptr(),
        number_format,
        *sizes,
        scale.data_ptr(),
        INPUT_NUMBERS[dtype],
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
) -> Tensor | None:
    if not _multiplies(activations, torch.int8, packed, group) or activations.shape[1] >= 1 << 17:
        return None
    if zero_point is not None and (weight_sums is None or group < activations.shape[1]):
        raise ValueError("a zero point needs weight_sums and one group")
    product = _Product(activations, packed, weight_scale, group, bias, dtype, activation_scale)
    product.shift(zero_point, weight_sums)
    return product.run("qk_cuda_matmul_int8")


def matmul_fp8(
    activations: Tensor,
    activation_scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    group: int,
    powers_of_two: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    if not _multiplies(activations, torch.float8_e4m3fn, packed, group):
        return None
    if _is_for_torch(activations, packed, group, bias, dtype):
        rows, own = (
            activations.shape[0],
            side(activation_scale, torch.float32, (1, activations.shape[0]), (1,)),
        )
        return torch._scaled_mm(
            activations.contiguous(),
            packed.view(torch.float8_e4m3fn).t(),
            scale_a=own.expand(rows, 1).contiguous(),
            scale_b=side(weight_scale, torch.float32, (1,), (packed.shape[0],)),
            out_dtype=dtype,
        )
    return _Product(activations, packed, weight_scale, group, bias, dtype, activation_scale).run(
        "qk_cuda_matmul_fp8"
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
) -> Tensor | None:
    if packing not in ("int8", "e4m3"):
        raise ValueError(
            f"matmul_weight_only takes int8 or e4m3, not '{packing}'; known packings:"
            f" {', '.join(PACKINGS)}"
        )
    if not _multiplies(inputs, torch.bfloat16, packed, group):
        return None
    return _Product(inputs, packed, weight_scale, group, bias, dtype, None).run(
        "qk_cuda_matmul_weight_only", 0 if packing == "int8" else 1
    )


KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        quantize_rows,
        quantize_blocks,
        encode_blocks,
        quantize_kv,
        dequantize_blocks,
        pack_weight,
        matmul_int8,
        matmul_fp8,
        matmul_weight_only,
    )
}


def _is_ready(tensor: Tensor) -> bool:
    return (
        tensor.numel() > 0
        and cuda_kernels() is not None
        and (
            not tensor.is_cuda
            or torch.cuda.get_device_capability(tensor.device) >= LEAST_CAPABILITY
        )
    )


def _row_stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _run(name: str, on: Tensor, *arguments: Any) -> None:
    """Call a function of the library on the current stream of the tensor's device. Tests run an
    emulated library with tensors that are not CUDA's.
    """
    library = cuda_kernels()
    if not on.is_cuda:
        status = getattr(library, name)(*arguments, None)
    elif on.device.index == torch.cuda.current_device():
        status = getattr(library, name)(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        with torch.cuda.device(on.device):
            status = getattr(library, name)(*arguments, torch.cuda.current_stream().cuda_stream)
    if status == -1:
        raise AssertionError(f"{name} refused its arguments")
    if status != 0:
        raise RuntimeError(f"{name} failed: {library.qk_cuda_error(status).decode()} ({status})")


def _multiplies(activations: Tensor, dtype: torch.dtype, packed: Tensor, group: int) -> bool:
    """Whether a kernel takes this, after refusing what would be read beyond its end."""
    if activations.dim() != 2 or activations.dtype != dtype:
        raise ValueError(
            f"the activations are {activations.dtype} {list(activations.shape)}, not a matrix of"
            f" {dtype}"
        )
    inner = activations.shape[1]
    if (
        packed.dim() != 2
        or packed.shape[1] != -(-inner // ROW_UNIT) * ROW_UNIT
        or packed.dtype != torch.uint8
        or not packed.is_contiguous()
    ):
        raise ValueError(
            f"the packed weight is {packed.dtype} {list(packed.shape)}; {inner} inputs need rows of"
            f" {-(-inner // ROW_UNIT) * ROW_UNIT} bytes, as pack_weight on CUDA makes them"
        )
    if packed.device != activations.device:
        raise ValueError(
            f"the activations are on {activations.device}, the packed weight is on {packed.device}"
        )
    return (
        _is_ready(activations)
        and packed.shape[0] > 0
        and (group >= inner or group % GROUP_UNIT == 0)
    )


def _is_for_torch(
    activations: Tensor, packed: Tensor, group: int, bias: Tensor | None, dtype: torch.dtype
) -> bool:
    """Blackwell's data-centre chips (10.x) have FP8 speed in tcgen05 instructions alone, which
    torch's library uses. doctor says so.
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
    """The matrix with rows that begin on 16 bytes and have a multiple of 16 elements, zeros at
    their ends: itself, where it is so.
    """
    inner = matrix.shape[1]
    if inner % ROW_UNIT == 0 and matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0:
        stride = _row_stride(matrix)
        if stride >= inner and stride % ROW_UNIT == 0:
            return matrix
    # As integers: torch fills and copies those of every width on every device.
    raw = torch.uint8 if matrix.element_size() == 1 else torch.int16
    padded = torch.zeros(
        matrix.shape[0], -(-inner // ROW_UNIT) * ROW_UNIT, dtype=raw, device=matrix.device
    )
    padded[:, :inner] = matrix.view(raw)
    return padded.view(matrix.dtype)


class _Product:
    """One multiplication: checked tensors, kept until the call is over, and the structure that
    names them.
    """

    def __init__(
        self,
        activations: Tensor,
        packed: Tensor,
        weight_scale: Tensor,
        group: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation_scale: Tensor | None,
    ) -> None:
        rows, inner = activations.shape
        features, one_group = packed.shape[0], group >= inner
        groups = 1 if one_group else -(-inner // group)
        self.activations = _on_16_bytes(activations)
        self.output = activations.new_empty(rows, features, dtype=dtype)
        own_steps = (0, 0)
        self.activation_scale = None
        if activation_scale is not None:
            self.activation_scale, *own_steps = activation_scales(
                activation_scale, rows, inner, inner if one_group else group
            )
        blocks = -(-features // SCALE_BLOCK)
        self.weight_scale = side(weight_scale, torch.float32, (1, groups), (features, blocks))
        self.bias = side(bias, torch.float32, (features,))
        wide = self.activations.shape[1]
        self.zero_point = self.weight_sums = None
        self.packed = packed
        self.fields = Product(
            activations=self.activations.data_ptr(),
            weight=packed.data_ptr(),
            tokens=rows,
            features=features,
            inner=wide,
            group=wide if one_group else group,
            row_stride=_row_stride(self.activations),
            activation_scale=pointer(self.activation_scale),
            activation_row_step=own_steps[0],
            activation_group_step=own_steps[1],
            weight_scale=self.weight_scale.data_ptr(),
            weight_group_step=self.weight_scale.stride(0) if self.weight_scale.shape[0] > 1 else 0,
            scale_columns=1 if self.weight_scale.shape[1] == features else SCALE_BLOCK,
            bias=pointer(self.bias),
            output=self.output.data_ptr(),
            output_type=INPUT_NUMBERS[dtype],
        )

    def shift(self, zero_point: Tensor | None, weight_sums: Tensor | None) -> None:
        if zero_point is None:
            return
        self.zero_point = side(zero_point, torch.int32, (1, self.fields.tokens))
        self.weight_sums = side(weight_sums, torch.int32, (self.fields.features,))
        self.fields.zero_point, self.fields.weight_sums = (
            self.zero_point.data_ptr(),
            self.weight_sums.data_ptr(),
        )
        self.fields.zero_point_step = 1 if self.zero_point.numel() > 1 else 0

    def run(self, name: str, *more: int) -> Tensor:
        _run(name, self.output, ctypes.byref(self.fields), *more)
        return self.output
