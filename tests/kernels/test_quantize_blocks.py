"""kernels/cpu/quantize_blocks.cpp against quantkit/ops/reference.py, bit for bit, with every
instruction set that this processor has.

Compared are codes, scales and magnitudes as bits; a NaN equals every NaN. Each expected result is
computed once and held against all levels.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops import native, reference
from quantkit.ops.arguments import FLOAT_NUMBERS
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, Granularity, QuantSpec, block, group

LIBRARY = native.cpu_kernels()
if LIBRARY is None:
    pytest.skip(
        "the CPU kernels weren't built, or QUANTKIT_KERNELS asks for the reference",
        allow_module_level=True,
    )

OPS = torch.ops.quantkit
INPUTS = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = [INT8, FP8_E4M3]
GRANULARITIES = [
    TENSOR,
    CHANNEL,
    group(32),
    group(128),
    group(100),
    group(7),
    block(128, 128),
    block(3, 5),
]
# One past each vector width; more groups of 7 than a tile holds; rows longer than a tile.
SHAPES = [
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 7),
    (7, 17),
    (3, 33),
    (2, 65),
    (130, 257),
    (3, 1100),
    (4, 4133),
]
# From a power of two to 24 significand bits; around 2^±60, where the kernels change from a
# reciprocal to a division; the least and the largest.
SCALES = [
    0.25,
    2.0,
    0.01171875,
    1.9921875,
    0.0123456789,
    3.1415926,
    2.0**-60,
    2.0**-61,
    1.5 * 2.0**60,
    1.9999999 * 2.0**-61,
    2.0**-126,
    1.1 * 2.0**-126,
    3e38,
]
INT8_HALVES = torch.arange(-129.5, 129.5)
E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

input_types = pytest.mark.parametrize(
    "dtype", INPUTS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
formats = pytest.mark.parametrize(
    "number_format", FORMATS, ids=lambda number_format: number_format.name
)
granularities = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)


def _levels_here() -> list[int]:
    """The levels that this processor has; the chosen one stays chosen."""
    chosen = LIBRARY.qk_cpu_level()
    levels = [
        level
        for level in map(native.LEVELS.index, native.ELEMENTWISE_LEVELS)
        if LIBRARY.qk_select_cpu_level(level) == 0
    ]
    LIBRARY.qk_select_cpu_level(chosen)
    return levels


LEVELS_HERE = _levels_here()


@pytest.fixture(autouse=True)
def restored_level():
    # One torch thread: on a busy machine two wait for one another longer than they compute.
    chosen, threads = LIBRARY.qk_cpu_level(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    LIBRARY.qk_select_cpu_level(chosen)


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian values over 16 octaves, with some zeros of both signs."""
    generator = _random(seed)
    values = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-12, 4, shape, generator=generator)
    )
    values[torch.rand(shape, generator=generator) < 0.02] = 0.0
    values[torch.rand(shape, generator=generator) < 0.02] = -0.0
    return values.to(dtype)


def finite_values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit type, both zeros and the subnormals included."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return values[values.isfinite()]


def random_float32(count: int, exponents: tuple[int, int], seed: int = 0) -> Tensor:
    """Positive numbers with 24 random significand bits, 2^exponents[0] up to 2^(exponents[1] +
    1).
    """
    generator = _random(seed)
    exponent = torch.randint(
        exponents[0] + 127, exponents[1] + 128, (count,), generator=generator, dtype=torch.int32
    )
    return (
        exponent << 23 | torch.randint(2**23, (count,), generator=generator, dtype=torch.int32)
    ).view(torch.float32)


def with_neighbours(values: Tensor) -> Tensor:
    """All values, then the float32 above each, then the one below each."""
    infinity = torch.tensor(torch.inf)
    return torch.cat([values, values.nextafter(infinity), values.nextafter(-infinity)], dim=-1)


def bfloat16_scales() -> Tensor:
    """Scales of 8 significand bits: every mantissa, and the least and largest of each range that
    the kernels treat differently.
    """
    mantissas = 1 + torch.arange(128) / 128
    edges = [-126, -125, -61, -60, -59, -30, 30, 59, 60, 61, 119, 126, 127]
    return torch.cat(
        [mantissas * 2.0**-9, *(mantissas[[0, 1, 77, 127]] * 2.0**edge for edge in edges)]
    )


