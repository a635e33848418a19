"""The reference arithmetic against loops, exact integers and the number formats' known errors."""

import math

import numpy as np
import pytest
import torch

from quantkit.ops.reference import (
    QuantizedTensor,
    block_amax,
    choose_scale,
    dequantize,
    encode_codes,
    kv_scale,
    power_ratio_db,
    power_ratio_db_of_floats,
    quantize,
    quantized_linear,
    sqnr_db,
)
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, TOKEN, QuantSpec, block, group
from quantkit.schemes.scheme import SCHEMES

GRANULARITIES = [TENSOR, CHANNEL, group(1), group(4), group(32), block(2, 3), block(128, 128)]
SHAPES = [(1, 1), (1, 7), (5, 1), (7, 9), (3, 64), (129, 130)]
INT8_TOKEN, FP8_TOKEN = (
    QuantSpec(INT8, TOKEN, dynamic=True),
    QuantSpec(FP8_E4M3, TOKEN, dynamic=True),
)
MXFP8 = SCHEMES["mxfp8"].weight


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_of(granularity, rows: int, columns: int) -> tuple[int, int]:
    return granularity.rows or rows, granularity.columns or columns


def scale_of_each_element(quantized: QuantizedTensor) -> torch.Tensor:
    """The scale that each code belongs to, looked up by index, float64."""
    rows, columns = quantized.qdata.shape
    block_rows, block_columns = block_of(quantized.spec.granularity, rows, columns)
    down, across = (
        torch.arange(rows) // max(1, block_rows),
        torch.arange(columns) // max(1, block_columns),
    )
    return quantized.scale.double()[down][:, across]


# Codes


def test_e4m3_clamps_before_the_cast():
    values = torch.tensor([448.0, 464.0, 465.0, 1e6, -1e6, torch.inf, -torch.inf])
    assert encode_codes(values, FP8_E4M3).float().tolist() == [448, 448, 448, 448, -448, 448, -448]


def test_int8_rounds_half_to_even():
    halves = torch.arange(-128, 127) + 0.5
    assert encode_codes(halves, INT8).tolist() == [round(half) for half in halves.tolist()]


def test_int8_clamps_instead_of_wrapping():
    values = torch.tensor(
        [127.5, 128.0, 200.0, 1e9, torch.inf, -128.5, -129.0, -200.0, -1e9, -torch.inf]
    )
    assert encode_codes(values, INT8).tolist() == [127] * 5 + [-128] * 5


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(INT8, TENSOR), QuantSpec(FP8_E4M3, TENSOR)],
    ids=lambda spec: spec.format.name,
)
def test_ties_stay_ties_under_every_scale(spec):
    # Dividing by the scale gives the tie exactly; multiplying by its reciprocal misses it for some
    # scales.
    ties = torch.arange(-127.5, 127.5) if spec.format is INT8 else torch.arange(16.5, 31.5) * 2
    scales = (1 + torch.arange(128) / 128) * 2.0**-9  # all mantissas of bfloat16
    for scale in scales:
        codes = quantize((ties * scale).reshape(1, -1), spec, scale.reshape(1, 1)).qdata
        assert torch.equal(codes.reshape(-1), encode_codes(ties, spec.format))


def test_bfloat16_values_quantize_as_their_float32_values():
    values = gaussian(5, 40).bfloat16()
    for scheme in SCHEMES.values():
        low, full = quantize(values, scheme.weight), quantize(values.float(), scheme.weight)
        assert torch.equal(low.qdata.float(), full.qdata.float())
        assert torch.equal(low.scale, full.scale)


