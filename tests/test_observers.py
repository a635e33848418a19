"""Observers: bounded statistics that merge by addition."""

import pytest
import torch

from quantkit.observers import HISTOGRAM_BINS, HeadObserver, InputObserver, histogram_edges


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
    assert observer.counts.tolist() == [20, 4]


def test_extremes_are_the_range_with_and_of_the_first_positions():
    windows = torch.tensor([[[-9.0], [2.0], [3.0]], [[7.0], [-1.0], [5.0]]])
    assert observed(windows).extremes.tolist() == [-1.0, 5.0, -9.0, 7.0]


def test_without_positions_every_token_counts():
    tokens = whole_numbers(5, 3)
    observer = observed(tokens)
    assert observer.counts.tolist() == [5, 0]
    assert observer.amax == tokens.abs().max()
    assert observer.first_amax == 0


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (2, 0, 3)])
def test_nothing_seen_changes_nothing(shape):
    observer = observed(torch.empty(shape))
    assert_same(observer, InputObserver.empty(3))
    assert observer.amax == 0


def test_windows_of_one_token_are_all_first_positions():
    observer = observed(torch.full((4, 1, 3), 2.0))
    assert observer.counts.tolist() == [0, 4]
    assert (observer.amax, observer.first_amax) == (0.0, 2.0)


def test_histogram_counts_magnitudes_between_its_edges():
    values = torch.randn(40, 25, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    values[0, :3] = torch.tensor([0.0, 1e-30, -3e30])
    edges = histogram_edges().tolist()
    expected = [0] * HISTOGRAM_BINS
    for magnitude in values.abs().flatten().tolist():
        expected[max(number for number, edge in enumerate(edges) if edge <= magnitude)] += 1
    assert observed(values).histogram.tolist() == expected


def test_histogram_has_four_bins_to_an_octave():
    edges = histogram_edges()
    assert edges[(edges >= 1) & (edges < 4)].tolist() == [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5]


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
    states[0, 0, 4, 3], states[2, 1, 0, 0] = -9.0, 7.0  # head 0 is loudest in the first part, head 1 in the second
    one, other, whole = (HeadObserver(torch.zeros(2)) for _ in range(3))
    one.update(states[:1])
    other.update(states[1:])
    one.merge(other)
    whole.update(states)
    assert torch.equal(whole.amax, torch.stack([states[:, head].abs().max() for head in range(2)]))
    assert torch.equal(one.amax, whole.amax)