def scale_rules(number_format, granularity: Granularity) -> list[tuple[str, QuantSpec]]:
    return [
        ("stored", QuantSpec(number_format, granularity)),
        ("power_of_two", QuantSpec(number_format, granularity, scale_format=E8M0)),
        ("dynamic", QuantSpec(number_format, granularity, dynamic=True)),
    ]


def as_bits(values: Tensor) -> Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def is_nan(values: Tensor) -> Tensor:
    if values.dtype == torch.float8_e4m3fn:
        return as_bits(values) & 0x7F == 0x7F
    return values.isnan()


def assert_same_bits(actual: Tensor, expected: Tensor, about: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, about
    differs = as_bits(actual) != as_bits(expected)
    if not differs.any():
        return
    wrong = (differs & ~(is_nan(actual) & is_nan(expected))).nonzero()
    if len(wrong):
        first = tuple(wrong[0].tolist())
        pytest.fail(
            f"{about}: {len(wrong)} of {actual.numel()} differ; at {list(first)}"
            f" {float(actual[first])!r} instead of {float(expected[first])!r}"
        )


def check_levels(
    compute: Callable[[], Tensor | tuple[Tensor, ...]], expected: tuple[Tensor, ...], about: str
) -> None:
    """`compute` gives `expected` at every level."""
    for level in LEVELS_HERE:
        assert LIBRARY.qk_select_cpu_level(level) == 0
        results = compute()
        for actual, wanted in zip(results if isinstance(results, tuple) else (results,), expected):
            assert_same_bits(actual, wanted, f"{native.LEVELS[level]}, {about}")


def check_quantize(values: Tensor, spec: QuantSpec, rule: str) -> None:
    expected = reference.quantize(values, spec)
    blocks = spec.granularity.block_shape(*values.shape)
    about = f"{values.dtype} {list(values.shape)} {spec.granularity} {spec.format.name} {rule}"
    check_levels(
        lambda: OPS.quantize_blocks(values, *blocks, spec.format.name, rule),
        (expected.qdata, expected.scale),
        about,
    )


def check_encode(values: Tensor, scale: Tensor, spec: QuantSpec) -> None:
    expected = reference.quantize(values, spec, scale).qdata
    blocks = spec.granularity.block_shape(*values.shape)
    about = (
        f"{values.dtype} {list(values.shape)} {spec.granularity} {spec.format.name}, given scales"
    )
    check_levels(
        lambda: OPS.encode_blocks(values, scale, *blocks, spec.format.name), (expected,), about
    )


def check_block_amax(values: Tensor, granularity: Granularity) -> None:
    blocks = granularity.block_shape(*values.shape)
    about = f"{values.dtype} {list(values.shape)} {granularity} amax"
    check_levels(
        lambda: OPS.block_amax(values, *blocks), (reference.block_amax(values, granularity),), about
    )


def check_dequantize(codes: Tensor, scale: Tensor, granularity: Granularity) -> None:
    blocks = granularity.block_shape(*codes.shape)
    about = f"{codes.dtype} {list(codes.shape)} {granularity} dequantized"
    expected = reference.dequantize(codes, scale, granularity)
    check_levels(lambda: OPS.dequantize_blocks(codes, scale, *blocks), (expected,), about)
    for dtype in (torch.bfloat16, torch.float16):
        check_levels(
            lambda dtype=dtype: OPS.dequantize_blocks(codes, scale, *blocks, dtype),
            (expected.to(dtype),),
            f"{about} to {dtype}",
        )


def given_scale(shape: tuple[int, int], granularity: Granularity, seed: int) -> Tensor:
    """One of SCALES for each block, not chosen from any values."""
    scale_shape = granularity.scale_shape(*shape)
    return torch.tensor(SCALES)[torch.randint(len(SCALES), scale_shape, generator=_random(seed))]


# Every op, over shapes and blocks.


@input_types
@granularities
def test_quantize_blocks_equals_the_reference(dtype, granularity):
    for number, shape in enumerate(SHAPES):
        values = sample(shape, dtype, number)
        for number_format in FORMATS:
            for rule, spec in scale_rules(number_format, granularity):
                check_quantize(values, spec, rule)


@input_types
@granularities
def test_encode_blocks_equals_the_reference_with_any_scale(dtype, granularity):
    for number, shape in enumerate(SHAPES):
        values = sample(shape, dtype, number)
        chosen = reference.choose_scale(
            reference.block_amax(values, granularity), QuantSpec(INT8, granularity)
        )
        for number_format in FORMATS:
            spec = QuantSpec(number_format, granularity)
            for scale in (chosen * 0.11, chosen * 9, given_scale(shape, granularity, number)):
                check_encode(values, scale, spec)


@input_types
@granularities
def test_block_amax_equals_the_reference(dtype, granularity):
    for number, shape in enumerate(SHAPES):
        check_block_amax(sample(shape, dtype, number), granularity)


@formats
@granularities
def test_dequantize_blocks_equals_the_reference(number_format, granularity):
    for number, shape in enumerate(SHAPES):
        codes = torch.randint(256, shape, dtype=torch.uint8, generator=_random(number)).view(
            getattr(torch, number_format.torch_name)
        )
        check_dequantize(codes, given_scale(shape, granularity, number), granularity)


@input_types
@granularities
def test_strided_and_transposed_matrices_give_the_same(dtype, granularity):
    wide = sample((40, 300), dtype)
    for values in (
        wide[:, :257],
        wide[:, 1:18],
        wide[::3],
        wide[5:6, 3:],
        wide.T,
        wide.T[1:66],
        wide[:, ::2],
        wide[:1].expand(7, -1),
        wide[:, :1],
    ):
        check_block_amax(values, granularity)
        for number_format in FORMATS:
            spec = QuantSpec(number_format, granularity)
            check_quantize(values, spec, "stored")
            check_encode(values, given_scale(values.shape, granularity, 0), spec)
    codes = torch.randint(256, (40, 300), dtype=torch.uint8, generator=_random())
    for view in (codes[:, :257], codes[::3], codes.T, codes[:, ::2]):
        for number_format in FORMATS:
            typed = view.view(getattr(torch, number_format.torch_name))
            check_dequantize(typed, given_scale(typed.shape, granularity, 0), granularity)


# Numbers at the ends of their types.


@input_types
def test_zeros_stay_zero_with_scale_one(dtype):
    for zero in (0.0, -0.0):
        for shape in ((5, 37), (1, 1)):
            values = torch.full(shape, zero, dtype=dtype)
            for number_format in FORMATS:
                for rule, spec in scale_rules(number_format, group(32)):
                    check_quantize(values, spec, rule)
                    codes, scale = OPS.quantize_blocks(values, 1, 32, number_format.name, rule)
                    assert (codes.float() == 0).all() and (rule == "dynamic" or (scale == 1).all())


@input_types
def test_subnormal_inputs_equal_the_reference(dtype):
    mantissa_bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    bits = torch.randint(2**mantissa_bits, (64, 35), generator=_random())
    bits[:, 0] = torch.arange(64) >> 3  # some rows of the very smallest
    bits[:8] &= 1
    sign = torch.randint(2, bits.shape, generator=_random(1))
    integer, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int16, 16)
    values = (bits - sign * 2 ** (width - 1)).to(integer).view(dtype)
    for granularity in (CHANNEL, group(7), TENSOR):
        check_block_amax(values, granularity)
        for number_format in FORMATS:
            for rule, spec in scale_rules(number_format, granularity):
                check_quantize(values, spec, rule)
            check_encode(
                values,
                given_scale(values.shape, granularity, 1),
                QuantSpec(number_format, granularity),
            )


