"""Observers: bounded statistics that merge by addition, and the static scales that follow from
them.
"""

import pytest
import torch

from quantkit.calibration.observers import (
    HELD_OUT,
    QUARTERS,
    HeadObserver,
    InputObserver,
    least_error_amax,
    observed_amax,
    percentile_amax,
)
from quantkit.ops.fallback import HISTOGRAM_BINS, histogram_edges
from quantkit.ops.reference import quantize
from quantkit.schemes.number_formats import FP8_E4M3, INT8
from quantkit.schemes.quant_spec import TENSOR, QuantSpec
from quantkit.schemes.recipe import ObserverChoice


def observed(*batches: torch.Tensor) -> InputObserver:
    observer = InputObserver.empty(batches[0].shape[-1])
    for batch in batches:
        observer.update(batch)
    return observer


def assert_same(one: InputObserver, other: InputObserver) -> None:
    for name, tensor in one.tensors("x").items():
        stored = other.tensors("x")[name]
        assert tensor.dtype == stored.dtype
        assert torch.equal(tensor, stored), name


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values whose squares and sums are exact in float64, so that no order of adding matters."""
    return torch.randint(-50, 51, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_batches_add_up_to_one_pass(cut):
    windows = whole_numbers(7, 9, 5)
    assert_same(observed(windows[:cut], windows[cut:]), observed(windows))


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_merging_observers_equals_one_pass(cut):
    windows = whole_numbers(7, 9, 5)
    merged = observed(windows[:cut])
    merged.merge(observed(windows[cut:]))
    assert_same(merged, observed(windows))


def test_merging_an_empty_observer_changes_nothing():
    observer = observed(whole_numbers(2, 3, 4))
    observer.merge(InputObserver.empty(4))
    assert_same(observer, observed(whole_numbers(2, 3, 4)))


def test_the_first_position_of_each_window_is_kept_apart():
    windows = whole_numbers(4, 6, 3)
    windows[:, 0] = 1000.0
    windows[2, 0] = -3000.0
    observer, rest = observed(windows), windows[:, 1:].reshape(-1, 3)
    assert observer.amax == rest.abs().max()
    assert observer.first_amax == 3000.0
    assert torch.equal(observer.channel_amax, rest.abs().amax(0))
    assert torch.equal(observer.channel_sum_of_squares, rest.double().square().sum(0))
    assert observer.histogram.sum() == rest.numel()
    assert observer.token_histogram.sum() == len(rest)
    assert observer.counts.tolist() == [20, 4, 0, 0]


def test_extremes_are_the_range_without_and_of_the_first_positions():
    windows = torch.tensor([[[-9.0], [2.0], [3.0]], [[7.0], [-1.0], [5.0]]])
    observer = observed(windows)
    assert observer.extremes[0].tolist() == [-1.0, 5.0]
    assert observer.first_extremes.tolist() == [-9.0, 7.0]


def test_each_quarter_has_its_own_extremes():
    observer = InputObserver.empty(1)
    for quarter, values in (
        (0, [[100.0], [1.0], [-2.0]]),
        (2, [[100.0], [5.0], [4.0]]),
        (HELD_OUT, [[100.0], [-7.0], [3.0]]),
        (0, [[0.0], [-1.0], [8.0]]),
    ):
        observer.update(torch.tensor([values]), quarter)
    nothing = [torch.inf, -torch.inf]
    assert observer.extremes.tolist() == [[-2.0, 8.0], nothing, [4.0, 5.0], [-7.0, 3.0]]
    assert observer.quarter_amax == [8.0, None, 5.0, 7.0]
    assert observer.amax == 8.0


@pytest.mark.parametrize("quarter", range(QUARTERS))
def test_only_the_held_out_quarter_is_counted_against_what_came_before(quarter):
    observer = InputObserver.empty(3)
    windows = torch.tensor([[[90.0, 90.0, 90.0], [1.0, -5.0, 4.0], [-4.5, 0.0, 2.0]]])
    observer.update(windows, quarter, earlier_amax=4.0)
    assert observer.counts.tolist() == ([2, 1, 6, 2] if quarter == HELD_OUT else [2, 1, 0, 0])
    observer.update(windows, quarter)  # nothing came before
    assert observer.counts.tolist() == ([4, 2, 12, 2] if quarter == HELD_OUT else [4, 2, 0, 0])


def test_without_positions_every_token_counts():
    tokens = whole_numbers(5, 3)
    observer = observed(tokens)
    assert observer.counts.tolist() == [5, 0, 0, 0]
    assert observer.amax == tokens.abs().max()
    assert observer.first_amax == 0


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (2, 0, 3)])
def test_nothing_seen_changes_nothing(shape):
    observer = observed(torch.empty(shape))
    assert_same(observer, InputObserver.empty(3))
    assert observer.amax == 0


def test_windows_of_one_token_are_all_first_positions():
    observer = observed(torch.full((4, 1, 3), 2.0))
    assert observer.counts.tolist() == [0, 4, 0, 0]
    assert (observer.amax, observer.first_amax) == (0.0, 2.0)


def counted_between_edges(magnitudes: torch.Tensor) -> list[int]:
    edges = histogram_edges().tolist()
    counts = [0] * HISTOGRAM_BINS
    for magnitude in magnitudes.flatten().tolist():
        counts[max(number for number, edge in enumerate(edges) if edge <= magnitude)] += 1
    return counts


def test_histograms_count_magnitudes_and_each_tokens_largest_between_the_edges():
    values = torch.randn(40, 25, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    values[0, :3] = torch.tensor([0.0, 1e-30, -3e30])
    values[1] = 0.0
    values[2, 7] = -4.0  # on an edge
    observer = observed(values)
    assert observer.histogram.tolist() == counted_between_edges(values.abs())
    assert observer.token_histogram.tolist() == counted_between_edges(values.abs().amax(1))


def test_histogram_has_sixteen_bins_to_an_octave_from_2_to_the_minus_32_to_2_to_the_32():
    edges = histogram_edges()
    assert edges[(edges >= 1) & (edges < 2)].tolist() == [1 + step / 16 for step in range(16)]
    assert HISTOGRAM_BINS == len(edges) == 16 * 64
    assert edges[:2].tolist() == [0.0, 2.0**-32 * (1 + 1 / 16)]
    assert edges[-1] == 2.0**32 * (1 - 1 / 32)


def test_bfloat16_inputs_are_squared_in_float32():
    # 1.0078125² = 1.01568…, which bfloat16 would round to 1.015625.
    value = torch.full((3, 1), 1.0078125, dtype=torch.bfloat16)
    assert observed(value).channel_sum_of_squares.item() == 3 * 1.0078125**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_inputs_show_in_the_amax(dtype):
    windows = torch.zeros(2, 3, 2, dtype=dtype)
    windows[1, 1, 0] = torch.nan
    observer = observed(windows, torch.ones(2, 3, 2, dtype=dtype))
    assert torch.tensor(observer.amax).isnan()
    assert observer.channel_amax[0].isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_what_is_not_finite_is_noticed_wherever_it_stands(value, position):
    windows = torch.zeros(2, 3, 2)
    windows[1, position, 0] = value
    observer = observed(windows, torch.ones(2, 3, 2))
    assert not observer.is_finite()
    merged = observed(torch.ones(2, 3, 2))
    assert merged.is_finite() and InputObserver.empty(2).is_finite()
    merged.merge(observer)
    assert not merged.is_finite()


def test_strided_inputs_count_like_contiguous_ones():
    windows = whole_numbers(3, 5, 8)
    assert_same(observed(windows.transpose(1, 2)), observed(windows.transpose(1, 2).contiguous()))


def test_tensors_read_back_as_the_same_observer():
    observer = observed(whole_numbers(2, 5, 3))
    again = InputObserver.from_tensors("layer", observer.tensors("layer"))
    assert_same(again, observer)
    again.update(whole_numbers(2, 5, 3, seed=1) + 100)
    assert_same(observer, observed(whole_numbers(2, 5, 3)))


def test_head_observer_keeps_the_largest_magnitude_of_each_head():
    states = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    # head 0 is loudest in the first part, head 1 in the second
    states[0, 0, 4, 3], states[2, 1, 0, 0] = -9.0, 7.0
    one, other, whole = (HeadObserver(torch.zeros(2)) for _ in range(3))
    one.update(states[:1])
    other.update(states[1:])
    one.merge(other)
    whole.update(states)
    assert torch.equal(whole.amax, torch.stack([states[:, head].abs().max() for head in range(2)]))
    assert torch.equal(one.amax, whole.amax)


# ---- How far a static scale reaches.


def static(number_format) -> QuantSpec:
    return QuantSpec(number_format, TENSOR)


def heavy_tailed(seed: int = 0) -> torch.Tensor:
    """Mostly small values and a few that are a hundred times larger, [tokens, features]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2000, 16, generator=generator)
    values[::400, 3] *= 100
    return values


