"""Coordinate descent on codes: never worse than where it starts, better than GPTQ alone, and a
fixed point where no single code can be better.
"""

import pytest
import torch

from quantkit.algorithms.coordinate_descent import descend
from quantkit.algorithms.gptq import gptq
from quantkit.ops.reference import QuantizedTensor, quantize
from quantkit.schemes.number_formats import FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, QuantSpec, block, group

SPECS = [
    QuantSpec(INT8, CHANNEL),
    QuantSpec(FP8_E4M3, CHANNEL),
    QuantSpec(FP8_E4M3, TENSOR),
    QuantSpec(INT8, group(16)),
    QuantSpec(FP8_E4M3, block(32, 32)),
]


@pytest.fixture
def case():
    """A weight [40, 200] (two blocks of columns), inputs to choose codes on and others to judge
    them, [tokens, 200], with a few large channels.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(60, 200, generator=generator)

    def inputs() -> torch.Tensor:
        rows = torch.randn(4096, 60, generator=generator) @ mix + 2 * torch.randn(
            4096, 200, generator=generator
        )
        rows[:, ::17] *= 4
        return rows

    return torch.randn(40, 200, generator=generator), inputs(), inputs()


def loss(inputs: torch.Tensor, weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    return float((inputs @ (weight - quantized.dequantize()).T).square().sum())


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_better_than_gptq_alone_on_inputs_that_it_did_not_see(case, spec):
    weight, inputs, others = case
    without = gptq(weight, spec, inputs.T @ inputs, passes=0).weight
    refined = gptq(weight, spec, inputs.T @ inputs).weight
    assert loss(others, weight, refined) < 0.98 * loss(others, weight, without)
    assert torch.equal(refined.scale, without.scale)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_pass_makes_it_worse(case, spec):
    weight, inputs, _ = case
    losses = [
        loss(inputs, weight, descend(weight, quantize(weight, spec), inputs.T @ inputs, passes))
        for passes in range(5)
    ]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in zip(losses, losses[1:]))
    assert losses[-1] < 0.8 * losses[0]


def test_in_the_end_no_single_code_can_be_better():
    generator = torch.Generator().manual_seed(1)
    weight, inputs = (
        torch.randn(3, 6, generator=generator),
        torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator),
    )
    spec = QuantSpec(INT8, CHANNEL)
    found = descend(weight, quantize(weight, spec), inputs.T @ inputs, 50)
    least = loss(inputs, weight, found)
    for row in range(3):
        for column in range(6):
            for step in (-1, 1):
                codes = found.qdata.clone().int()
                codes[row, column] += step
                if abs(int(codes[row, column])) <= 127:
                    assert loss(
                        inputs, weight, QuantizedTensor(codes.to(torch.int8), found.scale, spec)
                    ) >= least * (1 - 1e-5)


def test_channels_without_inputs_keep_their_codes(case):
    weight, inputs, _ = case
    inputs[:, 7] = 0
    start = quantize(weight, SPECS[1])
    found = descend(weight, start, inputs.T @ inputs, 2)
    assert torch.equal(found.qdata[:, 7].float(), start.qdata[:, 7].float())
    assert torch.isfinite(found.dequantize()).all()


def test_rows_are_their_own(case, monkeypatch):
    """A large matrix goes through in parts, which changes nothing but the order of sums in a
    product.
    """
    weight, inputs, _ = case
    whole = descend(weight, quantize(weight, SPECS[1]), inputs.T @ inputs, 2)
    monkeypatch.setattr("quantkit.algorithms.coordinate_descent.ROWS", 16)
    parts = descend(weight, quantize(weight, SPECS[1]), inputs.T @ inputs, 2)
    assert (whole.qdata.float() != parts.qdata.float()).float().mean() < 0.01
    assert loss(inputs, weight, parts) == pytest.approx(loss(inputs, weight, whole), rel=1e-3)