@input_types
@formats
def test_every_amax_gives_the_reference_scale_and_codes(dtype, number_format):
    if dtype == torch.float32:
        amax = torch.cat(
            [
                random_float32(15_000, (-126, 127)),
                torch.arange(0, 2**23, 997, dtype=torch.int32).view(torch.float32),
            ]
        )
        # Where the power of two that fits changes: the largest code times one, and its neighbours.
        amax = torch.cat(
            [amax, with_neighbours(number_format.max * torch.exp2(torch.arange(-134.0, 120.0)))]
        )
        amax = amax[amax.isfinite()]
    else:
        amax = finite_values(dtype)
        amax = amax[amax >= 0]
    fractions = torch.rand((len(amax), 18), generator=_random()) * 2 - 1
    values = (fractions * amax.float().reshape(-1, 1)).to(dtype)  # [one row for each amax, 18]
    values[:, 3], values[:, 12] = amax, -amax
    for rule, spec in scale_rules(number_format, CHANNEL):
        check_quantize(values, spec, rule)


@input_types
@formats
def test_infinities_and_huge_values_clamp(dtype, number_format):
    huge = torch.tensor([torch.inf, torch.finfo(dtype).max, 2.0**15, 60000.0, 3.0], dtype=dtype)
    # longer than two vectors, with a tail
    row = torch.cat([huge, -huge, torch.zeros(7, dtype=dtype)]).repeat(3)
    scale = torch.cat(
        [
            torch.tensor(SCALES),
            2.0 ** torch.arange(-60.0, 60.0, 7),
            1.0123457 * 2.0 ** torch.arange(-60.0, 60.0, 7),
        ]
    )
    values = row.repeat(len(scale), 1)
    check_encode(values, scale.reshape(-1, 1), QuantSpec(number_format, CHANNEL))
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        codes = OPS.encode_blocks(
            values, scale.reshape(-1, 1), 1, values.shape[1], number_format.name
        ).float()
        assert (codes[:, 0] == number_format.max).all() and (codes[:, 5] == number_format.min).all()


