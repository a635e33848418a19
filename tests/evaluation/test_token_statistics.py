"""Statistics over the scored tokens."""

import math

import numpy as np
import pytest

from quantkit.evaluation import token_statistics as statistics


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