# Blocks and scales


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_block_has_its_own_amax(granularity, shape):
    values = gaussian(*shape)
    block_rows, block_columns = block_of(granularity, *shape)
    expected = torch.tensor(
        [
            [
                values[top : top + block_rows, left : left + block_columns].abs().max()
                for left in range(0, shape[1], block_columns)
            ]
            for top in range(0, shape[0], block_rows)
        ]
    )
    assert torch.equal(block_amax(values, granularity), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_belong_to_the_scale_of_their_block(granularity, shape):
    values = gaussian(*shape)
    quantized = quantize(values, QuantSpec(INT8, granularity))
    scales = scale_of_each_element(quantized)
    assert torch.equal(
        quantized.qdata.double(), (values / scales.float()).double().round().clamp(-128, 127)
    )
    assert torch.equal(quantized.dequantize(), (quantized.qdata * scales).float())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (0, 1)], ids=str)
def test_no_rows_quantize_to_no_rows(granularity, shape):
    quantized = quantize(torch.empty(shape), QuantSpec(FP8_E4M3, granularity))
    assert quantized.qdata.shape == shape
    assert quantized.dequantize().shape == shape


def test_strided_values_quantize_like_contiguous_ones():
    values = gaussian(40, 6)
    for granularity in GRANULARITIES:
        spec = QuantSpec(INT8, granularity)
        strided, contiguous = quantize(values.t(), spec), quantize(values.t().contiguous(), spec)
        assert torch.equal(strided.qdata, contiguous.qdata)
        assert torch.equal(strided.scale, contiguous.scale)


@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL, group(4), block(2, 3)], ids=str)
def test_a_nan_gives_its_block_and_no_other_a_nan_amax(granularity):
    values = torch.ones(4, 8)
    values[3, 7] = torch.nan
    amax = block_amax(values, granularity)
    assert amax[-1, -1].isnan()
    assert amax.isnan().sum() == 1


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zero(name):
    values = gaussian(6, 64)
    values[2] = 0
    quantized = quantize(values, SCHEMES[name].weight)
    assert quantized.scale.isfinite().all()
    assert (quantized.scale > 0).all()
    assert (quantized.dequantize()[2] == 0).all()
    assert (quantize(torch.zeros(3, 64), SCHEMES[name].weight).dequantize() == 0).all()


@pytest.mark.parametrize("name", ["fp8-dynamic", "int8-dynamic", "mxfp8"])
def test_a_weight_block_of_zeros_gets_the_scale_one(name):
    assert choose_scale(torch.zeros(2, 1), SCHEMES[name].weight).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("number_format", [INT8, FP8_E4M3], ids=lambda f: f.name)
def test_static_scales_are_exact_in_bfloat16(number_format):
    amax = torch.cat([gaussian(1000).abs(), torch.tensor([1e-45, 1e-38, 1e-30, 1e30, 3e38])])
    scale = choose_scale(amax.reshape(-1, 1), QuantSpec(number_format, CHANNEL)).reshape(-1)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.bfloat16().float())
    assert (scale > 0).all()
    ordinary = amax > 1e-30
    assert ((scale * number_format.max / amax)[ordinary] - 1).abs().max() <= 2.0**-8


def test_codes_are_made_with_the_scale_that_is_stored():
    values = gaussian(20, 33)
    quantized = quantize(values, SCHEMES["int8-dynamic"].weight)
    again = quantize(values, SCHEMES["int8-dynamic"].weight, quantized.scale.bfloat16().float())
    assert torch.equal(quantized.qdata, again.qdata)


def test_dynamic_fp8_scales_follow_vllm():
    amax = np.array([0, 1e-9, 0.5 / 512, 1 / 512, 1.0, 3.3, 1e5], dtype=np.float32)
    expected = np.maximum(amax / np.float32(448), np.float32(1 / (448 * 512)))
    assert (
        choose_scale(torch.from_numpy(amax).reshape(-1, 1), FP8_TOKEN).reshape(-1).tolist()
        == expected.tolist()
    )


