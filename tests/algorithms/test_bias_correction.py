from dataclasses import replace

import pytest
import torch
from quantized_weights import kld, quantized, recipe_of
from tiny_llama import make_llama

from quantkit.algorithms.bias_correction import corrected_bias
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.ops.reference import quantize
from quantkit.schemes.scheme import QuantScheme

INT8 = QuantScheme.parse("int8-dynamic")
CORRECTED = {"scheme": "int8-dynamic", "algorithms": ["bias_correction"]}


@pytest.fixture
def options(llama, text, tmp_path):
    return CalibrationOptions(
        llama,
        tmp_path / "calib",
        (str(text),),
        recipe_of(CORRECTED),
        num_samples=4,
        seq_len=32,
        batch_size=2,
    )


def test_corrected_outputs_have_the_right_mean_and_less_error_than_rounding():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(512, 64, generator=generator) ** 4  # far from centred
    weight, bias = torch.randn(32, 64, generator=generator), torch.randn(32, generator=generator)
    seen, values = (
        quantize(rows, INT8.input).dequantize(),
        quantize(weight, INT8.weight).dequantize(),
    )
    corrected = corrected_bias(bias, weight, values, rows.mean(0), seen.mean(0))
    exact = rows @ weight.T + bias
    before, after = (seen @ values.T + each - exact for each in (bias, corrected))
    torch.testing.assert_close(after.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    assert after.square().sum() < 0.9 * before.square().sum()


def test_only_biases_that_exist_are_corrected_and_they_are_exported(tmp_path, text, options):
    model = make_llama(tmp_path / "biased", attention_bias=True)
    original = Checkpoint.open(model)
    output = Checkpoint.open(quantized(replace(options, model=model)))
    done = {
        entry["name"]: entry["bias_corrected"]
        for entry in Calibration.open(options.output).description["chosen"]["linears"]
    }
    assert {name for name, is_done in done.items() if is_done} == {
        name for name in done if "self_attn" in name
    }
    assert {name for name in output.tensors if name.endswith(".bias")} == {
        name for name in original.tensors if name.endswith(".bias")
    }
    for name in done:
        if done[name]:
            assert not torch.equal(output.read(f"{name}.bias"), original.read(f"{name}.bias"))
    assert kld(model, output.path, text) < 0.01


def test_a_model_without_biases_stays_as_it_is(llama, options):
    output = Checkpoint.open(quantized(options))
    assert not [name for name in output.tensors if name.endswith(".bias")]
    assert not Calibration.open(options.output).description["chosen"]["untied"]
