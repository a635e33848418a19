"""kernels/cpu/observe_rows.cpp against observe_rows in quantkit/ops/fallback.py, bit for
bit, with every instruction set that this processor has.

All six statistics are compared as bits; a NaN equals every NaN.
"""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantkit import ops
from quantkit.ops import fallback, native

LIBRARY = native.cpu_kernels()
if LIBRARY is None:
    pytest.skip(
        "the CPU kernels weren't built, or QUANTKIT_KERNELS asks for the reference",
        allow_module_level=True,
    )

observe_rows = torch.ops.quantkit.observe_rows
INPUTS = [torch.bfloat16, torch.float16, torch.float32]
NAMES = list(fallback.STATISTICS)
# Around a chunk of rows, the vectors of every set, and their tiles of 16, 32 and 64 columns.
ROWS = [1, 3, 63, 64, 65, 130]
COLUMNS = [1, 7, 15, 17, 31, 33, 63, 64, 65, 127, 130, 257]

input_types = pytest.mark.parametrize(
    "dtype", INPUTS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


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


def sample(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian values, channels over 16 octaves, with some zeros of both signs, a channel without
    negative values, one without positive.
    """
    generator = _random(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-12, 4, (columns,), generator=generator)
    )
    values[:, ::5] = values[:, ::5].abs()
    values[:, 3::7] = -values[:, 3::7].abs()
    values[torch.rand(rows, columns, generator=generator) < 0.02] = 0.0
    values[torch.rand(rows, columns, generator=generator) < 0.02] = -0.0
    return values.to(dtype)


def empty_statistics(columns: int) -> tuple[Tensor, ...]:
    lengths = (columns, columns, ops.HISTOGRAM_BINS, ops.HISTOGRAM_BINS, 2, 2)
    statistics = tuple(
        torch.zeros(length, dtype=dtype)
        for length, dtype in zip(lengths, fallback.STATISTICS.values())
    )
    statistics[4][0], statistics[4][1] = torch.inf, -torch.inf
    return statistics


def observed(
    batches: list[Tensor], above: float, observe: Callable = observe_rows
) -> tuple[Tensor, ...]:
    statistics = empty_statistics(batches[0].shape[1])
    for rows in batches:
        observe(rows, above, *statistics)
    return statistics


def bits(values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return torch.where(values.isnan(), torch.nan, values).view(
        torch.int32 if values.element_size() == 4 else torch.int64
    )


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], about: str) -> None:
    for name, ours, wanted in zip(NAMES, actual, expected):
        wrong = (bits(ours) != bits(wanted)).nonzero().flatten().tolist()
        if wrong:
            pytest.fail(
                f"{about}, {name}: {len(wrong)} of {len(ours)} differ; at {wrong[0]}"
                f" {ours[wrong[0]].item()!r} instead of {wanted[wrong[0]].item()!r}"
            )


def check(batches: Tensor | list[Tensor], above: float = 0.3) -> tuple[Tensor, ...]:
    """Every level gives the reference's statistics, which are returned."""
    batches = [batches] if isinstance(batches, Tensor) else batches
    expected = observed(batches, above, fallback.observe_rows)
    for level in LEVELS_HERE:
        assert LIBRARY.qk_select_cpu_level(level) == 0
        about = (
            f"{native.LEVELS[level]}, {batches[0].dtype} {[list(rows.shape) for rows in batches]},"
            f" above {above}"
        )
        assert_same(observed(batches, above), expected, about)
    return expected


# Shapes.


@input_types
@pytest.mark.parametrize("rows", ROWS)
def test_every_shape_equals_the_reference(dtype, rows):
    for columns in COLUMNS:
        channel_amax, _, histogram, token_histogram, _, counts = check(
            sample(rows, columns, dtype, columns)
        )
        assert (
            histogram.sum() == rows * columns
            and token_histogram.sum() == rows == counts[0]
            and channel_amax.isfinite().all()
        )


@input_types
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_only_count_their_rows(dtype, shape):
    statistics = check(torch.zeros(shape, dtype=dtype))
    assert_same(statistics[:5], empty_statistics(shape[1])[:5], "nothing observed")
    assert statistics[5].tolist() == [shape[0], 0]


@input_types
def test_strided_and_transposed_matrices_give_the_same(dtype):
    wide = sample(140, 300, dtype)
    for rows in (
        wide[:, :257],
        wide[:, 1:18],
        wide[::3],
        wide[5:6, 3:],
        wide.T,
        wide.T[1:66],
        wide[:, ::2],
        wide[:1].expand(7, -1),
        wide[:, :1],
        wide[:, 40:104],
    ):
        check(rows)


@input_types
def test_statistics_add_up_over_calls(dtype):
    batches = [
        sample(rows, 97, dtype, rows) * scale
        for rows, scale in ((65, 1), (1, 30), (64, 0.01), (0, 1), (130, 2))
    ]
    counts = check(batches)[5]
    assert counts[0] == 65 + 1 + 64 + 130


@input_types
def test_two_halves_merge_to_the_whole_where_sums_are_exact(dtype):
    values = torch.randint(-15, 16, (150, 70), generator=_random()).to(dtype)
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        whole, first, second = (
            observed([part], 3.0) for part in (values, values[:83], values[83:])
        )
        low, high = torch.minimum(first[4], second[4]), torch.maximum(first[4], second[4])
        merged = (
            torch.maximum(first[0], second[0]),
            *(first[i] + second[i] for i in (1, 2, 3)),
            torch.stack([low[0], high[1]]),
            first[5] + second[5],
        )
        assert_same(merged, whole, native.LEVELS[level])
        assert_same((whole[1],), (values.double().square().sum(0),), "squares")


# What the numbers mean, without the reference.


@input_types
def test_statistics_are_those_of_plain_torch(dtype):
    values = sample(200, 70, dtype)
    wide = values.double()
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        channel_amax, squares, _, _, extremes, counts = observed([values], 0.25)
        assert torch.equal(channel_amax, values.abs().amax(0).float())
        assert torch.allclose(squares, wide.square().sum(0), rtol=1e-5)
        assert extremes.tolist() == [wide.min().item(), wide.max().item()]
        assert counts.tolist() == [200, (wide.abs() > 0.25).sum().item()]


@input_types
def test_edges_bracket_the_values_of_their_bins(dtype):
    edges = ops.histogram_edges()
    assert (
        edges[0] == 0
        and (edges.diff() > 0).all()
        and edges[16 * 32] == 1
        and edges[16 * 32 + 4] == 1.25
        and edges[-1] == 2.0**31 * (1 + 15 / 16)
    )
    values = torch.cat(
        [
            edges,
            edges.nextafter(torch.tensor(0.0)),
            edges.nextafter(torch.tensor(torch.inf)),
            edges * 1.03,
        ]
    ).to(dtype)
    values = torch.cat([values, -values])
    # One row for each value: its token's bin is its own bin.
    upper = torch.cat([edges[1:], torch.tensor([torch.inf])])
    for level in LEVELS_HERE:
        LIBRARY.qk_select_cpu_level(level)
        for value in values[values.isfinite()].reshape(-1, 1)[
            :: 7 if dtype == torch.float32 else 31
        ]:
            histogram, token_histogram = observed([value.reshape(1, 1)], 0.0)[2:4]
            bin_of_value = int(histogram.argmax())
            assert torch.equal(histogram, token_histogram) and histogram.sum() == 1
            assert edges[bin_of_value] <= value.float().abs() < upper[bin_of_value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_value_equals_the_reference(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for above in (0.0, 1e-3, 448.0):
        histogram = check(values.reshape(-1, 1), above)[2]
        check(values.reshape(64, -1), above)
        check(values[values.isfinite()].reshape(-1, 2 if dtype == torch.float16 else 85), above)
        assert histogram.sum() == 2**16


def test_random_bits_of_float32_equal_the_reference():
    values = (
        torch.randint(-(2**31), 2**31, (257, 1000), generator=_random(), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    check(values)
    check(torch.where(values.isfinite() & (values.abs() < 1e18), values, 1.0))


# Numbers at the ends of their types.


@input_types
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_are_counted_in_bin_zero_and_lose_their_sign(dtype, zero):
    for shape in ((1, 1), (65, 70), (64, 64)):
        values = torch.full(shape, zero, dtype=dtype)
        _, squares, histogram, token_histogram, extremes, counts = check(values, 0.0)
        assert (
            (squares == 0).all()
            and histogram[0] == values.numel()
            and token_histogram[0] == shape[0]
            and counts[1] == 0
        )
        assert extremes.tolist() == [0, 0] and not extremes.signbit().any()


@input_types
@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_one_sign_have_both_extremes(dtype, sign):
    for shape in ((1, 1), (3, 17), (65, 70), (64, 128)):
        values = sign * (sample(*shape, dtype).abs() + 0.5)
        extremes = check(values)[4]
        assert (
            extremes.tolist() == [values.min().item(), values.max().item()]
            and (extremes.sign() == sign).all()
        )


@input_types
def test_subnormal_values_equal_the_reference(dtype):
    mantissa_bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    integers = torch.randint(2**mantissa_bits, (70, 67), generator=_random())
    sign = torch.randint(2, integers.shape, generator=_random(1))
    integer, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int16, 16)
    values = (integers - sign * 2 ** (width - 1)).to(integer).view(dtype)
    check(values, 1e-40)
    check(values, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_squares_that_underflow_are_rounded_before_they_are_added(dtype):
    values = (sample(130, 67, torch.float32) * 2.0**-70).to(dtype)
    squares = check(values, 0.0)[1]
    assert ((squares > 0) & (squares < 2.0**-126)).any()


@input_types
def test_huge_values_and_infinities_equal_the_reference(dtype):
    huge = torch.tensor([torch.inf, torch.finfo(dtype).max, 2.0**15, 60000.0, 3.0], dtype=dtype)
    for values in (
        huge.repeat(70, 13),
        -huge.repeat(70, 13),
        torch.cat([huge, -huge]).repeat(3, 7),
    ):
        channel_amax, _, histogram, _, _, counts = check(values, torch.finfo(dtype).max)
        assert (
            channel_amax[0] == torch.inf
            and counts[1] == values.isinf().sum()
            and histogram[-1] >= counts[1]
        )


@input_types
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
def test_nan_shows_in_its_channel_and_in_both_extremes(dtype, bad):
    clean = sample(130, 130, dtype)
    for row, column in ((0, 0), (129, 129), (64, 70), (63, 128)):
        values = clean.clone()
        values[row, column] = bad
        if torch.tensor(bad).signbit():
            values[row, column] = torch.copysign(
                values[row, column].float(), torch.tensor(-1.0)
            ).to(dtype)
        channel_amax, _, histogram, token_histogram, extremes, counts = check([values, clean], 1e-6)
        assert channel_amax.isnan().nonzero().tolist() == [[column]] and extremes.isnan().all()
        assert histogram[-1] == 1 and token_histogram[-1] == 1
        assert counts[1] == (values.float().abs() > 1e-6).sum() + (clean.float().abs() > 1e-6).sum()


@input_types
def test_above_is_strict_and_compared_in_float32(dtype):
    values = torch.cat(
        [
            sample(70, 66, dtype),
            torch.tensor([1.0, -1.0, 0.0, torch.nan, torch.inf]).to(dtype).repeat(70, 1),
        ],
        1,
    )
    next_float = torch.tensor(1.0).nextafter(torch.tensor(0.0)).item()
    for above in (
        1.0,
        next_float,
        1 + 1e-12,
        1 - 1e-12,
        0.0,
        -0.0,
        -1.0,
        -torch.inf,
        torch.inf,
        torch.nan,
        1e-42,
        3.3e38,
        1e300,
        values[0, 0].item(),
    ):
        counts = check(values, above)[5]
        assert counts[1] == (values.float().abs() > torch.tensor(above, dtype=torch.float32)).sum()


# Memory.


@input_types
def test_the_kernel_touches_only_its_columns(dtype):
    generous = sample(70, 300, dtype, 4)
    for first, last in ((0, 1), (64, 65), (64, 192), (1, 34), (128, 259)):
        # Poison around the columns, which aren't read, and in the results of other channels, which
        # aren't written.
        values = torch.full_like(generous, torch.nan)
        values[:, first:last] = generous[:, first:last]
        expected = observed([generous[:, first:last]], 0.3, fallback.observe_rows)
        for level in LEVELS_HERE:
            LIBRARY.qk_select_cpu_level(level)
            amax, squares = torch.full((300,), -7.0), torch.full((300,), -7.0, dtype=torch.float64)
            amax[first:last], squares[first:last] = 0.0, 0.0
            magnitudes = torch.full((72,), -7.0)
            _, _, histogram, token_histogram, extremes, counts = empty_statistics(1)
            pointers = [
                tensor.data_ptr()
                for tensor in (amax, squares, histogram, extremes, counts[1:], magnitudes[1:])
            ]
            assert (
                LIBRARY.qk_observe_rows(
                    values.data_ptr(), INPUTS.index(dtype), 70, 300, first, last, 0.3, *pointers
                )
                == 0
            )
            assert (
                LIBRARY.qk_count_magnitudes(
                    magnitudes[1:].data_ptr(), 1, 70, token_histogram.data_ptr()
                )
                == 0
            )
            counts[0] = 70
            assert_same(
                (
                    amax[first:last],
                    squares[first:last],
                    histogram,
                    token_histogram,
                    extremes,
                    counts,
                ),
                expected,
                native.LEVELS[level],
            )
            outside = torch.cat(
                [
                    amax[:first],
                    amax[last:],
                    squares[:first].float(),
                    squares[last:].float(),
                    magnitudes[:1],
                    magnitudes[71:],
                ]
            )
            assert (outside == -7).all()


def test_nonsense_arguments_are_refused():
    values, out = torch.zeros(4, 4), torch.zeros(2048, dtype=torch.float64)
    good = {"input": 2, "rows": 4, "stride": 4, "first": 0, "last": 4}
    for name, wrong in (
        ("input", 3),
        ("input", -1),
        ("rows", -1),
        ("stride", 3),
        ("first", -1),
        ("first", 5),
        ("last", 5),
    ):
        assert (
            LIBRARY.qk_observe_rows(
                values.data_ptr(),
                *(good | {name: wrong}).values(),
                ctypes.c_float(1),
                *[out.data_ptr()] * 6,
            )
            == -1
        )
    assert (
        LIBRARY.qk_count_magnitudes(out.data_ptr(), -1, 4, out.data_ptr())
        == LIBRARY.qk_count_magnitudes(out.data_ptr(), 1, -1, out.data_ptr())
        == -1
    )
    assert not out.any()


def test_statistics_of_another_shape_or_type_are_refused():
    values = torch.ones(3, 8)
    for index, name in enumerate(NAMES):
        for wrong in (
            torch.zeros(7, dtype=fallback.STATISTICS[name]),
            empty_statistics(8)[index].to(torch.float16),
            empty_statistics(8)[index].repeat_interleave(2)[::2],
        ):
            statistics = list(empty_statistics(8))
            statistics[index] = wrong
            with pytest.raises(ValueError, match=f"^{name} is"):
                observe_rows(values, 1.0, *statistics)
    for rows in (values[0], values.int()):
        with pytest.raises(ValueError, match="not a floating-point matrix"):
            observe_rows(rows, 1.0, *empty_statistics(8))


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (70, 37)])
def test_the_schema_and_the_fake_describe_the_op(shape):
    torch.library.opcheck(
        observe_rows.default, (sample(*shape, torch.bfloat16), 0.3, *empty_statistics(shape[1]))
    )
