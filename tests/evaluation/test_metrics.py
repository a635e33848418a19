import math

import numpy as np
import pytest

from quantkit.evaluation import token_statistics as statistics
from quantkit.evaluation.intervals import mcnemar_p, paired_interval


@pytest.mark.parametrize("first, second", [(0, 0), (0, 1), (3, 3), (1, 9), (40, 60), (7, 0)])
def test_mcnemar_is_the_exact_binomial_test(first, second):
    total = first + second
    expected = min(
        1.0, 2 * sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
    )
    assert mcnemar_p(first, second) == pytest.approx(expected) == mcnemar_p(second, first)


def test_mcnemar_of_many_flips_neither_overflows_nor_is_zero_for_nothing():
    assert mcnemar_p(50_000, 50_000) == pytest.approx(1.0)
    # Three standard deviations: 2·Φ(−3), with the continuity correction that the exact test has by
    # itself.
    assert mcnemar_p(50_000 - 475, 50_000 + 475) == pytest.approx(0.0027, rel=0.05)


@pytest.mark.parametrize("windows", [5, 60])
def test_kl_interval_covers_the_truth_at_about_95_percent(windows):
    """Simulated tokens whose divergence is exponential, with a level of its own in each window."""
    generator, truth, covered, experiments = np.random.default_rng(11), 0.03, 0, 300
    counts = np.full(windows, 64)
    for _ in range(experiments):
        level = truth * generator.gamma(8, 1 / 8, windows)
        kld = generator.exponential(np.repeat(level, 64))
        found = statistics.divergence(kld, counts)
        covered += found.mean_low <= truth <= found.mean_high
    assert 0.9 <= covered / experiments <= 0.985


def test_running_estimate_ends_with_the_result_and_narrows():
    generator = np.random.default_rng(5)
    counts = np.full(80, 100)
    differences = generator.normal(1.0, 2.0, 80)
    points = statistics.running_estimate(differences, counts)
    mean = paired_interval(differences, counts)
    assert points[0].windows == 2 and points[-1].windows == 80 and len(points) <= 40
    last, earlier = points[-1].interval, points[len(points) // 4].interval
    assert last.value == pytest.approx(100 * math.expm1(mean.value))
    assert last.low == pytest.approx(100 * math.expm1(mean.low))
    assert last.high - last.low < earlier.high - earlier.low
    assert statistics.running_estimate([1.0], [10]) == []
