"""What real checkpoints do beside the textbook: shards, prefixes, extra tensors, mixed dtypes,
templates, code of their own. Each goes the whole way.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama, make_tokenizer
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.errors import CheckpointError, RecipeError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.verify import verify
from quantkit.exporter.write import export
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

pytestmark = pytest.mark.slow  # each test runs several commands on a model


def go_the_whole_way(
    model: Path,
    text: Path,
    place: Path,
    scheme: str = "int8-static",
    kv_cache: str | None = None,
    **options,
) -> dict:
    """Calibrate, export, verify, eval; returns the result."""
    calibrate(CalibrationOptions(model, place / "calib", (str(text),), num_samples=3, seq_len=32))
    export(
        plan_export(
            ExportOptions(
                model,
                place / "out",
                Recipe(QuantScheme.parse(scheme), kv_cache=kv_cache),
                place / "calib",
                **options,
            )
        )
    )
    assert verify(place / "out", model).faults == ()
    result = evaluate(
        EvaluationOptions(model, (place / "out",), (str(text),), 32, 160, cache=False)
    ).to_json()
    assert 0 < result["quants"][0]["kld"]["mean"] < 0.5
    return result


def retold(model: Path, change) -> Path:
    """The model with its tensors changed by `change(tensors)`."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def tiny_model(directory: Path, kind: str, **changes) -> Path:
    vocabulary = make_tokenizer(directory)
    make_model(directory, kind, vocab_size=vocabulary, **changes)
    return directory


