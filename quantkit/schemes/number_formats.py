"""The number formats of codes and of scales.

FP8 E4M3   a floating-point format with 1 sign bit, 4 exponent bits (bias 7) and 3 mantissa bits.
           It has 253 distinct finite values up to ±448, subnormals down to 2⁻⁹, no infinity and two
           NaN codes. Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; OCP 8-bit
           Floating Point Specification.
FP8 E5M2   the same with 5 exponent bits (bias 15) and 2 mantissa bits: values up to ±57344.
INT8       256 equally spaced integers.
E8M0       a format for scales only: one byte, a power of two. Source: OCP Microscaling Formats
           Specification 1.0.

To add a format, add a value to NUMBER_FORMATS, and to CODE_FORMATS if recipes may name it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WORD_BITS = 32  # size of the integers that pack-quantized checkpoints store codes in


@dataclass(frozen=True)
class NumberFormat:
    """The range of a number format, and how its codes are stored.

    name: name in ops and kernels, such as "INT8".
    kind: "int", "float", or "exponent" for powers of two.
    min: value of the least code; smaller values are clipped to it.
    max: value of the greatest code; greater values are clipped to it.
    torch_name: name of the torch dtype of a code.
    safetensors_name: name of that dtype in a safetensors header.
    label: short name in tables.
    bits: size of a code.
    exponent_bits: number of exponent bits of a float format.
    mantissa_bits: number of mantissa bits of a float format.
    """

    name: str
    kind: str
    min: float
    max: float
    torch_name: str
    safetensors_name: str
    label: str
    bits: int = 8
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def codes_per_word(self) -> int:
        """Codes per 32-bit word, in checkpoint formats that pack codes."""
        return WORD_BITS // self.bits

    @property
    def clips_above(self) -> float:
        """Magnitudes above this are clipped, not just rounded to the greatest code: half a step
        above the greatest code.
        """
        if self.kind == "int":
            return self.max + 0.5
        return self.max + 2.0 ** (math.floor(math.log2(self.max)) - self.mantissa_bits - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a known format by its name, so that each process has one object for it."""
        if NUMBER_FORMATS.get(self.name) == self:
            return _format_named, (self.name,)
        return NumberFormat, tuple(vars(self).values())


def _format_named(name: str) -> NumberFormat:
    return NUMBER_FORMATS[name]


INT8 = NumberFormat("INT8", "int", -128, 127, "int8", "I8", "INT8")
FP8_E4M3 = NumberFormat(
    "FP8_E4M3",
    "float",
    -448.0,
    448.0,
    "float8_e4m3fn",
    "F8_E4M3",
    "E4M3",
    exponent_bits=4,
    mantissa_bits=3,
)
FP8_E5M2 = NumberFormat(
    "FP8_E5M2",
    "float",
    -57344.0,
    57344.0,
    "float8_e5m2",
    "F8_E5M2",
    "E5M2",
    exponent_bits=5,
    mantissa_bits=2,
)
# Stored as a plain byte (exponent + 127): runtimes read U8, not torch's float8_e8m0fnu.
E8M0 = NumberFormat("E8M0", "exponent", 2.0**-127, 2.0**127, "uint8", "U8", "E8M0", exponent_bits=8)

NUMBER_FORMATS: dict[str, NumberFormat] = {
    number_format.name: number_format for number_format in (INT8, FP8_E4M3, FP8_E5M2, E8M0)
}
# The formats of codes in recipes and in `quantization_config`: (num_bits, type) → format.
CODE_FORMATS: dict[tuple[int, str], NumberFormat] = {
    (number_format.bits, number_format.kind): number_format for number_format in (INT8, FP8_E4M3)
}


def holds_codes(safetensors_name: str) -> bool:
    """Whether a safetensors dtype is that of codes or scales. Unquantized weights never have it."""
    return any(safetensors_name == known.safetensors_name for known in NUMBER_FORMATS.values())