def squared_error(values: torch.Tensor, amax: float, spec: QuantSpec) -> float:
    scale = torch.full((1, 1), amax / spec.format.max)
    return float((quantize(values, spec, scale).dequantize() - values).double().square().sum())


@pytest.mark.parametrize("spec", [static(INT8), static(FP8_E4M3)])
def test_absmax_is_the_largest_magnitude_outside_the_first_positions(spec):
    windows = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 1000.0
    assert observed_amax(observed(windows), ObserverChoice(), spec) == windows[:, 1:].abs().max()


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9, 99.99])
def test_a_percentile_is_exact_to_its_bin(percentile):
    values = heavy_tailed()
    exact = (
        values.abs().double().flatten().quantile(percentile / 100, interpolation="higher").item()
    )
    choice = ObserverChoice("percentile", percentile)
    assert observed_amax(observed(values), choice, static(INT8)) == pytest.approx(exact, rel=1 / 16)


def test_percentiles_rise_to_the_amax_and_never_above():
    observer = observed(heavy_tailed())
    amaxes = [
        percentile_amax(observer, percentile) for percentile in (50, 90, 99, 99.9, 99.99, 100)
    ]
    assert amaxes == sorted(amaxes) and amaxes[0] < amaxes[-1]
    assert amaxes[-1] == observer.amax


