"""Packing signed integer codes into 32-bit words and unpacking them, in compressed-tensors'
pack-quantized layout.

A code of b bits is stored as code + 2^(b-1), which is unsigned. 32 / b codes along in_features make
a word, the first code in the lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.schemes.number_formats import NumberFormat


def pack_codes(codes: Tensor, number_format: NumberFormat) -> Tensor:
    """Pack codes into words.

    codes: int8 [out_features, in_features]; in_features is a multiple of the codes per word.

    Returns int32 [out_features, in_features / codes per word].
    """
    bits = number_format.bits
    unsigned = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    per_byte = 8 // bits
    packed = unsigned[:, ::per_byte]
    for place in range(1, per_byte):
        packed = packed | unsigned[:, place::per_byte] << bits * place
    # On a little-endian machine, which safetensors requires anyway, a view as int32 puts the first
    # byte into the lowest bits.
    return packed.contiguous().view(torch.int32)


def unpack_codes(words: Tensor, number_format: NumberFormat) -> Tensor:
    """Unpack words into codes.

    words: int32 [out_features, in_features / codes per word].

    Returns int8 [out_features, in_features].
    """
    bits = number_format.bits
    packed = words.contiguous().view(torch.uint8)
    if bits < 8:
        parts = [packed >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
        packed = torch.stack(parts, dim=-1).flatten(-2)
    return (packed.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