@input_types
def test_nan_stays_nan_in_e4m3(dtype):
    values = sample((len(SCALES), 71), dtype)
    values[:, ::3] = torch.nan
    scale = torch.tensor(SCALES).reshape(-1, 1)
    check_encode(values, scale, QuantSpec(FP8_E4M3, CHANNEL))
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        codes = OPS.encode_blocks(values, scale, 1, 71, "FP8_E4M3")
        assert torch.equal(is_nan(codes), values.isnan())


@input_types
@granularities
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_block(dtype, granularity, bad):
    rows, columns = 130, 257
    clean = sample((rows, columns), dtype)
    for row, column in ((0, 0), (129, 256), (64, 130)):
        values = clean.clone()
        values[row, column] = bad
        check_block_amax(values, granularity)
        for rule, spec in scale_rules(FP8_E4M3, granularity):
            check_quantize(values, spec, rule)
            scale = OPS.quantize_blocks(
                values, *granularity.block_shape(rows, columns), "FP8_E4M3", rule
            )[1]
            assert (~scale.isfinite()).sum() == 1
        # INT8 has no code for what such a block holds: compare the others.
        finite = (
            reference.expand_scale(
                reference.block_amax(values, granularity), granularity, rows, columns
            )
            .isfinite()
            .expand(rows, columns)
        )
        expected = reference.quantize(values, QuantSpec(INT8, granularity))
        about = f"{dtype} {granularity} INT8 beside {bad}"
        blocks = granularity.block_shape(rows, columns)

        def compute(values=values, blocks=blocks, finite=finite) -> tuple[Tensor, Tensor]:
            codes, scale = OPS.quantize_blocks(values, *blocks, "INT8", "stored")
            return codes[finite], scale

        check_levels(compute, (expected.qdata[finite], expected.scale), about)


# Rounding: every value, every tie, every code.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@formats
def test_every_16_bit_value_under_many_scales(dtype, number_format):
    scale = torch.cat([bfloat16_scales(), random_float32(28, (-40, 40))])
    values = finite_values(dtype).expand(len(scale), -1)[:, :-1]  # an odd length
    check_encode(values.contiguous(), scale.reshape(-1, 1), QuantSpec(number_format, CHANNEL))


def halfway_values(number_format) -> Tensor:
    """What lies exactly between two neighbouring codes, of both signs, and beyond the last code."""
    if number_format is INT8:
        return INT8_HALVES
    halves = torch.cat([(E4M3_VALUES[:-1] + E4M3_VALUES[1:]) / 2, torch.tensor([464.0])])
    return torch.cat([halves, -halves])


@formats
@pytest.mark.parametrize("significand", ["power of two", "8 bits", "24 bits", "all ones"])
def test_ties_and_their_neighbours_round_like_a_division(number_format, significand):
    # The float32 nearest to halfway x scale, and its neighbours: the quotients whose code depends
    # on their last bit.
    scale = {
        "power of two": torch.exp2(torch.arange(-100.0, 101.0)),
        "8 bits": torch.cat(
            [
                (1 + torch.arange(128) / 128) * 2.0**exponent
                for exponent in (-126, -120, -110, -80, -61, -60, -9, 0, 7, 60, 110, 126, 127)
            ]
        ),
        "24 bits": torch.cat(
            [
                random_float32(4000, (-30, 30)),
                random_float32(1000, (-126, 127)),
                random_float32(300, (-126, -118)),
            ]
        ),
        "all ones": torch.cat(
            [(2 - torch.arange(1, 9) * 2.0**-23) * 2.0**exponent for exponent in range(-64, 65, 2)]
        ),
    }[significand].reshape(-1, 1)
    values = with_neighbours(halfway_values(number_format) * scale)  # [scales, 3 x halves]
    check_encode(values, scale, QuantSpec(number_format, CHANNEL))


