import pytest
import torch

from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.scale_search import scale_error, search_scale
from quantkit.ops.reference import block_amax, block_sum, choose_scale, quantize
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, QuantSpec, block, group

SPECS = [
    QuantSpec(INT8, CHANNEL),
    QuantSpec(FP8_E4M3, CHANNEL),
    QuantSpec(INT8, group(16)),
    QuantSpec(FP8_E4M3, block(16, 16)),
    QuantSpec(FP8_E4M3, TENSOR),
]
POWERS = QuantSpec(FP8_E4M3, group(32), scale_format=E8M0)


@pytest.fixture
def weight():
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", [*SPECS, POWERS], ids=str)
def test_no_block_is_worse_than_with_the_usual_scale(weight, spec):
    usual = choose_scale(block_amax(weight, spec.granularity), spec)
    found = search_scale([weight], spec)
    before, after = (scale_error(weight, spec, scale) for scale in (usual, found))
    assert found.shape == usual.shape and (after <= before).all()
    assert spec is POWERS or float(after.sum()) < 0.99 * float(before.sum())


def test_a_lone_large_weight_does_not_take_the_codes_from_all_others(weight):
    weight[:, 7] = 5.5
    squares = torch.where(torch.arange(64) == 7, 1e-3, 1.0)  # it is hardly used
    usual, found = (
        choose_scale(block_amax(weight, CHANNEL), SPECS[0]),
        search_scale([weight], SPECS[0], squares),
    )
    assert (found < 0.95 * usual).all()
    assert (
        scale_error(weight, SPECS[0], found, squares).sum()
        < 0.8 * scale_error(weight, SPECS[0], usual, squares).sum()
    )


def test_squares_of_inputs_decide_what_counts(weight):
    squares = torch.where(torch.arange(64) % 8 == 0, 100.0, 0.01)
    plain, weighted = search_scale([weight], SPECS[1]), search_scale([weight], SPECS[1], squares)
    assert (
        scale_error(weight, SPECS[1], weighted, squares).sum()
        < 0.9 * scale_error(weight, SPECS[1], plain, squares).sum()
    )


def test_scales_are_as_they_are_stored(weight):
    for spec in SPECS:
        scale = search_scale([weight], spec)
        assert torch.equal(scale, scale.bfloat16().float())
    scale = search_scale([weight], POWERS)
    assert torch.equal(scale.log2(), scale.log2().round())


def test_weights_that_share_a_scale_are_searched_together(weight):
    other = 0.3 * weight.flip(0)
    scale, spec = search_scale([weight, other], SPECS[4]), SPECS[4]
    usual = choose_scale(block_amax(weight, TENSOR), spec)
    assert scale.shape == (1, 1) and sum(
        scale_error(each, spec, scale) for each in (weight, other)
    ) < sum(scale_error(each, spec, usual) for each in (weight, other))


def test_rows_of_zeros_keep_a_finite_scale(weight):
    weight[3] = 0
    for spec in SPECS[:4]:
        scale = search_scale([weight], spec)
        assert (
            torch.isfinite(scale).all() and not quantize(weight, spec, scale).dequantize()[3].any()
        )


def test_sums_of_blocks_leave_nothing_out(weight):
    """Of whole numbers, whose sums are exact in any order."""
    numbers = (64 * weight).round()
    for spec in SPECS:
        assert block_sum(numbers, spec.granularity).sum() == numbers.sum()
    assert torch.equal(block_sum(numbers, CHANNEL), numbers.sum(1, keepdim=True))
    assert torch.equal(block_sum(numbers, group(16)), numbers.unflatten(1, (4, 16)).sum(-1))


def test_gptq_with_searched_scales_beats_gptq_with_the_usual_ones(weight):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 48, generator=generator) @ torch.randn(
        48, 64, generator=generator
    ) + 0.3 * torch.randn(512, 64, generator=generator)
    weight[:, ::9] *= 4
    hessian = inputs.T @ inputs
    usual = gptq(weight, SPECS[1], hessian)
    searched = gptq(
        weight, SPECS[1], hessian, scale=search_scale([weight], SPECS[1], hessian.diagonal())
    )
    assert searched.error < usual.error
