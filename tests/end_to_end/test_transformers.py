"""transformers' own compressed-tensors loader reads what export writes, and computes what our
reference computes from the same file.
"""

import pytest
import torch
from tiny_llama import make_llama
from tiny_models import whole_model
from transformers import AutoModelForCausalLM

import quantkit.ops.reference
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.evaluation.quantized_model import load_quantized_model
from quantkit.schemes.number_formats import INT8
from quantkit.schemes.scheme import SCHEMES

TOKENS = torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(0))


def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Relative distance of the logits at each position."""
    first, second = first.detach().float(), second.detach().float()
    return ((first - second).norm(dim=-1) / second.norm(dim=-1)).flatten()


def assert_same_arithmetic(theirs: torch.Tensor, ours: torch.Tensor, base: torch.Tensor) -> None:
    """Most positions agree to float32 rounding, though quantization moves all of them by percents.

    Two programs add in another order; now and then that tips a value over the edge between two
    codes, and the positions that attend to it differ from there on, by no more than quantization
    itself.
    """
    cost, difference = distances(ours, base), distances(theirs, ours)
    assert cost.min() > 0.005
    assert (difference < 1e-5).float().mean() >= 0.5
    assert difference.max() < cost.median()


def logits_of_both(
    out, cache: bool = False, exec: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    quantized = load_quantized_model(out, "cpu", exec=exec)
    with torch.inference_mode():
        return (
            theirs(TOKENS).logits,
            whole_model(quantized)(
                TOKENS, past_key_values=quantized.new_cache(), use_cache=cache
            ).logits,
        )


@pytest.fixture(scope="module")
def float32_model(tmp_path_factory):
    """In float32 two programs that compute the same thing differ by rounding alone; in bfloat16
    codes flip.
    """
    return make_llama(tmp_path_factory.mktemp("f32") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def float32_calibration(float32_model, _text_master):
    output = float32_model.parent / "calib"
    calibrate(
        CalibrationOptions(float32_model, output, (str(_text_master),), num_samples=4, seq_len=64)
    )
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [name for name in SCHEMES if name not in ("mxfp8", "int8-dynamic")]
)
def test_logits_equal_those_of_transformers(scheme, float32_model, float32_calibration, export_to):
    theirs, ours = logits_of_both(export_to(scheme, float32_model, float32_calibration))
    base = AutoModelForCausalLM.from_pretrained(float32_model)(TOKENS).logits
    assert_same_arithmetic(theirs, ours, base)


def test_int8_dynamic_differs_from_transformers_by_its_range_alone(
    float32_model, export_to, monkeypatch
):
    """compressed-tensors divides a token's amax by 127.5, vLLM and we by 127; with the same divisor
    nothing is left.
    """
    out = export_to("int8-dynamic", float32_model)
    theirs, ours = logits_of_both(out)
    choose_scale = quantkit.ops.reference.choose_scale

    def like_compressed_tensors(amax, spec):
        return amax / 127.5 if spec.dynamic and spec.format is INT8 else choose_scale(amax, spec)

    monkeypatch.setattr(quantkit.ops.reference, "choose_scale", like_compressed_tensors)
    _, same_divisor = logits_of_both(out, exec="reference")
    assert distances(theirs, ours).median() > 0.01
    assert_same_arithmetic(
        theirs, same_divisor, AutoModelForCausalLM.from_pretrained(float32_model)(TOKENS).logits
    )


def test_mxfp8_logits_equal_those_of_transformers(llama, export_to):
    # compressed-tensors dequantizes MX weights to bfloat16; powers of two make that exact.
    theirs, ours = logits_of_both(export_to("mxfp8", llama))
    assert distances(theirs, ours).max() < 1e-3


def test_kv_cache_logits_equal_those_of_transformers(float32_model, float32_calibration, export_to):
    theirs, ours = logits_of_both(
        export_to("fp8-dynamic", float32_model, float32_calibration, kv_cache="fp8"), cache=True
    )
    base = AutoModelForCausalLM.from_pretrained(float32_model)(TOKENS).logits
    assert_same_arithmetic(theirs, ours, base)


def test_tied_model_loads_in_transformers(tmp_path, export_to):
    model = make_llama(tmp_path / "tied", tie=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        export_to("int8-weight-only", model), dtype="auto"
    )
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()


def test_generation_runs_on_an_exported_checkpoint(llama, export_to):
    theirs = AutoModelForCausalLM.from_pretrained(export_to("fp8-dynamic"), dtype="auto")
    assert theirs.generate(TOKENS[:1, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_transformers_reads_the_fp8_format(float32_model, export_to):
    """On a CPU it dequantizes the blocks, which leaves weights alone quantized: the same values as
    ours, inputs as they are.
    """
    out = export_to("fp8-block", float32_model, file_format="fp8")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = whole_model(load_quantized_model(out, "cpu", hardware="cpu"))
    for name, module in ours.named_modules():
        if type(module).__name__ == "QuantizedLinear":
            assert torch.equal(theirs.get_submodule(name).weight, module.weight().dequantize())
    with torch.inference_mode():
        assert distances(theirs(TOKENS).logits, ours(TOKENS).logits).median() < 1e-5
