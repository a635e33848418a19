"""The verdict: which model loses least, whether that is beyond noise, and what the gates said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantkit.evaluation.metrics import KLD, PPL_DELTA, MetricValues
from quantkit.evaluation.result import Evaluation, GateResult, QuantResult
from quantkit.evaluation.verdict import verdict

STORED = Path(__file__).with_name("stored_result.json")


@pytest.fixture
def stored() -> Evaluation:
    return Evaluation.from_json(json.loads(STORED.read_text()))


def with_loss(quant: QuantResult, path: str, kld: float, low: float, high: float) -> QuantResult:
    """The quantized model with another name, mean KL in every window, and interval of ΔPPL."""
    values = dict(quant.metrics.values)
    values[KLD.name] = replace(quant.metrics[KLD], mean=kld)
    values[PPL_DELTA.name] = replace(
        quant.metrics[PPL_DELTA], value=(low + high) / 2, low=low, high=high
    )
    count = len(quant.window_sums[KLD])
    noise = np.random.default_rng(0).normal(0, 1e-3, count)
    sums = dict(quant.window_sums.values)
    sums[KLD.pairing.sums] = tuple(31 * kld + noise)
    return replace(
        quant,
        path=path,
        metrics=MetricValues(values),
        window_sums=replace(quant.window_sums, values=sums),
    )


def test_the_model_with_the_lowest_kl_loses_least(stored):
    quant = stored.quants[0]
    worse, better = (
        with_loss(quant, "a/worse", 0.2, 4.0, 6.0),
        with_loss(quant, "a/better", 0.1, 1.0, 2.0),
    )
    found = verdict(replace(stored, quants=(worse, better), gates=()))
    assert found.headline.startswith("better loses least: mean KL 0.10000 nats")
    assert "+1.50 % [+1.00, +2.00]" in found.headline and found.gates is None
    assert any("Next is worse" in text and "beyond noise" in text for text in found.sentences)
    assert not any("By perplexity alone" in text for text in found.sentences)


def test_a_change_is_beyond_noise_if_its_interval_excludes_zero(stored):
    quant = stored.quants[0]
    for low, high, words in [
        (0.1, 0.2, "is beyond noise"),
        (-0.2, -0.1, "is beyond noise"),
        (-0.1, 0.2, "is within noise"),
    ]:
        made = replace(stored, quants=(with_loss(quant, "q", 0.1, low, high),), gates=())
        assert words in verdict(made).sentences[0], (low, high)
    one_window = replace(quant.metrics[PPL_DELTA], low=None, high=None)
    values = MetricValues({**quant.metrics.values, PPL_DELTA.name: one_window})
    found = verdict(replace(stored, quants=(replace(quant, metrics=values),)))
    assert "One window" in found.sentences[0]


def test_equal_models_differ_within_noise(stored):
    quant = stored.quants[0]
    same = [with_loss(quant, name, 0.1, 1.0, 2.0) for name in ("a", "b")]
    found = verdict(replace(stored, quants=tuple(same), gates=()))
    assert any("Next is b" in text and "within noise" in text for text in found.sentences)


def test_a_lower_perplexity_of_another_model_is_named(stored):
    quant = stored.quants[0]
    near, lucky = (
        with_loss(quant, "near", 0.1, 2.0, 3.0),
        with_loss(quant, "lucky", 0.2, -1.0, 1.0),
    )
    found = verdict(replace(stored, quants=(near, lucky), gates=()))
    assert found.headline.startswith("near loses least")
    assert any(text.startswith("By perplexity alone, lucky is better") for text in found.sentences)


def test_the_worst_gate_decides(stored):
    def said(*results: str) -> tuple[str | None, str]:
        gates = [
            GateResult(
                expr="top1>=0.9", path="quant", value=0.5, low=None, high=None, result=result
            )
            for result in results
        ]
        found = verdict(replace(stored, gates=tuple(gates)))
        return found.gates, " ".join(found.sentences)

    assert said("pass")[0] == "pass" and "The gate passed." in said("pass")[1]
    assert "All 2 gates passed." in said("pass", "pass")[1]
    outcome, text = said("pass", "inconclusive", "fail")
    assert outcome == "fail"
    assert "1 of 3 gates failed on quant." in text and "could not be decided" in text
    assert said("pass", "inconclusive")[0] == "inconclusive"
    assert "The gate failed on quant." in said("fail")[1]


def test_the_base_model_alone_has_a_verdict_too(stored):
    found = verdict(replace(stored, quants=(), gates=()))
    assert "perplexity" in found.headline and found.gates is None
