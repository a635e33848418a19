"""What ops are given, as kernels take it: the numbers of types, formats and rules, checked shapes
of scales and weights, rows that are dense.

What a kernel would read or write beyond its end is refused here, with the shape that is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.schemes.number_formats import FP8_E4M3, INT8
from quantkit.schemes.scheme import block

FORMATS = {number_format.name: number_format for number_format in (INT8, FP8_E4M3)}
# The order of the enums in kernels/cpu/quantize_blocks.h and kernels/cuda/numbers.h.
INPUT_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
FORMAT_NUMBERS = {"INT8": 0, "FP8_E4M3": 1}
RULE_NUMBERS = {"stored": 0, "power_of_two": 1, "dynamic": 2}
# What a packed weight holds, and so which multiplication it is for: the order of QkPacking in
# kernels/cpu/matmul.h.
PACKINGS = {
    "int8_dot": torch.int8,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
}
SCALE_BLOCK = 128  # output features that may share a scale on CUDA
ROW_UNIT = 16  # input features of a weight on CUDA are padded with zeros to a multiple


def rows_dense(values: Tensor) -> Tensor:
    """The same matrix with the elements of each row side by side, and rows that don't overlap."""
    return (
        values
        if values.stride(1) == 1 and (values.shape[0] < 2 or values.stride(0) >= values.shape[1])
        else values.contiguous()
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def side(tensor: Tensor | None, dtype: torch.dtype, *sizes: tuple[int, ...]) -> Tensor | None:
    """The tensor as a kernel reads it. sizes: the allowed ones of each dimension."""
    if tensor is None:
        return None
    if tensor.dim() != len(sizes) or any(
        size not in allowed for size, allowed in zip(tensor.shape, sizes)
    ):
        raise ValueError(
            f"a scale, bias or zero point has the shape {list(tensor.shape)}; needed is"
            f" {[' or '.join(map(str, sorted(set(s)))) for s in sizes]}"
        )
    return tensor.to(dtype).contiguous()


def activation_scales(scale: Tensor, rows: int, inner: int, group: int) -> tuple[Tensor, int, int]:
    """The scale [rows or 1, groups or 1] and its steps from one row and one group to the next."""
    groups = -(-inner // group)
    scale = side(scale, torch.float32, (1, rows), (1, groups))
    return scale, scale.stride(0) if scale.shape[0] > 1 else 0, 1 if scale.shape[1] > 1 else 0


def weight_scales(scale: Tensor, out_features: int, inner: int, group: int) -> tuple[Tensor, int]:
    scale = side(scale, torch.float32, (1, -(-inner // group)), (out_features,))
    return scale, out_features if scale.shape[0] > 1 else 0


def out_features_of(packed: Tensor, weight_scale: Tensor) -> int:
    return packed.shape[0] if packed.dim() == 2 else weight_scale.shape[1]


def packed_dtype(packing: str) -> torch.dtype:
    return torch.bfloat16 if packing == "bf16" else torch.uint8


def check_codes(codes: Tensor, packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"unknown packing '{packing}'; choose one of {', '.join(PACKINGS)}")
    if codes.dim() != 2 or codes.dtype != PACKINGS[packing]:
        raise ValueError(
            f"the codes are {codes.dtype} {list(codes.shape)}; {packing} packs a matrix of"
            f" {PACKINGS[packing]}"
        )


def plain_weight(codes: Tensor, packing: str) -> Tensor:
    """What pack_weight makes on CUDA: [out_features, in_features padded with zeros to a multiple of
    16], for every packing.
    """
    check_codes(codes, packing)
    return torch.nn.functional.pad(
        codes.view(packed_dtype(packing)), (0, -codes.shape[1] % ROW_UNIT)
    ).contiguous()


def check_states(states: Tensor, scale: Tensor) -> None:
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


def scale_shape(values: Tensor, block_rows: int, block_columns: int) -> tuple[int, int]:
    return block(block_rows, block_columns).scale_shape(*values.shape)
