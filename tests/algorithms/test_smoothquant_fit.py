import pytest
import torch

from quantkit.algorithms.smoothquant import output_error, search_smoothing, smoothing_scale
from quantkit.algorithms.smoothquant_fit import fitted_scale, has_uniform_steps, mean_squares
from quantkit.schemes.scheme import QuantScheme

INT8 = QuantScheme.parse("int8-dynamic")


@pytest.fixture
def heavy():
    """Inputs [rows, in_features], some channels of which are silent but for a few tokens, as behind
    a gated activation, and a weight that reads them.
    """
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(6000, 96, generator=generator)
    rows[:, ::4] *= torch.where(torch.rand(6000, 24, generator=generator) < 0.01, 10.0, 0.1)
    rows *= torch.randn(96, generator=generator).exp()
    return rows, [
        torch.randn(64, 96, generator=generator) * torch.randn(96, generator=generator).exp()
    ]


def noise(rows, weights, scale, importance=None):
    """A B + C D of the module's docstring, as it is written there."""
    counts = torch.ones(len(rows), 1) if importance is None else importance
    weight = torch.cat(weights) * scale
    inputs = rows / scale
    a, d = (
        (counts[:, 0] * part).sum() for part in (inputs.square().amax(1), inputs.square().sum(1))
    )
    return float(a * weight.square().sum() + weight.square().amax(1).sum() * d)


def halfway(rows, weights):
    return smoothing_scale(
        mean_squares(rows).sqrt(), sum(weight.square().sum(0) for weight in weights).sqrt(), 0.5
    )


def test_fitted_scale_has_less_noise_than_any_strength(heavy):
    rows, weights = heavy
    fitted = fitted_scale(rows, weights, halfway(rows, weights), True)
    torch.testing.assert_close(fitted.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    sizes = rows.abs().amax(0), weights[0].abs().amax(0)
    family = [smoothing_scale(*sizes, step / 20) for step in range(21)] + [halfway(rows, weights)]
    assert noise(rows, weights, fitted) < 0.97 * min(
        noise(rows, weights, scale) for scale in family
    )


def test_no_channel_changed_alone_would_have_less_noise(heavy):
    rows, weights = heavy
    fitted = fitted_scale(rows, weights, halfway(rows, weights), True)
    least = noise(rows, weights, fitted)
    for channel in range(0, 96, 7):
        for factor in (0.7, 1.4):
            changed = fitted.clone()
            changed[channel] *= factor
            assert noise(rows, weights, changed) > least


@pytest.mark.slow
def test_wherever_it_begins_the_minimum_is_one(heavy):
    rows, weights = heavy
    begin = halfway(rows, weights)
    moved = begin * torch.randn(96, generator=torch.Generator().manual_seed(1)).mul(0.2).exp()
    one, other = (
        noise(rows, weights, fitted_scale(rows, weights, start, True)) for start in (begin, moved)
    )
    assert one == pytest.approx(other, rel=0.01)


@pytest.mark.slow
def test_exact_error_on_rows_that_were_not_seen_falls_too(heavy):
    rows, weights = heavy
    seen, unseen = rows[:4000], rows[4000:]
    exact = [unseen @ weights[0].T]
    begin = halfway(seen, weights)
    before, after = (
        output_error(unseen, weights, [INT8], scale, exact)
        for scale in (begin, fitted_scale(seen, weights, begin, True))
    )
    assert after < 0.97 * before
    found = search_smoothing(rows, weights, [INT8])
    assert found.measure == "fitted" and found.error < 0.97 * before < found.plain_error


@pytest.mark.slow
def test_tokens_that_count_more_decide_more(heavy):
    rows, weights = heavy
    rows[:3000, :8] *= 50  # other outliers in one half than in the other
    importance = torch.cat([torch.full((3000, 1), 1e-4), torch.ones(3000, 1)])
    begin = halfway(rows, weights)
    alike, weighted = (
        fitted_scale(rows, weights, begin, True, None, counts) for counts in (None, importance)
    )
    assert noise(rows, weights, weighted, importance) < noise(rows, weights, alike, importance)
    assert noise(rows, weights, alike) < noise(rows, weights, weighted)


def test_channels_of_a_group_share_a_scale(heavy):
    rows, weights = heavy
    groups = torch.arange(96) % 32
    begin = torch.ones(96)
    fitted = fitted_scale(rows, weights, begin, True, groups)
    assert torch.equal(fitted[:32], fitted[32:64]) and torch.equal(fitted[:32], fitted[64:])
    assert noise(rows, weights, fitted) < 0.9 * noise(rows, weights, begin)


def test_weights_alone_have_the_noise_of_weights_alone(heavy):
    rows, weights = heavy
    begin = halfway(rows, weights)

    def weights_noise(scale):
        return float((weights[0] * scale).square().amax(1).sum() * (rows / scale).square().sum())

    assert weights_noise(fitted_scale(rows, weights, begin, False)) < 0.95 * weights_noise(begin)
    assert weights_noise(fitted_scale(rows, weights, begin, False)) < weights_noise(
        fitted_scale(rows, weights, begin, True)
    )


def test_silence_gives_the_scale_that_it_began_with():
    begin = torch.tensor([0.5, 2.0, 1.0, 1.0])
    torch.testing.assert_close(
        fitted_scale(torch.zeros(8, 4), [torch.randn(3, 4)], begin, True), begin
    )


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("int8-dynamic", True),
        ("int8-weight-only", True),
        ("int8-static", False),
        ("fp8-dynamic", False),
        ("fp8-block", False),
    ],
)
def test_only_evenly_spaced_codes_have_such_noise(scheme, expected):
    assert has_uniform_steps(QuantScheme.parse(scheme)) is expected
