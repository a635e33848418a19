"""Gates on the metrics of an evaluation."""

import math

import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation.gates import Gate, gate_results
from quantkit.evaluation.intervals import Difference, Interval
from quantkit.evaluation.metrics import PPL_DELTA, MetricValues, WindowSums
from quantkit.evaluation.result import QuantResult


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


def test_gate_passes_fails_or_cannot_tell():
    gate = Gate.parse("ppl_delta_pct<=1.0")
    assert gate.outcome(Interval(0.5, 0.2, 0.8, "bootstrap")) == "pass"
    assert gate.outcome(Interval(2.0, 1.5, 2.5, "bootstrap")) == "fail"
    assert gate.outcome(Interval(0.9, 0.5, 1.3, "bootstrap")) == "inconclusive"
    assert Gate.parse("top1>=0.99").outcome(Interval(0.995, 0.991, 0.999, "bootstrap")) == "pass"


@pytest.mark.parametrize("expression", ["ppl<=1", "ppl_delta_pct", "kld_mean<=small"])
def test_gates_that_make_no_sense_are_refused(expression):
    with pytest.raises(EvaluationError):
        Gate.parse(expression)