def nearly_tied_quotients(number_format) -> tuple[Tensor, Tensor]:
    """Values x and scales s, float32, with x / s as near as it can be to the middle between a
    halfway value h and the float32 beside it.

    There a quotient that isn't correctly rounded loses the tie or makes one. With 25-bit M = h ±
    half a spacing and 24-bit X and S, all integers: X 2^k = M S - t for a small t. M is odd, so S =
    t / M modulo 2^k has a solution for every t.
    """
    halves = halfway_values(number_format).double()
    mantissa, exponent = torch.frexp(halves[halves > 0])
    # [halves, 2, 1]
    middle = (mantissa * 2**25).long().reshape(-1, 1, 1) + torch.tensor([-1, 1]).reshape(1, 2, 1)
    inverse = middle.clone()
    for _ in range(5):  # each step doubles the number of right bits
        inverse = inverse * (2 - middle * inverse) % 2**25
    small = torch.cat([torch.arange(-64, 0), torch.arange(1, 65)])
    values, scales = [], []
    for k in (24, 25):
        significand = small * inverse % 2**k  # S [halves, 2, small]
        quotient = (middle * significand - small) >> k  # X
        fits = (
            (significand >= 2**23)
            & (significand < 2**24)
            & (quotient >= 2**23)
            & (quotient < 2**24)
        )
        unit = torch.exp2(exponent.double() - 25).reshape(-1, 1, 1)
        values.append((quotient * 2.0 ** (k - 30) * unit)[fits])
        scales.append((significand * 2.0**-30)[fits])
    return torch.cat(values).float(), torch.cat(scales).float()


@formats
def test_quotients_next_to_a_rounding_boundary_are_correctly_rounded(number_format):
    values, scale = nearly_tied_quotients(number_format)
    assert len(values) > 10_000
    # [cases, 35]: whole vectors and a tail
    values = torch.stack([values, -values], dim=1).repeat(1, 18)[:, 1:]
    check_encode(values, scale.reshape(-1, 1), QuantSpec(number_format, CHANNEL))


@pytest.mark.slow
@formats
def test_random_quotients_of_float32(number_format):
    scale = torch.cat([random_float32(4500, (-60, 60), 1), random_float32(500, (-126, 110), 2)])
    relative = random_float32(5000 * 1000, (-14, 10), 3).reshape(5000, 1000)
    relative[:, ::2] *= -1
    check_encode(
        relative * scale.reshape(-1, 1), scale.reshape(-1, 1), QuantSpec(number_format, CHANNEL)
    )


@formats
def test_all_256_codes_decode(number_format):
    codes = (
        torch.arange(256, dtype=torch.uint8)
        .repeat(2)[:300]
        .view(getattr(torch, number_format.torch_name))
    )
    scale = torch.cat([torch.ones(1), bfloat16_scales(), random_float32(500, (-126, 127))]).reshape(
        -1, 1
    )
    check_dequantize(codes.expand(len(scale), -1).contiguous(), scale, CHANNEL)
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        assert_same_bits(
            OPS.dequantize_blocks(codes.reshape(1, -1), torch.ones(1, 1), 1, 300),
            codes.float().reshape(1, -1),
            native.LEVELS[level],
        )


# Memory.

GUARD = 64  # bytes before and after each buffer, the widest vector's size


