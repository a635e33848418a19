"""How files store codes and scales: integer codes in 32-bit words, E8M0 scales as bytes.

compressed-tensors' pack-quantized layout stores a code of b bits as code + 2^(b-1), which is
unsigned. 32 / b codes along in_features make a word, the first code in the lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.schemes.number_formats import E8M0, NumberFormat


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


def encode_scales(scale: Tensor, scale_format: NumberFormat | None) -> Tensor:
    """Scales as they are stored: E8M0 as a byte (exponent plus 127); float32 unchanged.

    scale: float32, of any shape.
    scale_format: E8M0, or None for float32.
    """
    if scale_format != E8M0:
        return scale
    return (torch.log2(scale).round() + 127).to(torch.uint8)


def decode_scales(stored: Tensor) -> Tensor:
    """Stored scales as float32 factors.

    stored: uint8 (E8M0) or any floating-point dtype.
    """
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
