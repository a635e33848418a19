import math

import numpy as np
import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation import token_statistics as statistics
from quantkit.evaluation.gates import Gate, gate_results
from quantkit.evaluation.intervals import Difference, mcnemar_p, paired_interval
from quantkit.evaluation.metrics import PPL_DELTA, MetricValues, WindowSums
from quantkit.evaluation.result import QuantResult


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


def test_flips_count_what_only_one_model_predicts():
    base, quant = (
        np.array([True, True, True, False, False]),
        np.array([True, False, False, True, False]),
    )
    assert statistics.flips(base, quant) == statistics.Flips(2, 1, 1.0)


def test_probability_change_is_that_of_the_true_token():
    base, quant = np.array([0.5, 0.2, 0.1, 0.9]), np.array([0.4, 0.3, 0.1, 0.9])
    change = statistics.probability_change(-np.log(base), -np.log(quant))
    assert (
        change.mean == pytest.approx(0.0)
        and change.rms == pytest.approx(math.sqrt(0.02 / 4))
        and change.p1 == pytest.approx(-0.1, rel=0.05)
    )


def test_bins_hold_every_token_once():
    generator = np.random.default_rng(0)
    kld, confidence = generator.random(1000), np.concatenate([generator.random(998), [0.0, 1.0]])
    for rows in (
        statistics.by_confidence(kld, confidence),
        statistics.by_position(kld, kld, np.arange(1000) % 63, 63),
    ):
        assert sum(row.tokens for row in rows) == 1000
        assert sum(row.tokens * row.kld_mean for row in rows) == pytest.approx(kld.sum())
    kld[:3] = 0, 1e-30, 1e9
    counted = statistics.histogram(kld)
    assert (
        sum(counted.counts) + counted.zero == 1000
        and counted.zero == 1
        and len(counted.counts) == len(counted.log10_edges) - 1
    )


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


def outcome(expression: str, *interval):
    """Of a gate on a candidate with this change of perplexity, on 1000 tokens."""
    quant = QuantResult(
        path="q",
        scheme="s",
        metrics=MetricValues({PPL_DELTA.name: Difference(*interval)}),
        bytes=1,
        size_ratio=0.5,
        window_sums=WindowSums({}),
    )
    (result,) = gate_results([Gate.parse(expression)], quant, 1000)
    return result


def test_an_undecided_gate_says_how_many_tokens_would_decide():
    """With so many more the interval, narrowed by the square root, just reaches the bound."""
    gate = outcome("ppl_delta_pct<=1.0", 0.8, 0.4, 1.3, "bootstrap")
    assert gate.result == "inconclusive"
    assert (1.3 - 0.8) / math.sqrt(1 + gate.more_tokens_needed / 1000) == pytest.approx(
        1.0 - 0.8, rel=1e-2
    )
    decided = outcome("ppl_delta_pct<=2", 0.8, 0.4, 1.3, "bootstrap")
    assert decided.result == "pass" and "more_tokens_needed" not in decided.to_json()
    single = outcome("ppl_delta_pct<=2", 0.8, None, None, "none").to_json()
    assert (single["result"], single["more_tokens_needed"]) == ("inconclusive", None)


def test_the_size_is_exact_so_its_gate_is_always_decided():
    interval = (0.8, None, None, "none")
    assert outcome("size_ratio<=0.5", *interval).result == "pass"
    assert outcome("size_ratio<0.5", *interval).result == "fail"


def test_an_unknown_gate_names_those_that_there_are():
    with pytest.raises(EvaluationError, match="ppl_delta_pct, kld_mean, top1, size_ratio"):
        Gate.parse("perplexity<=1")
