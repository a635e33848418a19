"""The number formats against their bit patterns."""

import dataclasses
import math
import pickle

import pytest
import torch

from quantkit.ops.reference import encode_codes
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, FP8_E5M2, INT8, NUMBER_FORMATS


def value_of_e4m3(code: int) -> float:
    """The value of a code from its bits, as the OCP specification has it: sign, 4 exponent bits
    (bias 7), 3 mantissa bits.
    """
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 0x7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


FINITE_CODES = [code for code in range(256) if code & 0x7F != 0x7F]
POSITIVE_CODES = range(0x7F)  # in the order of their values: 0 … 448


def encoded(values: torch.Tensor) -> list[int]:
    return encode_codes(values, FP8_E4M3).view(torch.uint8).tolist()


def test_every_e4m3_code_means_what_the_specification_says():
    decoded = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    expected = torch.tensor([value_of_e4m3(code) for code in range(256)], dtype=torch.float64)
    assert torch.equal(decoded.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


def test_every_finite_e4m3_code_round_trips():
    values = torch.tensor([value_of_e4m3(code) for code in FINITE_CODES])
    assert encoded(values) == FINITE_CODES


def test_nan_codes_stay_nan():
    nans = torch.tensor([0x7F, 0xFF], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert encode_codes(nans, FP8_E4M3).float().isnan().all()


def test_midpoints_between_e4m3_values_round_to_even():
    lower = list(POSITIVE_CODES)[:-1]
    midpoints = torch.tensor(
        [(value_of_e4m3(code) + value_of_e4m3(code + 1)) / 2 for code in lower]
    )
    even = [code + code % 2 for code in lower]
    assert encoded(midpoints) == even
    assert encoded(-midpoints) == [code | 0x80 for code in even]


def test_values_beside_a_midpoint_round_to_the_nearer_e4m3_value():
    lower = list(POSITIVE_CODES)[:-1]
    midpoints = torch.tensor(
        [(value_of_e4m3(code) + value_of_e4m3(code + 1)) / 2 for code in lower]
    )
    assert encoded(torch.nextafter(midpoints, torch.zeros(()))) == lower
    assert encoded(torch.nextafter(midpoints, torch.tensor(torch.inf))) == [
        code + 1 for code in lower
    ]


@pytest.mark.parametrize("number_format", [INT8, FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_limits_are_those_of_the_torch_dtype(number_format):
    dtype = getattr(torch, number_format.torch_name)
    limits = torch.iinfo(dtype) if number_format.kind == "int" else torch.finfo(dtype)
    assert (number_format.min, number_format.max, number_format.bits) == (
        limits.min,
        limits.max,
        limits.bits,
    )


@pytest.mark.parametrize("number_format", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_floats_clip_above_half_a_step_beyond_the_greatest_code(number_format):
    limits = torch.finfo(getattr(torch, number_format.torch_name))
    step = limits.eps * 2.0 ** math.floor(math.log2(limits.max))
    assert number_format.clips_above == limits.max + step / 2


def test_integers_clip_above_half_a_step_beyond_the_greatest_code():
    assert INT8.clips_above == 127.5


def test_a_format_is_the_same_object_after_pickling():
    for number_format in NUMBER_FORMATS.values():
        assert pickle.loads(pickle.dumps(number_format)) is number_format


def test_a_format_of_no_table_pickles_to_an_equal_one():
    other = dataclasses.replace(INT8, name="INT4", bits=4)
    assert pickle.loads(pickle.dumps(other)) == other


def test_e8m0_spans_the_powers_of_two_that_a_byte_holds():
    # Byte = exponent + 127; 255 is NaN.
    assert (E8M0.min, E8M0.max) == (2.0 ** (0 - 127), 2.0 ** (254 - 127))
    assert E8M0.torch_name == "uint8"
