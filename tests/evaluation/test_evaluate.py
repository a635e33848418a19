import gc
import json
import math
import os
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama, make_text
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.formats import read_quantization_config
from quantkit.data.protocols import evaluation_windows
from quantkit.data.tokenizer import load_tokenizer
from quantkit.data.windows import Window
from quantkit.errors import CheckpointError, DataError, EvaluationError, NotComparableError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.final_hidden_states import (
    FinalHiddenStates,
    make_final_hidden_states,
    rounding_noise,
)
from quantkit.evaluation.logits import OutputHead
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.quantized_model import QuantizedModel, load_quantized_model
from quantkit.evaluation.scoring import ModelOutput, Scoring
from quantkit.exporter.runtimes import as_computed
from quantkit.models.blockwise import BlockStep
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.threads import one_thread
from quantkit.ops import native
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import quantize, quantized_linear
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import SCHEMES, QuantScheme


@pytest.fixture
def evaluated(llama, text):
    """evaluated(quants …) → the JSON of `eval`."""

    def run(*quants, base=llama, seq_len=64, max_tokens=640, data=text, **options):
        return evaluate(
            EvaluationOptions(base, tuple(quants), (str(data),), seq_len, max_tokens, **options)
        ).to_json()

    return run


@pytest.fixture
def documents(tmp_path):
    """Documents of 40 words each, which lmeval scores one by one."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": make_text(40, seed)}) + "\n" for seed in range(12)))
    return path


def windows_of(model, text, seq_len: int = 64, max_tokens: int = 640) -> dict[int, Window]:
    """Of the protocol gptq, by number."""
    windows = evaluation_windows([str(text)], load_tokenizer(model), "gptq", seq_len, max_tokens)
    return dict(enumerate(windows.windows))


def quantized_linears(
    model: QuantizedModel, number: int, block: torch.nn.Module
) -> dict[str, QuantizedLinear]:
    """Those of one decoder block, by their names in the checkpoint."""
    prefix = model.blocks.block_name(number)
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def test_base_perplexity_is_that_of_transformers_in_float32_logits(llama, text, evaluated):
    windows = evaluation_windows([str(text)], load_tokenizer(llama), "gptq", 64, 640)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    losses = []
    with torch.inference_mode():
        for window in windows.windows:
            tokens = torch.tensor([window.tokens])
            hidden = model.model(tokens).last_hidden_state[0].double()
            logits = hidden @ model.lm_head.weight.double().T
            losses.append(
                torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
            )
    # bfloat16 logits would be off by 1e-3.
    assert evaluated()["base"]["perplexity"] == pytest.approx(
        math.exp(torch.cat(losses).mean()), rel=1e-6
    )


def test_base_against_itself_is_exactly_zero(llama, evaluated):
    (quant,) = evaluated(llama)["quants"]
    delta = quant["ppl_delta_pct"]
    assert (delta["value"], delta["low"], delta["high"]) == (0, 0, 0)
    assert quant["kld"]["mean"] == quant["kld"]["max"] == 0 and quant["top1_agreement"] == 1


WEIGHTS_ALONE = [
    name
    for name, scheme in SCHEMES.items()
    if as_computed(scheme, "ampere").input is None and not scheme.needs_calibration
]


@pytest.mark.parametrize("scheme", WEIGHTS_ALONE)
def test_exported_file_gives_the_metrics_of_its_dequantized_weights(
    scheme, tmp_path, copy, export_to, evaluated
):
    """Reload parity: where only weights are quantized, a plain model that holds the dequantized
    weights gives the same metrics.
    """
    base = make_llama(tmp_path / "base", dtype=torch.float32)
    out, dense = export_to(scheme, base, None), copy(base, "dense")
    quantized, tensors = (
        load_quantized_model(out, "cpu", "ampere"),
        load_file(dense / "model.safetensors"),
    )
    replaced = {}
    for number in range(quantized.blocks.block_count):
        with quantized.blocks.block(number) as block:
            for name, module in quantized_linears(quantized, number, block).items():
                replaced[f"{name}.weight"] = module.weight().dequantize()
    assert len(replaced) == 14 and set(replaced) <= set(tensors)
    save_file(tensors | replaced, dense / "model.safetensors", {"format": "pt"})
    ours, expected = evaluated(out, dense, base=base, hardware="ampere", exec="reference")["quants"]
    assert ours["kld"]["mean"] > 0
    assert ours["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert ours["kld"]["mean"] == pytest.approx(expected["kld"]["mean"], rel=1e-3)


def test_codes_leave_memory_with_their_block(export_to):
    quantized = load_quantized_model(export_to("int8-dynamic"), "cpu")
    with quantized.blocks.block(0) as block:
        codes = [
            weakref.ref(module.packed if module.kernel else module.codes)
            for module in quantized_linears(quantized, 0, block).values()
        ]
        assert len(codes) == 7 and all(reference() is not None for reference in codes)
    del block
    gc.collect()
    assert not any(reference() is not None for reference in codes)


def all_hidden(states: FinalHiddenStates) -> torch.Tensor:
    """Of all windows, [tokens, hidden size] float64."""
    return torch.cat([states.scored(number) for number in states.windows]).double()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_and_reference_agree(scheme, export_to, text, evaluated):
    """INT8 to the last bit of the hidden states; FP8 and weights alone within what the order of
    float32 sums and bfloat16's last bit make of it.
    """
    out = export_to(scheme)
    windows = evaluation_windows([str(text)], load_tokenizer(out), "gptq", 64, 640)
    if native.cpu_kernels() is None:
        pytest.skip("the CPU kernels weren't built, or QUANTKIT_KERNELS asks for the reference")
    quantized = {
        name: load_quantized_model(out, "cpu", exec=name) for name in ("kernel", "reference")
    }
    assert (
        set(quantized["reference"].kernels) == {"reference"}
        and "reference" not in quantized["kernel"].kernels
    )
    numbered = dict(enumerate(windows.windows))
    with torch.inference_mode():
        kernel, reference = (
            all_hidden(make_final_hidden_states(model, numbered, 64))
            for model in quantized.values()
        )
        again = load_quantized_model(out, "cpu", exec="reference")
        noisy = all_hidden(make_final_hidden_states(again, numbered, 64, watch=rounding_noise()))
    if quantized["kernel"].kernels == {"matmul_int8": 14}:
        assert torch.equal(kernel, reference)
    # Less than one more rounding to bfloat16 after each block changes.
    assert (kernel - reference).norm() < (noisy - reference).norm()
    results = {
        name: evaluated(out, exec=name)["quants"][0] for name in ("kernel", "reference", "auto")
    }
    assert [result["exec"] for result in results.values()] == ["kernel", "reference", "kernel"]
    assert (
        results["kernel"]["kernels"] == quantized["kernel"].kernels
        and sum(results["kernel"]["kernels"].values()) == 14
    )
    exact = scheme in ("int8-dynamic", "int8-static")
    assert results["kernel"]["perplexity"] == pytest.approx(
        results["reference"]["perplexity"], rel=1e-7 if exact else 2e-3
    )


def test_float32_model_in_weight_only_scheme_equals_its_dense_twin(tmp_path, export_to, text):
    model = make_llama(tmp_path / "f32", dtype=torch.float32)
    out = export_to("int8-weight-only", model)
    dense = AutoModelForCausalLM.from_pretrained(model)
    quantized = load_quantized_model(out, "cpu")
    tokens, states = torch.arange(2, 60)[None], HiddenStates()

    def run(step: BlockStep) -> None:
        for name, module in quantized_linears(quantized, step.number, step.block).items():
            dense.get_submodule(name).weight.data = module.weight().dequantize()
        step.advance(0)

    with torch.inference_mode():
        walk = quantized.blocks.walk({0: tokens}, states, run, cache=quantized.new_cache())
        ((_, final),) = walk.finish()
        logits = quantized.blocks.model.lm_head(final)
        torch.testing.assert_close(logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)


def test_damage_in_one_layer_is_ranked_first(llama, export_to, evaluated):
    out = export_to("int8-dynamic")
    before = evaluated(out)["quants"][0]
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 1.5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    after = evaluated(out)["quants"][0]
    assert (
        after["layers"][0]["name"] == "model.layers.1.mlp.up_proj"
        and after["layers"][0]["weight_sqnr_db"] < 10
    )
    assert after["kld"]["mean"] > 2 * before["kld"]["mean"]


def test_hardware_without_fp8_keeps_activations_and_loses_less(export_to, evaluated):
    out = export_to("fp8-dynamic")
    native, ampere = evaluated(out)["quants"][0], evaluated(out, hardware="ampere")["quants"][0]
    assert native["activations_quantized"] is True and ampere["activations_quantized"] is False
    assert 0 < ampere["kld"]["mean"] < native["kld"]["mean"]


def test_kv_cache_scheme_changes_the_figures(export_to, evaluated):
    plain, cached = export_to("fp8-dynamic"), export_to("fp8-dynamic", kv_cache="fp8", name="kv")
    first, second = evaluated(plain, cached)["quants"]
    assert not first["kv_cache_quantized"] and second["kv_cache_quantized"]
    assert first["perplexity"] != second["perplexity"]
    # Weights are the same; what reaches the layers behind the first attention is not.
    weights = [
        {row["name"]: row["weight_sqnr_db"] for row in quant["layers"]} for quant in (first, second)
    ]
    assert weights[0] == weights[1]


def test_mixed_recipe_and_quantized_lm_head_are_judged_as_stored(export_to, evaluated):
    fp8, int8 = QuantScheme.parse("fp8-dynamic"), QuantScheme.parse("int8-dynamic")
    out = export_to(
        Recipe(int8, layers=((Pattern("lm_head"), int8), (Pattern("re:.*down_proj"), fp8)))
    )
    quant = evaluated(out)["quants"][0]
    assert quant["scheme"] == "mixed" and quant["linears_quantized"] == 15
    assert 0 < quant["kld"]["mean"] < 1


@pytest.mark.parametrize("use_kernel", [True, False])
def test_chunks_do_not_change_the_scores(use_kernel, llama, text, export_to):
    """Positions a few at a time, and without kernels the vocabulary too."""
    out, windows = export_to("int8-dynamic"), windows_of(llama, text)
    found = {}
    for step, part_size in ((512, 8192), (7, 48)):
        models = []
        for path in (llama, out):
            quantized = load_quantized_model(path, "cpu")
            with torch.inference_mode():
                states = make_final_hidden_states(quantized, windows, 64)
                head = OutputHead.of(quantized.blocks.model, use_kernel, part_size=part_size)
            models.append(ModelOutput(head, states))
        assert len(models[0].head.parts) == (1 if step == 512 else 7)
        with torch.inference_mode():
            found[step] = Scoring(Ranks(), windows, step=step).pair(*models).tokens
    whole, parts = found.values()
    assert len(whole.nll) == sum(window.scored for window in windows.values())
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-6)
    np.testing.assert_allclose(parts.quant_nll, whole.quant_nll, rtol=1e-6)
    np.testing.assert_allclose(parts.kld, whole.kld, rtol=1e-3, atol=1e-7)
    assert (parts.same_top1 == whole.same_top1).all() and (parts.hit == whole.hit).all()


@pytest.mark.parametrize("protocol", ["gptq", "llamacpp", "lmeval"])
def test_each_protocol_scores_what_it_says(protocol, evaluated, llama, documents):
    result = evaluated(llama, protocol=protocol, data=documents, seq_len=32)
    assert result["protocol"]["name"] == protocol
    assert result["tokens_scored"] == sum(result["window_tokens"])
    assert result["quants"][0]["ppl_delta_pct"]["value"] == 0


def test_lmeval_counts_words_and_never_cuts_a_document(evaluated, documents):
    whole, half = (
        evaluated(protocol="lmeval", data=documents, max_tokens=None),
        evaluated(protocol="lmeval", data=documents, max_tokens=200),
    )
    words = {}
    for name, result in (("whole", whole), ("half", half)):
        words[name] = round(result["tokens_scored"] / result["tokens_per_unit"])
        nll = sum(result["base"]["window_nll"])
        assert result["base"]["perplexity"] == pytest.approx(math.exp(nll / words[name]))
        assert result["base"]["bits_per_byte"] > 0
    # Documents of 40 words each, as many as hold 200 tokens.
    assert words["whole"] == 12 * 40 and half["tokens_scored"] <= 200
    assert words["half"] % 40 == 0 and 0 < words["half"] < words["whole"]
    with pytest.raises(DataError, match="whole documents"):
        evaluated(protocol="lmeval", data=documents, max_tokens=10)


def test_protocols_have_different_hashes(evaluated, documents):
    hashes = {
        evaluated(protocol=protocol, data=documents, max_tokens=256)["protocol"]["hash"]
        for protocol in ("gptq", "llamacpp", "lmeval")
    }
    assert len(hashes | {evaluated(seq_len=32, max_tokens=128)["protocol"]["hash"]}) == 4


def test_result_has_the_contracts_keys(export_to, evaluated):
    result = json.loads(json.dumps(evaluated(export_to("fp8-dynamic"), gates=("size_ratio<=0.9",))))
    assert {
        "schema_version",
        "protocol",
        "data",
        "tokens_scored",
        "windows",
        "base",
        "quants",
        "gates",
    } <= set(result)
    assert {"name", "seq_len", "hash"} <= set(result["protocol"]) and {
        "sha256",
        "tokens_sha256",
    } <= set(result["data"])
    assert {"path", "perplexity", "bytes", "tokens_per_second"} <= set(result["base"])
    quant = result["quants"][0]
    assert {
        "path",
        "scheme",
        "perplexity",
        "ppl_delta_pct",
        "kld",
        "top1_agreement",
        "bytes",
        "bits_per_weight",
        "tokens_per_second",
        "exec",
        "activations_quantized",
        "layers",
    } <= set(quant)
    assert {"value", "low", "high"} <= set(quant["ppl_delta_pct"]) and {
        "mean",
        "median",
        "p99",
        "max",
    } <= set(quant["kld"])
    assert {"name", "weight_sqnr_db"} <= set(quant["layers"][0]) and result["gates"][0][
        "result"
    ] == "pass"
    assert np.sum(quant["window_nll"]) / result["tokens_scored"] == pytest.approx(
        math.log(quant["perplexity"])
    )


def test_other_tokenizer_or_other_model_is_not_comparable(llama, copy, tmp_path, evaluated):
    other = copy(llama, "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NotComparableError, match="tokenizer"):
        evaluated(other)
    content = json.loads((llama / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]  # the same vocabulary, other tokens
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NotComparableError, match="tokenizer"):
        evaluated(other)
    with pytest.raises(NotComparableError, match="hidden_size"):
        evaluated(make_llama(tmp_path / "small", hidden_size=64))


def test_nonfinite_results_name_the_window(llama, copy, evaluated):
    broken = copy(llama, "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match="window 1, first after model.layers.0;"):
        evaluated(broken)


def test_logits_that_overflow_name_the_window_and_the_head(llama, copy, evaluated):
    broken = copy(llama, "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        EvaluationError, match="logits of window 1 are not finite, first after the output head"
    ):
        evaluated(broken)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic", "fp8-weight-only"])
def test_exported_file_gives_the_perplexity_of_the_model_in_memory(
    scheme, llama, text, export_to, evaluated
):
    """Reload parity: the whole model, its Linears quantized here from the base's weights, without
    any file.
    """
    spec = SCHEMES[scheme]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            weight = quantize(linear.weight.detach(), spec.weight)
            linear.forward = lambda inputs, weight=weight: quantized_linear(
                inputs[0], weight, spec.input, None, None
            )[None]
    losses = []
    with torch.inference_mode(), one_thread():
        for window in evaluation_windows(
            [str(text)], load_tokenizer(llama), "gptq", 64, 640
        ).windows:
            tokens = torch.tensor([window.tokens])
            logits = (
                model.model(tokens).last_hidden_state[0].double() @ model.lm_head.weight.double().T
            )
            losses.append(
                torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
            )
    (quant,) = evaluated(export_to(scheme), exec="reference")["quants"]
    assert quant["perplexity"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-6)


def test_a_candidate_that_verify_rejects_is_refused(export_to, evaluated):
    out = export_to("fp8-dynamic")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = -1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=(
            "model.layers.1.mlp.up_proj.weight_scale holds scales that are zero or negative;"
            r" `quantkit\.verify\("
        ),
    ):
        evaluated(out)


def test_a_fused_set_with_several_scales_is_judged_as_stored_and_said(export_to, evaluated):
    """As other tools write it: verify counts it as a fault, since runtimes round again under one
    scale.
    """
    out = export_to("fp8-tensor")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] *= 1.01
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    result = evaluated(out)
    assert (
        "differs among q_proj, k_proj, v_proj" in result["remarks"][0]
        and result["quants"][0]["kld"]["mean"] > 0
    )


@pytest.mark.slow
def test_a_base_that_was_judged_before_comes_from_the_cache(
    llama, copy, export_to, evaluated, monkeypatch, tmp_path
):
    llama = copy(llama)
    evaluated = partial(evaluated, base=llama)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    first, fresh = (
        evaluated(export_to("int8-dynamic")),
        evaluated(export_to("fp8-dynamic"), cache=False),
    )
    assert len(list((tmp_path / "cache" / "hidden-states").glob("*.safetensors"))) == 1
    ran = []
    again = evaluate(
        EvaluationOptions(
            llama, (tmp_path / "out-fp8-dynamic",), tuple(fresh["data"]["sources"]), 64, 640
        ),
        lambda name, *_: ran.append(name),
    ).to_json()
    assert (first["base"]["from_cache"], again["base"]["from_cache"]) == (False, True) and set(
        ran
    ) == {"out-fp8-dynamic", "logits"}
    for key in ("window_nll", "perplexity", "bits_per_byte"):
        assert again["base"][key] == fresh["base"][key] == first["base"][key]
    assert again["quants"][0]["window_kld"] == fresh["quants"][0]["window_kld"]
    # Other windows, and a base that was touched, are made anew.
    assert not evaluated(max_tokens=320)["base"]["from_cache"]
    os.utime(llama / "model.safetensors")
    assert not evaluated()["base"]["from_cache"]


def test_noise_floor_is_small_and_the_same_each_time(export_to, evaluated):
    out = export_to("int8-dynamic")
    first, second = (evaluated(out, noise_floor=True) for _ in range(2))
    floor, kld = first["noise_floor"]["kld"], first["quants"][0]["kld"]
    assert (
        0 < floor["mean"] < kld["mean"] / 3
        and first["noise_floor"]["kld_histogram"]["zero"] < first["tokens_scored"]
    )
    assert floor == second["noise_floor"]["kld"] and evaluated()["noise_floor"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_noise_has_the_variance_of_one_rounding(dtype):
    values = (
        torch.full((400, 500), 1.5, dtype=dtype)
        if dtype != torch.float32
        else torch.rand(400, 500) + 1
    )
    noisy = rounding_noise().change(0, 0, values)
    step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    assert noisy.dtype == dtype and (noisy.float() - values.float()).abs().max() <= step
    assert (noisy.float() - values.float()).std() == pytest.approx(step / math.sqrt(12), rel=0.03)
    edges = torch.tensor(
        [0.0, -0.0, torch.finfo(dtype).max, -torch.finfo(dtype).max], dtype=dtype
    ).repeat(500, 1)
    assert dtype == torch.float32 or torch.equal(rounding_noise().change(0, 0, edges), edges)


def test_figures_hang_together(export_to, evaluated):
    result = evaluated(export_to("int8-dynamic"))
    quant, tokens = result["quants"][0], result["tokens_scored"]
    assert (
        quant["nonfinite"] == 0
        and quant["kld"]["mean_low"] < quant["kld"]["mean"] < quant["kld"]["mean_high"]
    )
    ordered = [quant["kld"][name] for name in ("median", "p90", "p99", "p99_9", "max")]
    assert ordered == sorted(ordered) and quant["kld"]["max_at"]["context"]
    assert sum(quant["kld_histogram"]["counts"]) + quant["kld_histogram"]["zero"] == tokens
    assert (
        sum(row["tokens"] for row in quant["kld_by_confidence"])
        == sum(row["tokens"] for row in quant["kld_by_position"])
        == tokens
    )
    lost = (quant["flips"]["to_wrong"] - quant["flips"]["to_right"]) / tokens
    assert abs(lost) <= 1 - quant["top1_agreement"]
    assert quant["bits_per_byte"] / result["base"]["bits_per_byte"] == pytest.approx(
        math.log(quant["perplexity"]) / math.log(result["base"]["perplexity"])
    )


def test_bits_per_byte_count_the_scored_text(llama, text, evaluated):
    base = evaluated(max_tokens=64)["base"]
    tokenizer = load_tokenizer(llama)
    scored = tokenizer.decode(tokenizer(text.read_text()).input_ids[1:64])
    assert base["bits_per_byte"] == pytest.approx(
        base["window_nll"][0] / math.log(2) / len(scored.encode())
    )


def test_hidden_states_in_files_give_the_same_figures(export_to, evaluated, monkeypatch):
    out = export_to("int8-dynamic")
    in_memory = evaluated(out, cache=False)
    monkeypatch.setattr("quantkit.models.hidden_states.available_memory", lambda: 1000)
    in_files = evaluated(out, cache=False)
    assert in_files["quants"][0]["window_kld"] == in_memory["quants"][0]["window_kld"]


@pytest.mark.slow
def test_torchrun_splits_the_windows_and_finds_the_same(llama, text, export_to, tmp_path):
    out = export_to("fp8-dynamic")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    results = {}
    for name, launcher in {"one": ["-m"], "two": [*torchrun, "-m"]}.items():
        arguments = [
            "eval",
            llama,
            out,
            "--data",
            text,
            "--seq-len",
            "64",
            "--max-tokens",
            "704",
            "--json",
            "--no-cache",
            "-o",
            tmp_path / f"{name}.json",
        ]
        done = subprocess.run(
            [sys.executable, *launcher, "quantkit", *map(str, arguments)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        results[name] = json.loads(done.stdout)  # one process speaks
        assert results[name] == json.loads((tmp_path / f"{name}.json").read_text())
    one, two = results["one"], results["two"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["base"]["window_nll"] == two["base"]["window_nll"]
    for key in (
        "window_nll",
        "window_kld",
        "window_same_top1",
        "kld",
        "flips",
        "delta_p",
        "ppl_delta_pct",
    ):
        assert one["quants"][0][key] == two["quants"][0][key], key
    weights = [
        {row["name"]: row["weight_sqnr_db"] for row in result["quants"][0]["layers"]}
        for result in (one, two)
    ]
    assert weights[0] == weights[1]


def test_missing_scale_is_an_error_not_a_guess(export_to, evaluated):
    out = export_to("fp8-dynamic")
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        evaluated(out)


def test_deepseek_block_format_is_read(llama, copy, export_to, evaluated):
    """The same codes under the `fp8` method: weight_scale_inv beside weight."""
    out = export_to("fp8-block")
    tensors = {
        name.replace("weight_scale", "weight_scale_inv"): tensor
        for name, tensor in load_file(out / "model.safetensors").items()
    }
    other = copy(out, "deepseek")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    (other / "config.json").write_text(json.dumps(config))
    assert read_quantization_config(config).schemes[0].name == "fp8-block"
    first, second = evaluated(out, other)["quants"]
    assert first["perplexity"] == second["perplexity"]


@pytest.mark.slow
def test_interval_narrows_with_more_text(export_to, evaluated, tmp_path):
    out = export_to("int8-dynamic")
    long = tmp_path / "long.txt"
    long.write_text(make_text(12000, seed=7))
    few = evaluate(EvaluationOptions(out, (out,), (str(long),), 32, 320))
    assert few.windows == 10
    widths = []
    for tokens in (960, 7680):
        delta = evaluated(out, seq_len=32, max_tokens=tokens)["quants"][0]["ppl_delta_pct"]
        widths.append(delta["high"] - delta["low"])
    assert widths[1] < widths[0]


def test_missing_base_weight_is_an_error_not_random(llama, copy, evaluated):
    broken = copy(llama, "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks the weight model.layers.0.mlp.up_proj.weight"):
        evaluated(base=broken)


def test_codes_without_a_config_are_not_judged_as_weights(export_to, evaluated):
    out = export_to("fp8-dynamic")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds codes"):
        evaluated(out)


def test_a_linear_that_computes_in_a_way_of_its_own_keeps_it(llama, text, export_to, monkeypatch):
    """DeepSeek V4's grouped projection: its weight is that of the codes, its input as it comes, and
    the result says so.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Negated(torch.nn.Linear):
        def forward(self, inputs):
            return -super().forward(inputs)

    build = LlamaMLP.__init__

    def init(self, config):
        build(self, config)
        self.down_proj.__class__ = Negated

    out = export_to("int8-dynamic")
    plain = evaluate(EvaluationOptions(llama, (out,), (str(text),), 32, 96, cache=False)).to_json()
    monkeypatch.setattr(LlamaMLP, "__init__", init)
    result = evaluate(EvaluationOptions(llama, (out,), (str(text),), 32, 96, cache=False)).to_json()
    (quant,) = result["quants"]
    assert (
        quant["weights_only_linears"] == [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]
        and quant["activations_quantized"] == "partial"
    )
    assert (
        result["base"]["perplexity"] != plain["base"]["perplexity"]
        and 0 < quant["kld"]["mean"] < 0.01
    )
