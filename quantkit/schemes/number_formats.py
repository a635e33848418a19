"""The number formats of codes and of scales, as values.

FP8 E4M3 is a *floating-point* format: one sign bit, 4 exponent bits (bias 7), 3 mantissa bits. It
has 253 distinct finite values up to ±448, subnormals down to 2⁻⁹, no infinity and two NaN codes
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; OCP 8-bit Floating Point Specification).
INT8 is 256 equally spaced integers. E8M0 is a format for scales only: one byte, a power of two (OCP
Microscaling Formats Specification 1.0).

A new format is one value here, in NUMBER_FORMATS, and in CODE_FORMATS if recipes may name it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

WORD_BITS = 32  # of the integers in which pack-quantized checkpoints store codes


@dataclass(frozen=True)
class NumberFormat:
    """What a number format can represent, and how its codes are stored.

    name: "INT8"; ops and kernels know the format by it.
    kind: "int", "float", or "exponent" for powers of two.
    min, max: the least and the greatest code's value; values beyond are clipped to them.
    torch_name: the torch dtype that holds one code.
    safetensors_name: the same dtype in a safetensors header.
    label: the short name in tables.
    bits: of one code.
    exponent_bits, mantissa_bits: of a float format.
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
        """How many codes one 32-bit word holds, where a file format packs them."""
        return WORD_BITS // self.bits

    @property
    def clips_above(self) -> float:
        """The magnitude above which a value is clipped, not rounded to the greatest code: half a
        step above it.
        """
        if self.kind == "int":
            return self.max + 0.5
        return self.max + 2.0 ** (math.floor(math.log2(self.max)) - self.mantissa_bits - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """A format of the table is pickled by its name: it is one object in every process."""
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
# What a recipe or a `quantization_config` may ask for, by (num_bits, type).
CODE_FORMATS: dict[tuple[int, str], NumberFormat] = {
    (number_format.bits, number_format.kind): number_format for number_format in (INT8, FP8_E4M3)
}