def test_dynamic_int8_scales_follow_vllm():
    amax = np.array([0, 1e-9, 1e-6, 127 * 2.0**-23, 1.0, 3.3, 1e5], dtype=np.float32)
    expected = np.maximum(amax / np.float32(127), np.finfo(np.float32).eps)
    assert (
        choose_scale(torch.from_numpy(amax).reshape(-1, 1), INT8_TOKEN).reshape(-1).tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize(
    "spec", [INT8_TOKEN, FP8_TOKEN, SCHEMES["fp8-block"].input, SCHEMES["mxfp8"].input], ids=str
)
def test_a_zero_token_stays_zero(spec):
    tokens = gaussian(3, 256)
    tokens[1] = 0
    dequantized = quantize(tokens, spec).dequantize()
    assert (dequantized[1] == 0).all()
    assert dequantized.isfinite().all()


def least_exponent_that_fits(amax: float) -> int:
    return next((exponent for exponent in range(-127, 127) if amax <= 448 * 2.0**exponent), 127)


def test_e8m0_scales_are_the_least_powers_of_two_that_do_not_clip():
    amax = torch.cat(
        [
            gaussian(300).abs() * 2.0 ** torch.arange(-150, 150).clamp(-110, 110),
            448 * 2.0 ** torch.arange(-127.0, 119),
        ]
    )
    amax = torch.cat([amax, torch.nextafter(amax, torch.zeros(()))])
    scale = choose_scale(amax.reshape(-1, 1), MXFP8).reshape(-1)
    assert scale.tolist() == [2.0 ** least_exponent_that_fits(value) for value in amax.tolist()]


def test_e8m0_scales_double_just_above_the_largest_code():
    amax = torch.nextafter(448 * 2.0 ** torch.arange(-126.0, 119), torch.tensor(torch.inf))
    scale = choose_scale(amax.reshape(-1, 1), MXFP8).reshape(-1)
    assert scale.tolist() == [2.0 ** least_exponent_that_fits(value) for value in amax.tolist()]


def test_e8m0_scales_stay_within_a_byte():
    scale = choose_scale(torch.tensor([[1e-45], [1e-38], [3e38]]), MXFP8)
    assert ((scale >= E8M0.min) & (scale <= E8M0.max)).all()
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))


def test_kv_scale_is_a_static_fp8_scale():
    scale = kv_scale(torch.tensor(896.0))
    assert scale.shape == (1,)
    assert scale.item() == 2.0
    rounded = kv_scale(torch.tensor(3.3))
    assert torch.equal(rounded, (torch.tensor([3.3]) / 448).bfloat16().float())


# Known errors of the formats


def test_sqnr_of_a_tenth_of_noise_is_20_db():
    signal = torch.ones(3, 4)
    assert sqnr_db(signal, signal * 0.9).item() == pytest.approx(20, abs=1e-4)
    noisy = signal.clone()
    noisy[1] *= 0.99
    assert sqnr_db(signal, noisy, dim=1).tolist() == pytest.approx(
        [math.inf, 40, math.inf], abs=1e-3
    )


def test_sqnr_of_an_exact_copy_is_infinite_and_of_lost_zeros_minus_infinite():
    assert sqnr_db(torch.ones(3), torch.ones(3)) == torch.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == torch.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -torch.inf
    for signal, noise in ((3.0, 0.0), (0.0, 0.0), (0.0, 2.0), (5.0, 2.0)):
        assert power_ratio_db_of_floats(signal, noise) == pytest.approx(
            float(power_ratio_db(torch.tensor(signal).double(), torch.tensor(noise).double()))
        )


def test_e4m3_gives_31_5_db_whatever_the_scale():
    values = gaussian(64, 1024)
    for factor in (1.0, 1.3, 1.9, 8.0, 20.0):
        scale = choose_scale(block_amax(values, TENSOR), QuantSpec(FP8_E4M3, TENSOR)) * factor
        assert sqnr_db(
            values, quantize(values, QuantSpec(FP8_E4M3, TENSOR), scale).dequantize()
        ).item() == pytest.approx(31.5, abs=0.3)


def test_int8_per_token_gives_41_db_on_gaussian_data():
    values = gaussian(64, 4096)
    assert sqnr_db(values, quantize(values, INT8_TOKEN).dequantize()).item() == pytest.approx(
        41, abs=1
    )


