"""Experts that lie one by one on disk and stacked in transformers: judged with quantized inputs, as
they are served.
"""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_tokenizer
from tiny_models import make_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.data.protocols import evaluation_windows
from quantkit.data.tokenizer import load_tokenizer
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.quantized_experts import serving_experts
from quantkit.evaluation.quantized_model import load_quantized_model
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.models.experts import Restacked
from quantkit.models.threads import one_thread
from quantkit.ops.reference import quantize
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import SCHEMES


def make_mixtral(directory):
    directory.mkdir()
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    config = MixtralConfig(
        vocab_size=make_tokenizer(directory),
        max_position_embeddings=128,
        initializer_range=0.1,
        **sizes,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


def test_experts_quantize_their_inputs_too(tmp_path, export_to, text):
    """Experts that lie one by one on disk are one tensor in transformers, and quantize what they
    read all the same.
    """
    model = make_mixtral(tmp_path / "mixtral")
    out = export_to("fp8-dynamic", model)
    result = evaluate(EvaluationOptions(model, (out, model), (str(text),), 32, 320)).to_json()
    quant, itself = result["quants"]
    assert quant["linears_quantized"] == 4 + 3 * 4 and quant["weights_only_linears"] == []
    assert quant["activations_quantized"] is True and len(quant["layers"]) == 16
    assert itself["kld"]["max"] == 0
    (weights_only,) = evaluate(
        EvaluationOptions(model, (out,), (str(text),), 32, 320, hardware="ampere")
    ).to_json()["quants"]
    assert (
        0 < weights_only["kld"]["mean"] < quant["kld"]["mean"]
        and weights_only["activations_quantized"] is False
    )


def test_an_expert_that_saw_no_token_has_a_finite_scale_and_is_named(tmp_path, text):
    """Also where experts lie stacked on disk: their scales are estimated, and each is told of."""
    model = tmp_path / "granitemoe"
    make_model(model, "granitemoe", vocab_size=make_tokenizer(model), num_local_experts=16)
    summary = calibrate(
        CalibrationOptions(model, tmp_path / "calib", (str(text),), num_samples=1, seq_len=3)
    )
    unseen = [
        entry for entry in Calibration.open(tmp_path / "calib").inputs.values() if not entry.tokens
    ]
    assert unseen and all(".block_sparse_moe.experts." in entry.name for entry in unseen)
    assert {entry.name.rpartition(".")[0] for entry in unseen} <= set(summary.starved)
    export(
        plan_export(
            ExportOptions(
                model, tmp_path / "out", Recipe(SCHEMES["int8-static"]), tmp_path / "calib"
            )
        )
    )
    scales = [
        tensor
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if name.endswith("_scale")
    ]
    assert all(torch.isfinite(scale).all() and (scale > 0).all() for scale in scales)


@pytest.mark.parametrize("kind", ["granitemoe", "llama4_text"])
# so that the first stack's matrices are square, or the second's, or neither's
@pytest.mark.parametrize("hidden_size", [64, 32, 48])
def test_experts_that_were_quantized_apart_are_stacked_as_the_model_has_them(
    kind, hidden_size, tmp_path
):
    """Square ones too, which don't tell which way they lie."""
    model = make_model(tmp_path, kind, hidden_size=hidden_size, intermediate_size=32)
    place, experts = next(
        (name, module) for name, module in model.named_modules() if name.endswith(".experts")
    )
    leaves = ("gate_proj", "up_proj", "down_proj")
    weights = {
        f"{place}.{expert}.{leaf}": torch.randn(
            (hidden_size, 32) if leaf == "down_proj" else (32, hidden_size)
        )
        for expert in range(4)
        for leaf in leaves
    }
    restacked = Restacked.of(model, weights)
    for leaf, parts in (("gate_up_proj", leaves[:2]), ("down_proj", leaves[2:])):
        stack = restacked.read(f"{place}.{leaf}", weights.get)
        assert stack.shape == getattr(experts, leaf).shape
        for expert in range(4):
            upright = stack[expert].T if kind == "llama4_text" else stack[expert]
            assert torch.equal(
                upright, torch.cat([weights[f"{place}.{expert}.{part}"] for part in parts])
            )


def test_base_with_experts_is_the_eager_forward(tmp_path, text):
    model = make_mixtral(tmp_path / "mixtral")
    whole = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", experts_implementation="eager"
    ).eval()
    losses = []
    with torch.inference_mode(), one_thread():
        for window in evaluation_windows(
            [str(text)], load_tokenizer(model), "gptq", 32, 320
        ).windows:
            tokens = torch.tensor([window.tokens])
            logits = (
                whole.model(tokens).last_hidden_state[0].double() @ whole.lm_head.weight.double().T
            )
            losses.append(
                torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
            )
    base = evaluate(EvaluationOptions(model, (), (str(text),), 32, 320)).to_json()["base"]
    assert base["perplexity"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-6)


