import pytest
import torch

from quantkit.algorithms.gptq import corrected_weight, gptq
from quantkit.ops.reference import dequantize, quantize
from quantkit.schemes.number_formats import FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TOKEN, QuantSpec, group

SPECS = [QuantSpec(INT8, CHANNEL), QuantSpec(FP8_E4M3, CHANNEL), QuantSpec(INT8, group(16))]


@pytest.fixture
def case():
    """Correlated inputs [tokens, in_features] with a few large channels, and a weight."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 48, generator=generator) @ torch.randn(
        48, 64, generator=generator
    ) + 0.3 * torch.randn(512, 64, generator=generator)
    inputs[:, ::17] *= 8
    return inputs, torch.randn(40, 64, generator=generator)


def loss(inputs, weight, seen, values) -> float:
    return float((inputs @ weight.T - seen @ values.T).square().sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_rounding_to_nearest(case, spec, act_order):
    inputs, weight = case
    solution = gptq(weight, spec, inputs.T @ inputs, act_order=act_order)
    plain = quantize(weight, spec)
    assert not solution.fallback
    assert loss(inputs, weight, inputs, solution.weight.dequantize()) < 0.75 * loss(
        inputs, weight, inputs, plain.dequantize()
    )
    # in plain order, with the scales of rounding
    assert torch.equal(solution.weight.scale, plain.scale)
    assert torch.equal(
        solution.weight.dequantize(),
        dequantize(solution.weight.qdata, solution.weight.scale, spec.granularity),
    )


def test_a_weight_fitted_to_quantized_inputs_beats_one_that_is_not(case):
    inputs, weight = case
    spec = QuantSpec(INT8, TOKEN, dynamic=True)
    # one channel takes the codes from all others
    inputs = inputs * torch.where(torch.arange(64) == 17, 60.0, 1.0)
    seen = quantize(inputs, spec).dequantize()
    hessian, deviation = seen.T @ seen, (inputs - seen).T @ seen
    fitted = corrected_weight(weight, hessian, deviation, 1e-6)
    without = gptq(weight, SPECS[0], hessian, damping=1e-6)
    fit = gptq(weight, SPECS[0], hessian, fitted, damping=1e-6)
    assert loss(inputs, weight, seen, fit.weight.dequantize()) < 0.8 * loss(
        inputs, weight, seen, without.weight.dequantize()
    )


def test_inputs_that_say_nothing_leave_rounding_with_a_reason(case):
    _, weight = case
    for hessian in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        solution = gptq(weight, SPECS[0], hessian)
        assert "can't be inverted" in solution.fallback
        assert torch.equal(solution.weight.qdata, quantize(weight, SPECS[0]).qdata)


def test_dead_channels_do_no_harm(case):
    inputs, weight = case
    inputs[:, 5] = 0
    solution = gptq(weight, SPECS[0], inputs.T @ inputs)
    assert (
        torch.isfinite(solution.weight.dequantize()).all() and solution.error < solution.plain_error
    )


def test_codes_stay_in_their_range(case):
    inputs, weight = case
    assert gptq(weight, SPECS[0], inputs.T @ inputs).weight.qdata.abs().max() <= 127
    assert torch.isfinite(gptq(weight, SPECS[1], inputs.T @ inputs).weight.dequantize()).all()