def test_outlier_channels_damage_int8_and_not_fp8():
    values = gaussian(64, 4096)
    outliers = torch.arange(4) * 1000
    values[:, outliers] *= 100
    others = torch.ones(4096, dtype=torch.bool)
    others[outliers] = False
    int8, fp8 = (quantize(values, spec).dequantize()[:, others] for spec in (INT8_TOKEN, FP8_TOKEN))
    assert sqnr_db(values[:, others], int8).item() == pytest.approx(9, abs=2)
    assert sqnr_db(values[:, others], fp8).item() > 30


def test_one_enormous_token_leaves_int8_per_tensor_no_codes_for_the_others():
    values = gaussian(64, 256)
    values[0] *= 2000
    dequantized = quantize(values, QuantSpec(INT8, TENSOR)).dequantize()
    assert sqnr_db(values[1:], dequantized[1:]).item() == pytest.approx(0, abs=0.1)


# The quantized Linear


def static_scale(inputs: torch.Tensor, spec: QuantSpec | None) -> torch.Tensor | None:
    """The scale [1] that a static scheme would bring along; None for the others."""
    if spec is None or spec.dynamic:
        return None
    return choose_scale(
        inputs.abs().max().reshape(1, 1) if inputs.numel() else torch.ones(1, 1), spec
    ).reshape(1)


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize(
    "tokens, in_features, out_features",
    [(0, 8, 3), (1, 1, 1), (1, 33, 2), (2, 64, 5), (17, 65, 9), (130, 130, 131)],
)
def test_int8_linear_is_an_exact_integer_product_scaled_in_float32(
    name, tokens, in_features, out_features
):
    scheme = SCHEMES[name]
    inputs, bias = gaussian(tokens, in_features, seed=1), gaussian(out_features, seed=2)
    weight = quantize(gaussian(out_features, in_features), scheme.weight)
    scale = static_scale(inputs, scheme.input)
    activations = quantize(inputs, scheme.input, None if scale is None else scale.reshape(1, 1))
    products = (activations.qdata.long() @ weight.qdata.long().T).float()
    expected = products * activations.scale * weight.scale.T + bias
    assert torch.equal(quantized_linear(inputs, weight, scheme.input, scale, bias), expected)


def test_int8_sums_are_rounded_only_once():
    # Sums of about 2·10^8: far above int16, and above 2^24, where a float32 accumulator rounds at
    # every step.
    generator = torch.Generator().manual_seed(0)
    inputs, codes = (
        torch.randint(80, 128, (3, 20000), generator=generator),
        torch.randint(80, 128, (64, 20000), generator=generator),
    )
    weight = QuantizedTensor(codes.to(torch.int8), torch.ones(64, 1), SCHEMES["int8-static"].weight)
    output = quantized_linear(
        inputs.float(), weight, SCHEMES["int8-static"].input, torch.ones(1), None
    )
    assert torch.equal(output, (inputs @ codes.T).float())