def quantized_experts(scheme, model, tmp_path, export_to, text):
    """A model calibrated with all experts and exported: as served, its scheme, and its tensors."""
    calibrate(
        CalibrationOptions(
            model, tmp_path / "calib", (str(text),), num_samples=4, seq_len=64, all_experts=True
        )
    )
    out = export_to(scheme, model, tmp_path / "calib")
    return load_quantized_model(out, "cpu"), SCHEMES[scheme], load_file(out / "model.safetensors")


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "int8-static"])
def test_an_experts_output_is_the_product_of_quantized_inputs(scheme, tmp_path, export_to, text):
    model = make_mixtral(tmp_path / "mixtral")
    loaded, spec, codes = quantized_experts(scheme, model, tmp_path, export_to, text)
    names = [f"model.layers.0.block_sparse_moe.experts.{{}}.{leaf}" for leaf in ("w1", "w3", "w2")]
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, shares = (
        torch.tensor([[1], [1], [3], [0], [1], [2]]),
        torch.full((6, 1), 0.5).bfloat16(),
    )
    with loaded.blocks.block(0) as block, torch.inference_mode():
        experts = next(module for module in block.modules() if hasattr(module, "quantkit_inputs"))
        output = serving_experts(experts, hidden, chosen, shares)
    expected = torch.zeros_like(hidden)

    def product(states, expert, leaf):
        name = names[leaf].format(expert)
        merged = [
            f"{names[k].format(each)}.input_scale"
            for k in ((2,) if leaf == 2 else (0, 1))
            for each in range(4)
        ]
        static = (
            None
            if spec.input.dynamic
            else torch.stack([codes[scale] for scale in merged]).max().reshape(1, 1)
        )
        weight = (
            (codes[f"{name}.weight"].float() * codes[f"{name}.weight_scale"].float())
            .bfloat16()
            .float()
        )
        return (quantize(states, spec.input, static).dequantize() @ weight.T).bfloat16()

    for token, expert in enumerate(chosen[:, 0].tolist()):
        states = hidden[token : token + 1]
        between = torch.nn.functional.silu(product(states, expert, 0)) * product(states, expert, 1)
        expected[token] = product(between, expert, 2)[0] * 0.5
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=1e-3)


def make_llama4(directory):
    make_model(
        directory,
        "llama4_text",
        vocab_size=make_tokenizer(directory),
        num_hidden_layers=1,
        no_rope_layers=[1],
    )
    return directory


@pytest.mark.slow
def test_experts_that_are_given_all_tokens_are_quantized_and_judged_as_others_are(
    tmp_path, export_to, text
):
    """Llama 4's, which transformers runs in a way of its own: under the names that runtimes read,
    with scales of what the router hands to each, and with quantized inputs.
    """
    model = make_llama4(tmp_path / "llama4")
    calibrated = tmp_path / "calib"
    assert (
        calibrate(
            CalibrationOptions(model, calibrated, (str(text),), num_samples=4, seq_len=64)
        ).unread
        == ()
    )
    outs = [
        export_to(scheme, model, calibrated)
        for scheme in ("fp8-dynamic", "int8-static", "fp8-tensor")
    ]
    place = "model.layers.0.feed_forward.experts"
    statistics = Calibration.open(calibrated).inputs
    for out in outs:
        names = {
            name
            for name in load_file(out / "model.safetensors")
            if name.startswith(f"{place}.") and name.endswith(".weight")
        }
        assert names == {
            f"{place}.{expert}.{leaf}.weight"
            for expert in range(4)
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
    stored = load_file(outs[1] / "model.safetensors")
    for expert in range(4):
        scale = stored[f"{place}.{expert}.up_proj.input_scale"]
        assert float(scale) == pytest.approx(
            statistics[f"{place}.{expert}.up_proj"].amax / 127, rel=0.01
        )
        assert torch.equal(scale, stored[f"{place}.{expert}.gate_proj.input_scale"])
    result = evaluate(EvaluationOptions(model, tuple(outs), (str(text),), 32, 320)).to_json()
    for quant in result["quants"]:
        assert quant["linears_quantized"] == 4 + 3 + 3 * 4 and quant["weights_only_linears"] == []
        assert quant["activations_quantized"] is True and 0 < quant["kld"]["mean"] < 0.05
    (weights_only,) = evaluate(
        EvaluationOptions(model, (outs[0],), (str(text),), 32, 320, hardware="ampere")
    ).to_json()["quants"]
    assert weights_only["activations_quantized"] is False


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "int8-static"])
def test_of_all_tokens_each_expert_multiplies_those_sent_to_it(scheme, tmp_path, export_to, text):
    model = make_llama4(tmp_path / "llama4")
    loaded, spec, codes = quantized_experts(scheme, model, tmp_path, export_to, text)
    routed = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    routed[0, 1:] = routed[1, ::2] = routed[2] = routed[3, 3] = 0
    with loaded.blocks.block(0) as block, torch.inference_mode():
        output = block.feed_forward.experts(routed.reshape(20, 64)).reshape(4, 5, 64)

    def product(states, expert, leaf):
        place = "model.layers.0.feed_forward.experts"
        static = (
            None
            if spec.input.dynamic
            else torch.stack([codes[f"{place}.{each}.{leaf}.input_scale"] for each in range(4)])
            .max()
            .reshape(1, 1)
        )
        weight = (
            codes[f"{place}.{expert}.{leaf}.weight"].float()
            * codes[f"{place}.{expert}.{leaf}.weight_scale"].float()
        )
        return (
            quantize(states, spec.input, static).dequantize() @ weight.bfloat16().float().T
        ).bfloat16()

    for expert in range(4):
        states = routed[expert]
        between = torch.nn.functional.silu(product(states, expert, "gate_proj")) * product(
            states, expert, "up_proj"
        )
        expected = product(between, expert, "down_proj")
        sent = states.any(-1)
        torch.testing.assert_close(output[expert][sent], expected[sent], rtol=2e-2, atol=1e-3)
        assert not output[expert][~sent].any()
