"""Arguments of ops in the form that kernels take: numbers for dtypes, formats and rules, packings,
and checked shapes.

A tensor that a kernel would read or write out of bounds is refused here, with the shape that is
needed. A dtype or number format that kernels don't support has no number here; the reference then
computes the op.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.schemes.quant_spec import block

# The order of the enums in kernels/cpu/quantize_blocks.h and kernels/cuda/numbers.h.
FLOAT_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
FORMAT_NUMBERS = {"INT8": 0, "FP8_E4M3": 1}
CODE_NUMBERS = {
    torch.int8: 0,
    torch.float8_e4m3fn: 1,
}  # the same numbers, by the dtype of the codes
RULE_NUMBERS = {"stored": 0, "power_of_two": 1, "dynamic": 2}

# A packed weight on the CPU: output features per panel, and the multiple to which input features
# are padded with zeros.
PANEL = 16
PANEL_INNER_UNIT = 64
# With this many input features, a sum of INT8 products can overflow int32.
LEAST_UNSAFE_INNER = 1 << 17
# On CUDA: output features that may share a scale, and the multiple to which a packed weight's input
# features are padded with zeros.
SCALE_BLOCK = 128
ROW_UNIT = 16


@dataclass(frozen=True)
class Packing:
    """The memory arrangement of a weight for one matrix multiplication (QkPacking in
    kernels/cpu/matmul.h).

    number: its value in that enum.
    code_dtype: dtype of the codes before packing.
    dtype: dtype of the packed weight.
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
    """The packing with this name. Raises ValueError for an unknown name."""
    if name not in PACKINGS:
        raise ValueError(f"unknown packing '{name}'; choose one of {', '.join(PACKINGS)}")
    return PACKINGS[name]


def packed_shape(out_features: int, in_features: int, device: str = "cpu") -> tuple[int, ...]:
    """The shape of a packed weight.

    On the CPU: [panels of 16 output features, in_features padded to a multiple of 64, 16].
    On CUDA: [out_features, in_features padded to a multiple of 16].
    """
    if device == "cuda":
        return out_features, -(-in_features // ROW_UNIT) * ROW_UNIT
    return (
        -(-out_features // PANEL),
        -(-in_features // PANEL_INNER_UNIT) * PANEL_INNER_UNIT,
        PANEL,
    )


def check_codes(codes: Tensor, packing: str) -> None:
    """Raise ValueError unless the codes are a matrix of the packing's code dtype."""
    needed = packing_named(packing).code_dtype
    if codes.dim() != 2 or codes.dtype != needed:
        raise ValueError(
            f"the codes are {codes.dtype} {list(codes.shape)}; {packing} packs a matrix of {needed}"
        )


def check_states(states: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless `states` is [batch, heads, tokens, head size] and `scale` is [1] or
    [heads].
    """
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
    """Raise ValueError unless there is one scale for each block.

    needed: [block rows, block columns].
    """
    if tuple(scale.shape) != needed:
        raise ValueError(
            f"the scale has the shape {list(scale.shape)}, the blocks need {list(needed)}"
        )


def scale_shape(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, int]:
    """The number of blocks of a matrix: [block rows, block columns]."""
    return block(block_rows, block_columns).scale_shape(*values.shape)


def rows_dense(values: Tensor) -> Tensor:
    """The same matrix with adjacent elements in each row and rows that don't overlap. Copied only
    if needed.
    """
    return (
        values
        if values.stride(1) == 1 and (values.shape[0] < 2 or values.stride(0) >= values.shape[1])
        else values.contiguous()
    )


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address for a C function; None (NULL) for None."""
    return None if tensor is None else tensor.data_ptr()


def operand(tensor: Tensor, dtype: torch.dtype, *sizes: tuple[int, ...]) -> Tensor:
    """A scale, bias or zero point as kernels read it: contiguous and of this dtype.

    sizes: for each dimension, its allowed sizes.

    Raises ValueError for any other shape.
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
    """As `operand`; None stays None."""
    return None if tensor is None else operand(tensor, dtype, *sizes)


def activation_scales(scale: Tensor, rows: int, inner: int, group: int) -> tuple[Tensor, int, int]:
    """The scale [rows or 1, groups or 1], and its strides from one row and one group to the next (0
    if shared).
    """
    groups = -(-inner // group)
    scale = operand(scale, torch.float32, (1, rows), (1, groups))
    return scale, scale.stride(0) if scale.shape[0] > 1 else 0, 1 if scale.shape[1] > 1 else 0


def weight_scales(scale: Tensor, out_features: int, inner: int, group: int) -> tuple[Tensor, int]:
    """The scale [groups or 1, out_features], and its stride from one group to the next (0 if
    shared).
    """
    scale = operand(scale, torch.float32, (1, -(-inner // group)), (out_features,))
    return scale, out_features if scale.shape[0] > 1 else 0


def out_features_of(packed: Tensor, weight_scale: Tensor) -> int:
    """The number of output features of a packed weight.

    weight_scale: [groups or 1, out_features]; a weight packed for CUDA tells by its own shape.
    """
    return packed.shape[0] if packed.dim() == 2 else weight_scale.shape[1]