class Guarded:
    """A dense [rows, columns] buffer for a kernel to write, between two fences of 0xA5."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.size = shape[0] * shape[1] * dtype.itemsize
        self.memory = torch.full((self.size + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        self.pointer = self.memory.data_ptr() + GUARD

    def written(self) -> Tensor:
        fences = torch.cat([self.memory[:GUARD], self.memory[GUARD + self.size :]])
        assert (fences == 0xA5).all(), "a kernel wrote outside its output"
        return self.memory[GUARD : GUARD + self.size].clone().view(self.dtype).reshape(self.shape)


def fenced(values: Tensor, poison: float | int) -> tuple[Tensor, int, int]:
    """values amid poison: the memory that holds them, the pointer to the first, and the stride,
    wider than a row.
    """
    rows, columns = values.shape
    memory = torch.full((rows + 2, columns + 67), poison).to(values.dtype)
    memory[1:-1, 33 : 33 + columns] = values
    return memory, memory[1:, 33:].data_ptr(), memory.stride(0)


@input_types
@granularities
def test_kernels_stay_inside_their_buffers(dtype, granularity):
    for shape in ((1, 1), (3, 17), (2, 33), (5, 65), (3, 130), (3, 1100)):
        values = sample(shape, dtype, 5)
        _memory, pointer, stride = fenced(values, torch.nan)
        blocks = granularity.block_shape(*shape)
        matrix = (pointer, FLOAT_NUMBERS[dtype], *shape, stride, *blocks)
        scale_shape = granularity.scale_shape(*shape)
        for level in LEVELS_HERE:
            LIBRARY.qk_select_cpu_level(level)
            amax = Guarded(scale_shape, torch.float32)
            assert LIBRARY.qk_block_amax(*matrix, amax.pointer) == 0
            assert_same_bits(amax.written(), reference.block_amax(values, granularity), "amax")
            for index, number_format in enumerate(FORMATS):
                dtype_of_codes = getattr(torch, number_format.torch_name)
                expected = reference.quantize(values, QuantSpec(number_format, granularity))
                scale, codes = Guarded(scale_shape, torch.float32), Guarded(shape, dtype_of_codes)
                assert (
                    LIBRARY.qk_quantize_blocks(*matrix, index, 0, scale.pointer, codes.pointer) == 0
                )
                assert_same_bits(scale.written(), expected.scale, "scale")
                assert_same_bits(codes.written(), expected.qdata, "codes")
                codes = Guarded(shape, dtype_of_codes)
                assert (
                    LIBRARY.qk_encode_blocks(
                        *matrix, index, expected.scale.data_ptr(), codes.pointer
                    )
                    == 0
                )
                assert_same_bits(codes.written(), expected.qdata, "codes of given scales")


@formats
@granularities
def test_dequantize_stays_inside_its_buffer(number_format, granularity):
    for shape in ((1, 1), (3, 17), (2, 33), (5, 65), (3, 1100)):
        codes = torch.randint(127, shape, dtype=torch.uint8, generator=_random())
        _memory, pointer, stride = fenced(codes, 0x7F)
        scale = given_scale(shape, granularity, 3)
        expected = reference.dequantize(
            codes.view(getattr(torch, number_format.torch_name)), scale, granularity
        )
        blocks = granularity.block_shape(*shape)
        for level in LEVELS_HERE:
            LIBRARY.qk_select_cpu_level(level)
            for output, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
                values = Guarded(shape, dtype)
                arguments = (
                    pointer,
                    FORMATS.index(number_format),
                    *shape,
                    stride,
                    *blocks,
                    scale.data_ptr(),
                    output,
                    values.pointer,
                )
                assert LIBRARY.qk_dequantize_blocks(*arguments) == 0
                assert_same_bits(
                    values.written(), expected.to(dtype), f"{native.LEVELS[level]} {dtype}"
                )


def test_nonsense_arguments_are_refused():
    values, out = torch.zeros(4, 4), torch.zeros(64)
    good = {"input": 2, "rows": 4, "columns": 4, "stride": 4, "block_rows": 1, "block_columns": 4}
    for name, wrong in {
        "input": 3,
        "rows": -1,
        "columns": -1,
        "stride": 3,
        "block_rows": 0,
        "block_columns": 0,
    }.items():
        matrix = (values.data_ptr(), *(good | {name: wrong}).values())
        assert LIBRARY.qk_block_amax(*matrix, out.data_ptr()) == -1
        assert LIBRARY.qk_encode_blocks(*matrix, 0, out.data_ptr(), out.data_ptr()) == -1
        assert LIBRARY.qk_quantize_blocks(*matrix, 0, 0, out.data_ptr(), out.data_ptr()) == -1
        assert LIBRARY.qk_dequantize_blocks(*matrix, out.data_ptr(), 0, out.data_ptr()) == -1
    matrix = (values.data_ptr(), *good.values())
    for number_format, rule in ((2, 0), (-1, 0), (0, 3), (0, -1)):
        assert (
            LIBRARY.qk_quantize_blocks(*matrix, number_format, rule, out.data_ptr(), out.data_ptr())
            == -1
        )
    assert (
        LIBRARY.qk_select_cpu_level(len(native.LEVELS)) == -1
        and LIBRARY.qk_select_cpu_level(-1) == -1
    )


@pytest.mark.parametrize("shape", [(2, 4), (3, 1), (1, 3)])
def test_a_scale_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="the blocks need \\[3, 2\\]"):
        OPS.encode_blocks(torch.ones(3, 8), torch.ones(shape), 1, 4, "INT8")
    with pytest.raises(ValueError, match="the blocks need \\[3, 2\\]"):
        OPS.dequantize_blocks(torch.ones(3, 8, dtype=torch.int8), torch.ones(shape), 1, 4)


# Threads, schemas, and the choice of a level.


@formats
def test_several_threads_give_the_bits_of_one(number_format):
    matrices = [sample((61, 1033), dtype, seed) for seed, dtype in enumerate(INPUTS * 4)]
    specs = [spec for _, spec in scale_rules(number_format, block(3, 5))] * 4
    expected = [reference.quantize(values, spec) for values, spec in zip(matrices, specs)]
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(2):  # the same bits twice
                for result, wanted in zip(pool.map(ops.quantize, matrices, specs), expected):
                    assert_same_bits(result.qdata, wanted.qdata, native.LEVELS[level])
                    assert_same_bits(result.scale, wanted.scale, native.LEVELS[level])


@input_types
@formats
def test_functions_of_specs_equal_the_reference(dtype, number_format):
    values = sample((9, 130), dtype)
    for _, spec in scale_rules(number_format, group(32)):
        expected = reference.quantize(values, spec)
        check_levels(
            lambda spec=spec: (lambda q: (q.qdata, q.scale))(ops.quantize(values, spec)),
            (expected.qdata, expected.scale),
            "ops.quantize",
        )
        amax = (
            torch.ops.quantkit.block_amax(values, *spec.granularity.block_shape(*values.shape)) * 3
        )
        expected = reference.quantize(values, spec, reference.choose_scale(amax, spec))
        check_levels(
            lambda spec=spec, amax=amax: (lambda q: (q.qdata, q.scale))(
                ops.quantize(values, spec, amax)
            ),
            (expected.qdata, expected.scale),
            "shared amax",
        )
        check_levels(
            lambda quantized=expected: ops.dequantize(quantized),
            (expected.dequantize(),),
            "ops.dequantize",
        )


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 37)])
@formats
def test_schemas_and_fakes_describe_the_ops(shape, number_format):
    values = sample(shape, torch.bfloat16)
    scale = torch.ones(group(32).scale_shape(*shape))
    codes = torch.zeros(shape, dtype=getattr(torch, number_format.torch_name))
    for operator, arguments in (
        (OPS.block_amax, (values, 1, 32)),
        (OPS.encode_blocks, (values, scale, 1, 32, number_format.name)),
        (OPS.quantize_blocks, (values, 1, 32, number_format.name, "stored")),
        (OPS.dequantize_blocks, (codes, scale, 1, 32)),
        (OPS.dequantize_blocks, (codes, scale, 1, 32, torch.bfloat16)),
    ):
        # What checks the schema multiplies tensors, which torch can't in FP8; the schema is the
        # same for both formats.
        torch.library.opcheck(
            operator.default, arguments, test_utils=CHECKS if number_format is INT8 else CHECKS[1:]
        )


@pytest.mark.slow
def test_the_environment_variable_chooses_the_level():
    script = """if True:
        import os
        from quantkit.ops import native
        print(native.cpu_level())
        for wanted in ("reference", "nonsense"):
            os.environ["QUANTKIT_KERNELS"] = wanted
            native.cpu_kernels.cache_clear()
            try:
                print(native.cpu_level())
            except native.QuantkitError as error:
                print(error)
    """
    environment = os.environ | {"QUANTKIT_KERNELS": "scalar"}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines() == [
        "scalar",
        "reference",
        (
            "QUANTKIT_KERNELS is 'nonsense'; choose one of scalar, avx2, avxvnni, avx512,"
            " avx512vnni, avx512bf16, amx, reference"
        ),
    ]
