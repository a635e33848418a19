"""The 8-bit number formats, as values.

FP8 E4M3 is a *floating-point* format: one sign bit, 4 exponent bits (bias 7), 3 mantissa bits. It
has 253 distinct
finite values up to ±448, subnormals down to 2⁻⁹, no infinity and two NaN codes (Micikevicius et al.
2022, "FP8 Formats for Deep Learning"; OCP 8-bit Floating Point Specification). INT8 is 256 equally
spaced integers. E8M0 is no format for values but for scales: one byte, a power of two (OCP
Microscaling Formats Specification 1.0).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """One 8-bit format: what it can represent and what torch and safetensors call it."""

    name: str
    kind: str  # "int", "float", or "exponent" for powers of two
    min: float
    max: float
    torch_name: str
    safetensors_name: str
    bits: int = 8
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def smallest_subnormal(self) -> float:
        """The least positive value of a float format."""
        bias = 2 ** (self.exponent_bits - 1) - 1
        return 2.0 ** (1 - bias - self.mantissa_bits)


INT8 = NumberFormat("INT8", "int", -128, 127, "int8", "I8")
FP8_E4M3 = NumberFormat(
    "FP8_E4M3", "float", -448.0, 448.0, "float8_e4m3fn", "F8_E4M3", exponent_bits=4, mantissa_bits=3
)
FP8_E5M2 = NumberFormat(
    "FP8_E5M2",
    "float",
    -57344.0,
    57344.0,
    "float8_e5m2",
    "F8_E5M2",
    exponent_bits=5,
    mantissa_bits=2,
)
# Stored as a plain byte (exponent + 127): runtimes read U8, not torch's float8_e8m0fnu.
E8M0 = NumberFormat("E8M0", "exponent", 2.0**-127, 2.0**127, "uint8", "U8", exponent_bits=8)