@pytest.mark.parametrize("name", ["fp8-static", "fp8-dynamic", "fp8-block"])
def test_fp8_linear_is_exact_on_small_integers(name):
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(-7, 8, (9, 256), generator=generator).float()
    codes = torch.randint(-7, 8, (130, 256), generator=generator).float()
    # Amax 448 makes every dynamic scale exactly 1.
    inputs[:, [0, 128]] = 448.0
    codes[:, [0, 128]] = 0.0
    weight = QuantizedTensor(
        codes.to(torch.float8_e4m3fn),
        torch.ones(scheme.weight.granularity.scale_shape(130, 256)),
        scheme.weight,
    )
    output = quantized_linear(
        inputs, weight, scheme.input, torch.ones(1) if scheme.needs_calibration else None, None
    )
    assert torch.equal(output.long(), inputs.long() @ codes.long().T)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "tokens, in_features, out_features",
    [(0, 64, 3), (1, 64, 1), (3, 100, 200), (7, 257, 130), (2, 128, 300)],
)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_computes_what_its_codes_and_scales_say(
    name, tokens, in_features, out_features, with_bias
):
    scheme = SCHEMES[name]
    # Rows and columns of very different size, so that a scale in the wrong place shows.
    inputs = gaussian(tokens, in_features, seed=1) * torch.exp2(
        torch.arange(tokens).float() % 5
    ).reshape(-1, 1)
    values = gaussian(out_features, in_features) * torch.exp2(
        torch.arange(out_features).float() // 32
    ).reshape(-1, 1)
    values = values * torch.exp2(torch.arange(in_features).float() // 64)
    weight, scale = quantize(values, scheme.weight), static_scale(inputs, scheme.input)
    bias = gaussian(out_features, seed=2) if with_bias else None

    activations = inputs.double()
    if scheme.input is not None:
        quantized = quantize(inputs, scheme.input, None if scale is None else scale.reshape(1, 1))
        activations = (
            quantized.qdata.double() * scale_of_each_element(quantized) if tokens else activations
        )
    weights = weight.qdata.double() * scale_of_each_element(weight)
    exact = activations @ weights.T + (0 if bias is None else bias.double())
    bound = (
        2
        * (in_features + 4)
        * 2.0**-24
        * (activations.abs() @ weights.abs().T + (0 if bias is None else bias.abs()))
    )

    output = quantized_linear(inputs, weight, scheme.input, scale, bias)
    assert output.shape == (tokens, out_features)
    assert ((output.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_bfloat16_outputs_are_rounded_once_after_scales_and_bias(name):
    scheme = SCHEMES[name]
    inputs, bias = gaussian(5, 128, seed=1).bfloat16(), gaussian(7, seed=2).bfloat16()
    weight, scale = (
        quantize(gaussian(7, 128), scheme.weight),
        static_scale(inputs.float(), scheme.input),
    )
    full = quantized_linear(inputs.float(), weight, scheme.input, scale, bias.float())
    low = quantized_linear(inputs, weight, scheme.input, scale, bias)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, full.bfloat16())


def test_weight_only_leaves_the_inputs_as_they_are():
    # 1 + 2^-12 is no value of INT8 or E4M3 under any scale that also holds 1000.
    inputs = torch.tensor([[1000.0, 1 + 2.0**-12]])
    for name in ("fp8-weight-only", "int8-weight-only"):
        largest = SCHEMES[name].weight.format.max  # so that the weight's scale is 1
        weight = quantize(torch.tensor([[0.0, largest]]), SCHEMES[name].weight)
        assert quantized_linear(inputs, weight, None, None, None).item() == largest * (1 + 2.0**-12)


def test_a_static_scale_clamps_inputs_beyond_its_range():
    for name, largest in (("int8-static", 127), ("fp8-static", 448)):
        weight = quantize(torch.ones(1, 1), SCHEMES[name].weight)
        output = quantized_linear(
            torch.tensor([[1e6]]), weight, SCHEMES[name].input, torch.tensor([0.5]), None
        )
        assert output.item() == pytest.approx(largest * 0.5 * weight.dequantize().item(), rel=1e-6)


def test_a_token_does_not_change_another_token_under_dynamic_scales():
    inputs = gaussian(4, 256)
    louder = inputs.clone()
    louder[3] *= 1000
    for name in ("int8-dynamic", "fp8-dynamic", "fp8-block", "mxfp8"):
        weight = quantize(gaussian(130, 256, seed=1), SCHEMES[name].weight)
        quiet, loud = (
            quantized_linear(x, weight, SCHEMES[name].input, None, None) for x in (inputs, louder)
        )
        assert torch.equal(quiet[:3], loud[:3])


def test_dequantize_multiplies_by_the_scale():
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    assert dequantize(codes, torch.tensor([[0.5], [2.0]]), CHANNEL).tolist() == [
        [0.5, -1.0],
        [6.0, 8.0],
    ]