def test_several_shards(tmp_path, text):
    model = make_llama(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(
        model, max_shard_size="300KB"
    )
    (model / "model.safetensors").unlink()
    assert len(list(model.glob("model-*.safetensors"))) > 3
    go_the_whole_way(model, text, tmp_path, max_shard_bytes=200_000)


def test_names_without_the_models_prefix_and_masks_among_the_weights(tmp_path, text):
    """GPT-2 as it was published: `h.0.…` without `transformer.`, and each block's causal mask saved
    as `attn.bias`.
    """

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for block in range(2):
            tensors[f"h.{block}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    model = retold(tiny_model(tmp_path / "model", "gpt2"), change)
    result = go_the_whole_way(model, text, tmp_path)
    assert result["quants"][0]["linears_quantized"] == len(result["quants"][0]["layers"]) == 8
    assert "h.0.attn.bias" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_body_without_a_prefix_has_the_same_perplexity_as_with_one(tmp_path, text):
    with_prefix = make_llama(tmp_path / "with", tie=True)
    without = make_llama(tmp_path / "without", tie=True)
    retold(
        without,
        lambda tensors: [
            tensors.update({name.removeprefix("model."): tensors.pop(name)})
            for name in list(tensors)
        ],
    )
    result = go_the_whole_way(without, text, tmp_path, kv_cache="fp8")
    assert (
        result["quants"][0]["activations_quantized"] is True
        and result["quants"][0]["kv_cache_quantized"] is True
    )
    assert (
        result["base"]["perplexity"]
        == evaluate(
            EvaluationOptions(with_prefix, (), (str(text),), 32, 160, cache=False)
        ).base.perplexity
    )


def test_layers_that_predict_further_tokens_are_quantized_and_reported_as_not_evaluated(
    tmp_path, text
):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {
            name.replace(".layers.1.", ".layers.2."): tensor.clone()
            for name, tensor in tensors.items()
            if ".layers.1." in name
        }
        hidden = tensors["model.norm.weight"].shape[0]
        tensors["model.layers.2.eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    model = retold(tiny_model(tmp_path / "model", "deepseek_v3"), change)
    summary = calibrate(
        CalibrationOptions(model, tmp_path / "told", (str(text),), num_samples=2, seq_len=32)
    )
    assert (
        summary.unread
        and all(name.startswith("model.layers.2.") for name in summary.unread)
        and summary.ignore["unread"] == ("model.layers.2.*",)
    )
    result = go_the_whole_way(model, text, tmp_path, "fp8-dynamic")
    assert any(
        "model.layers.2." in remark and "not evaluated" in remark for remark in result["remarks"]
    )
    quant, stored = result["quants"][0], load_file(tmp_path / "out" / "model.safetensors")
    assert quant["activations_quantized"] is True and all(
        name.startswith("model.layers.2.") for name in quant["unjudged_linears"]
    )
    assert stored["model.layers.2.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert (
        stored["model.layers.2.eh_proj.weight"].dtype
        == stored["model.layers.2.shared_head.head.weight"].dtype
        == torch.bfloat16
    )


def test_tensors_that_the_model_does_not_use_are_kept(tmp_path, text):
    model = retold(
        make_llama(tmp_path / "model"),
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
        ),
    )
    go_the_whole_way(model, text, tmp_path, "fp8-dynamic")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in load_file(
        tmp_path / "out" / "model.safetensors"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(tmp_path, text, dtype):
    go_the_whole_way(make_llama(tmp_path / "model", dtype=dtype), text, tmp_path)


def test_norms_in_float32_beside_bfloat16_weights_stay_so(tmp_path, text):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}

    go_the_whole_way(retold(make_llama(tmp_path / "model"), change), text, tmp_path)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        stored["model.norm.weight"].dtype == torch.float32
        and stored["lm_head.weight"].dtype == torch.bfloat16
    )


def test_generation_config_and_templates_in_both_places_are_carried_over(tmp_path, text):
    model = make_llama(tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {
        "chat_template": "{{ messages[0].content }}"
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    go_the_whole_way(model, text, tmp_path, "fp8-dynamic")
    for name in (
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "tokenizer_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_code_in_a_checkpoint_runs_only_with_the_flag(tmp_path, text):
    model = make_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        "architectures": ["OwnForCausalLM"],
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    data = (str(text),)
    with pytest.raises(CheckpointError, match="`trust_remote_code=True`"):
        calibrate(CalibrationOptions(model, tmp_path / "calib", data, num_samples=2, seq_len=16))
    calibrate(
        CalibrationOptions(
            model, tmp_path / "calib", data, num_samples=2, seq_len=16, trust_remote_code=True
        )
    )
    export(
        plan_export(
            ExportOptions(model, tmp_path / "out", Recipe(QuantScheme.parse("fp8-dynamic")))
        )
    )
    result = evaluate(
        EvaluationOptions(
            model, (tmp_path / "out",), data, 16, 64, cache=False, trust_remote_code=True
        )
    )
    assert result.quants[0].linears_quantized == 14


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'
    )
    save_file(
        {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        plan_export(
            ExportOptions(tmp_path, tmp_path / "out", Recipe(QuantScheme.parse("fp8-dynamic")))
        )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        plan_export(
            ExportOptions(tmp_path, tmp_path / "out", Recipe(QuantScheme.parse("fp8-dynamic")))
        )


def test_a_model_that_comes_in_fp8_blocks(tmp_path, text):
    """As DeepSeek ships it: calibrated from dequantized blocks, which other schemes are made of,
    and blocks that stay keep their codes.
    """
    original = tiny_model(tmp_path / "original", "deepseek_v3")
    model = tmp_path / "model"
    export(
        plan_export(
            ExportOptions(
                original, model, Recipe(QuantScheme.parse("fp8-block")), file_format="fp8"
            )
        )
    )
    assert "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv" in load_file(
        model / "model.safetensors"
    )
    with pytest.raises(RecipeError, match="matches no module"):
        ignored = Recipe(QuantScheme.parse("fp8-dynamic"), ignore=(Pattern("*.weight_scale_inv"),))
        plan_export(ExportOptions(model, tmp_path / "none", ignored))
    go_the_whole_way(model, text, tmp_path, "int8-static")
    plan = plan_export(
        ExportOptions(
            model, tmp_path / "blocks", Recipe(QuantScheme.parse("fp8-block")), file_format="fp8"
        )
    )
    export(plan)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "blocks", model))
    assert all(
        torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))
        for name, tensor in ours.items()
    )
    assert sum(row.bytes_before for row in plan.parameters) == sum(
        tensor.nbytes for tensor in theirs.values()
    )
