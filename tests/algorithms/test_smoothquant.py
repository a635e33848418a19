import pytest
import torch

from quantkit.algorithms.smoothquant import output_error, search_smoothing, smoothing_scale
from quantkit.schemes.scheme import QuantScheme

INT8 = QuantScheme.parse("int8-dynamic")


@pytest.fixture
def outliers():
    """Inputs [rows, in_features] of which two channels are large, and two weights that read
    them.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 64, generator=generator)
    rows[:, [3, 40]] *= 60
    return rows, [
        torch.randn(48, 64, generator=generator),
        torch.randn(32, 64, generator=generator),
    ]


def test_scale_is_the_papers():
    inputs, weight = torch.tensor([8.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 4.0])
    scale = smoothing_scale(inputs, weight, 0.75)
    paper = inputs**0.75 / weight**0.25
    torch.testing.assert_close(scale / scale[0], paper / paper[0])
    torch.testing.assert_close(scale.log().mean(), torch.tensor(0.0))


def test_smoothing_beats_none_where_there_are_outliers(outliers):
    rows, weights = outliers
    found = search_smoothing(rows, weights, [INT8, INT8])
    exact = [rows @ weight.T for weight in weights]
    assert found.error < 0.1 * found.plain_error
    assert found.plain_error == output_error(rows, weights, [INT8, INT8], None, exact)


def test_searched_strength_is_as_good_as_any_given(outliers):
    rows, weights = outliers
    best = search_smoothing(rows, weights, [INT8, INT8])
    for strength in (0.3, 0.5, 0.8):
        given = search_smoothing(rows, weights, [INT8, INT8], strength)
        assert given.strength == strength and best.error <= given.error


def test_inputs_without_outliers_are_left_alone_where_every_scale_costs():
    # one value in each token: quantized exactly, and so are the weights
    rows = torch.diag(torch.arange(1.0, 33.0)).repeat(8, 1)
    weights = [torch.ones(16, 32)]
    assert search_smoothing(rows, weights, [INT8]) is None


def test_channels_that_share_a_producer_share_a_scale(outliers):
    rows, weights = outliers
    found = search_smoothing(rows, weights[:1], [INT8], tied_channels=torch.arange(64) % 32)
    assert torch.equal(found.scale[:32], found.scale[32:]) and found.error < found.plain_error


def test_silent_channels_get_finite_scales(outliers):
    rows, weights = outliers
    rows[:, 7] = 0
    weights[0][:, 9] = weights[1][:, 9] = 0
    assert torch.isfinite(search_smoothing(rows, weights, [INT8, INT8]).scale).all()
