"""INT8 codes into 32-bit words and back, as the pack-quantized layout has them.

Each code is stored as code + 128 (an unsigned byte), four to a word along in_features, the first in
the lowest byte.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int8(codes: Tensor) -> Tensor:
    """codes: int8 [out_features, in_features], in_features a multiple of 4; returns int32
    [out_features, in_features / 4].
    """
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    # A view as int32 puts the first byte lowest on every little-endian machine, which safetensors
    # requires anyway.
    return unsigned.contiguous().view(torch.int32)


def unpack_int8(words: Tensor) -> Tensor:
    """words: int32 [out_features, in_features / 4]; returns int8 [out_features, in_features]."""
    unsigned = words.contiguous().view(torch.uint8)
    return (unsigned.to(torch.int16) - 128).to(torch.int8)
