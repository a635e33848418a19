"""What ops are given, as kernels read it: numbers of dtypes, formats and rules, packings, checked
shapes.

A tensor that a kernel would read or write out of bounds is refused here, with the shape that is
needed. A dtype, number format or layout that kernels don't know has no number here: the reference
computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.schemes.quant_spec import block

# The order of the enums in kernels/cpu/quantize_blocks.h and kernels/cuda/numbers.h.
FLOAT_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
FORMAT_NUMBERS = {"INT8": 0, "FP8_E4M3": 1}
CODE_NUMBERS = {torch.int8: 0, torch.float8_e4m3fn: 1}  # the same, by the dtype of the codes
RULE_NUMBERS = {"stored": 0, "power_of_two": 1, "dynamic": 2}

PANEL = 16  # output features of a panel of a packed weight on the CPU
PANEL_INNER_UNIT = 64  # its input features are padded with zeros to a multiple
LEAST_UNSAFE_INNER = 1 << 17  # input features from which a sum of INT8 products overflows int32
SCALE_BLOCK = 128  # output features that may share a scale on CUDA
ROW_UNIT = 16  # input features of a packed weight on CUDA are padded with zeros to a multiple


@dataclass(frozen=True)
class Packing:
    """The arrangement of a weight for one multiplication: QkPacking in kernels/cpu/matmul.h.

    number: in that enum.
    code_dtype: of the codes that are packed.
    dtype: of the packed weight.
    side_by_side: consecutive input features of one output feature that are adjacent in a panel.
    """

    number: int
    code_dtype: torch.dtype
    dtype: torch.dtype
    side_by_side: int


PACKINGS = {
    "int8_dot": Packing(0, torch.int8, torch.uint8, 4),
    "int8": Packing(1, torch.int8, torch.uint8, 1),
    "e4m3": Packing(2, torch.float8_e4m3fn, torch.uint8, 1),
    "bf16": Packing(3, torch.bfloat16, torch.bfloat16, 2),
}


def packing_named(name: str) -> Packing:
    if name not in PACKINGS:
        raise ValueError(f"unknown packing '{name}'; choose one of {', '.join(PACKINGS)}")
    return PACKINGS[name]


def packed_shape(out_features: int, in_features: int, device: str = "cpu") -> tuple[int, ...]:
    """The shape of a packed weight. On the CPU: [panels of 16 output features, in_features padded
    to a multiple of 64, 16]; on CUDA: [out_features, in_features padded to a multiple of 16].
    """
    if device == "cuda":
        return out_features, -(-in_features // ROW_UNIT) * ROW_UNIT
    return (
        -(-out_features // PANEL),
        -(-in_features // PANEL_INNER_UNIT) * PANEL_INNER_UNIT,
        PANEL,
    )


def check_codes(codes: Tensor, packing: str) -> None:
    """Raise ValueError unless the codes are a matrix of the packing's dtype."""
    needed = packing_named(packing).code_dtype
    if codes.dim() != 2 or codes.dtype != needed:
        raise ValueError(
            f"the codes are {codes.dtype} {list(codes.shape)}; {packing} packs a matrix of {needed}"
        )


def check_states(states: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless states are [batch, heads, tokens, width] and scale [1] or [heads]."""
    if states.dim() != 4 or not states.is_floating_point():
        raise ValueError(
            f"the states are {states.dtype} {list(states.shape)}, not floating-point [batch, heads,"
            " tokens, width]"
        )
    if scale.dim() != 1 or scale.shape[0] not in (1, states.shape[1]):
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}; needed is [1], or [{states.shape[1]}],"
            " one for each head"
        )


def check_scale(scale: Tensor, needed: tuple[int, int]) -> None:
    """Raise ValueError unless there is one scale for each block."""
    if tuple(scale.shape) != needed:
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}, the blocks need {list(needed)}"
        )


def scale_shape(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, int]:
    """[block rows, block columns] of a matrix."""
    return block(block_rows, block_columns).scale_shape(*values.shape)


def rows_dense(values: Tensor) -> Tensor:
    """The same matrix with the elements of each row adjacent, and rows that don't overlap."""
    return (
        values
        if values.stride(1) == 1 and (values.shape[0] < 2 or values.stride(0) >= values.shape[1])
        else values.contiguous()
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def operand(tensor: Tensor, dtype: torch.dtype, *sizes: tuple[int, ...]) -> Tensor:
    """A scale, bias or zero point as a kernel reads it: dense, of this dtype. sizes: those allowed
    of each dimension; ValueError for any other.
    """
    if tensor.dim() != len(sizes) or any(
        size not in allowed for size, allowed in zip(tensor.shape, sizes)
    ):
        raise ValueError(
            f"a scale, bias or zero point has the shape {list(tensor.shape)}; needed is"
            f" {[' or '.join(map(str, sorted(set(s)))) for s in sizes]}"
        )
    return tensor.to(dtype).contiguous()


def optional_operand(
    tensor: Tensor | None, dtype: torch.dtype, *sizes: tuple[int, ...]
) -> Tensor | None:
    return None if tensor is None else operand(tensor, dtype, *sizes)


def activation_scales(scale: Tensor, rows: int, inner: int, group: int) -> tuple[Tensor, int, int]:
    """The scale [rows or 1, groups or 1] and its steps from one row and one group to the next."""
    groups = -(-inner // group)
    scale = operand(scale, torch.float32, (1, rows), (1, groups))
    return scale, scale.stride(0) if scale.shape[0] > 1 else 0, 1 if scale.shape[1] > 1 else 0


def weight_scales(scale: Tensor, out_features: int, inner: int, group: int) -> tuple[Tensor, int]:
    """The scale [groups or 1, out_features] and its step from one group to the next."""
    scale = operand(scale, torch.float32, (1, -(-inner // group)), (out_features,))
    return scale, out_features if scale.shape[0] > 1 else 0


def out_features_of(packed: Tensor, weight_scale: Tensor) -> int:
    return packed.shape[0] if packed.dim() == 2 else weight_scale.shape[1]