def test_a_percentile_is_taken_in_proportion_inside_of_its_bin():
    # 16 values in the bin from 1 to 1.0625, of which three quarters lie below 1 + 0.75 / 16.
    observer = observed(1 + torch.arange(16.0).reshape(16, 1) / 256)
    assert percentile_amax(observer, 75) == pytest.approx(1 + 0.75 / 16, rel=1e-6)


@pytest.mark.parametrize("value", [1e-20, 1e20])
def test_a_percentile_beyond_the_histogram_is_the_amax(value):
    observer = observed(torch.full((4, 4), value))
    assert percentile_amax(observer, 99.9) == observer.amax


@pytest.mark.parametrize("spec", [static(INT8), static(FP8_E4M3)])
@pytest.mark.parametrize(
    "values",
    [heavy_tailed() ** 3, heavy_tailed()[:, :3], heavy_tailed()[:, 4:].bfloat16().float() * 1e-4],
)
def test_the_least_error_is_no_worse_than_that_of_the_amax(spec, values):
    observer = observed(values)
    amax = observed_amax(observer, ObserverChoice("mse"), spec)
    assert 0 < amax <= observer.amax
    # The values of a bin are taken as spread evenly in it.
    assert squared_error(values, amax, spec) <= squared_error(values, observer.amax, spec) * 1.01


def test_the_least_error_clips_rare_outliers_in_int8():
    values = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 60.0
    # Rounding costs (amax / 127)² / 12 for each of 64000 values, clipping (60 − amax)² once: least
    # where amax is 45.
    amax = least_error_amax(observed(values), static(INT8))
    assert amax == pytest.approx(45, rel=0.03)
    assert squared_error(values, amax, static(INT8)) < 0.8 * squared_error(
        values, 60.0, static(INT8)
    )


def test_the_least_error_is_near_the_best_of_all_limits():
    values, spec = heavy_tailed(), static(INT8)
    observer = observed(values)
    best = min(
        squared_error(values, observer.amax * 2 ** (-step / 64), spec) for step in range(320)
    )
    assert squared_error(values, least_error_amax(observer, spec), spec) < 1.02 * best


@pytest.mark.parametrize(
    "choice", [ObserverChoice(), ObserverChoice("percentile", 99.9), ObserverChoice("mse")]
)
def test_nothing_seen_and_zeros_give_zero(choice):
    for observer in (
        InputObserver.empty(3),
        observed(torch.zeros(4, 3)),
        observed(torch.full((4, 1, 3), 2.0)),
    ):
        assert observed_amax(observer, choice, static(INT8)) == 0
