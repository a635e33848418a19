"""Paired intervals: exact where they must be, and right at their nominal rate on simulated data."""

import numpy as np
import pytest

from quantkit.evaluation import intervals
from quantkit.evaluation.intervals import Interval, paired_interval, perplexity_change_pct


@pytest.mark.parametrize("windows", [1, 2, 19, 20, 50])
def test_a_model_against_itself_is_exactly_zero(windows):
    interval = paired_interval(np.zeros(windows), np.full(windows, 255))
    assert interval.value == 0
    assert {interval.low, interval.high} == ({None} if windows == 1 else {0.0})


def test_the_value_is_the_mean_per_token_not_per_window():
    assert paired_interval(np.array([1.0, 9.0]), np.array([10, 30])).value == 10 / 40


def test_one_window_allows_no_interval():
    interval = paired_interval(np.array([3.0]), np.array([10]))
    assert interval == Interval(0.3, None, None, "none")
    assert interval.half_width is None


@pytest.mark.parametrize("windows, method", [(2, "t"), (19, "t"), (20, "bootstrap")])
def test_below_20_windows_student_t_takes_over(windows, method):
    sums = np.random.default_rng(0).normal(size=windows)
    assert paired_interval(sums, np.full(windows, 8)).method == method


def test_t_interval_of_equal_windows_is_the_textbook_one():
    sums, tokens = np.array([1.0, 2.0, 4.0, 8.0, 10.0]), 10
    interval = paired_interval(sums, np.full(5, tokens))
    half_width = 2.776 * sums.std(ddof=1) / np.sqrt(5) / tokens
    assert interval.low == pytest.approx(0.5 - half_width)
    assert interval.high == pytest.approx(0.5 + half_width)
    assert interval.half_width == pytest.approx(half_width)


def test_t_interval_weighs_windows_by_their_tokens():
    # The same mean in every window leaves no doubt about it, however different the windows' lengths
    # and sums.
    counts = np.array([1, 2, 4, 8])
    interval = paired_interval(counts * 0.25, counts)
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_t_quantiles_leave_two_and_a_half_percent_above():
    assert len(intervals._T_975) == intervals.MIN_BOOTSTRAP_WINDOWS - 2
    for degrees, quantile in enumerate(intervals._T_975, 1):
        # With t = √ν·tan θ the density is proportional to cos(θ)^(ν−1); midpoint rule on both
        # integrals.
        steps = (np.arange(20000) + 0.5) / 20000
        angle = np.arctan(quantile / np.sqrt(degrees))
        below = (np.cos(steps * angle) ** (degrees - 1)).mean() * angle
        whole = (np.cos(steps * np.pi / 2) ** (degrees - 1)).mean() * np.pi
        assert below / whole == pytest.approx(0.475, abs=5e-5)


@pytest.mark.parametrize("windows", [5, 12, 40])
def test_intervals_cover_the_truth_at_about_95_percent(windows):
    generator = np.random.default_rng(7)
    truth, experiments, covered = 0.02, 400, 0
    for _ in range(experiments):
        counts = generator.integers(200, 300, windows)
        sums = counts * truth + np.sqrt(counts) * generator.normal(0, 0.5, windows)
        interval = paired_interval(sums, counts)
        covered += interval.low <= truth <= interval.high
    # Binomial standard error: 1.1 %.
    assert 0.92 <= covered / experiments <= 0.98


def test_bootstrap_gives_the_same_interval_twice_and_another_for_another_seed():
    sums, counts = np.random.default_rng(1).normal(size=30), np.full(30, 16)
    assert paired_interval(sums, counts) == paired_interval(sums, counts)
    assert paired_interval(sums, counts, seed=1) != paired_interval(sums, counts)


def test_bootstrap_width_is_that_of_the_central_limit():
    sums, counts = np.random.default_rng(2).normal(size=400), np.full(400, 10)
    expected = 1.96 * sums.std() / np.sqrt(400) / 10
    assert paired_interval(sums, counts).half_width == pytest.approx(expected, rel=0.1)


def test_bootstrap_resamples_a_window_with_its_own_tokens():
    # Every window has the same mean per token, so any resample of whole windows has it too.
    counts = np.arange(1, 31)
    interval = paired_interval(counts * 0.25, counts)
    assert (interval.low, interval.high) == (0.25, 0.25)


def test_perplexity_change_is_exp_of_the_mean_difference():
    change = perplexity_change_pct(np.array([1.0, 3.0]), np.array([100, 100]))
    mean = paired_interval(np.array([1.0, 3.0]), np.array([100, 100]))
    assert change.value == pytest.approx(100 * (np.exp(0.02) - 1))
    assert change.low == pytest.approx(100 * (np.exp(mean.low) - 1))
    assert change.high == pytest.approx(100 * (np.exp(mean.high) - 1))


def test_perplexity_change_per_word_counts_tokens_per_word():
    assert perplexity_change_pct(
        np.array([2.0, 2.0]), np.array([100, 100]), tokens_per_unit=1.5
    ).value == pytest.approx(100 * (np.exp(0.03) - 1))


def test_a_single_window_has_a_change_without_bounds():
    change = perplexity_change_pct(np.array([2.0]), np.array([100]))
    assert (change.low, change.high, change.method) == (None, None, "none")
    assert change.to_json() == {"value": change.value, "low": None, "high": None, "method": "none"}
