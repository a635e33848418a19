"""Weights quantized with data, from a recipe over calibration and export to an evaluation; and a
model with outliers that plain rounding ruins.
"""

import json
from dataclasses import replace

import pytest
import torch
from quantized_weights import kld, quantized, recipe_of, with_outliers
from safetensors.torch import load_file
from tiny_llama import make_llama
from tiny_models import make_model

from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CalibrationError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.verify import verify

SMOOTH = {"scheme": "int8-dynamic", "algorithms": ["smoothquant"]}
BEST = {"scheme": "int8-dynamic", "algorithms": ["smoothquant", "gptq"]}


@pytest.fixture
def options(llama, text, tmp_path):
    return CalibrationOptions(
        llama,
        tmp_path / "calib",
        (str(text),),
        recipe_of(BEST),
        num_samples=8,
        seq_len=64,
        batch_size=2,
    )


@pytest.mark.slow
def test_smoothing_restores_a_model_whose_channels_were_rescaled(
    llama, text, tmp_path, options, copy, export_to
):
    harmed = with_outliers(copy(llama))
    assert kld(llama, harmed, text) == 0.0
    unharmed_plain = kld(llama, export_to("int8-dynamic"), text)
    plain = kld(harmed, export_to("int8-dynamic", harmed, None, name="plain"), text)
    smoothed = kld(
        harmed, quantized(replace(options, model=harmed, recipe=recipe_of(SMOOTH))), text
    )
    assert plain > 20 * unharmed_plain
    assert smoothed < 1.5 * unharmed_plain


@pytest.mark.slow
def test_gptq_and_smoothing_lose_less_than_rounding(llama, text, options, export_to):
    plain = kld(llama, export_to("int8-dynamic"), text)
    assert kld(llama, quantized(options), text) < 0.9 * plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [
        "int8-dynamic",
        "fp8-dynamic",
        "fp8-static",
        "fp8-tensor",
        "fp8-block",
        "mxfp8",
        "int8-weight-only",
    ],
)
def test_codes_survive_export_bit_for_bit(scheme, options):
    output = quantized(
        replace(
            options,
            recipe=recipe_of({"scheme": scheme, "algorithms": ["smoothquant", "gptq"]}),
            num_samples=4,
        )
    )
    calibration = Calibration.open(options.output)
    exported, seen = Checkpoint.open(output), 0
    for name, info in calibration.weights.items():
        if name.endswith("_scale") or f"{name}_scale" not in calibration.weights:
            continue
        codes = load_file(info.path)[name]
        if scheme == "int8-weight-only":  # is stored packed: four codes, each + 128, to a word
            words = exported.read(name.replace(".weight", ".weight_packed"))
            stored = (words.view(torch.uint8).int() - 128).to(torch.int8)
        else:
            stored = exported.read(name)
        assert stored.dtype == codes.dtype
        assert torch.equal(stored.view(torch.uint8), codes.view(torch.uint8))
        seen += 1
    assert seen == 14
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(exported.read(norm), load_file(calibration.weights[norm].path)[norm])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-tensor", "fp8-block", "mxfp8"])
def test_all_algorithms_work_together(scheme, text, tmp_path, options):
    model = make_llama(tmp_path / "biased", attention_bias=True)
    names = [
        {"rotation": {"untie": True}},
        "smoothquant",
        "scale_search",
        "gptq",
        "bias_correction",
    ]
    output = quantized(
        replace(
            options,
            model=model,
            recipe=recipe_of({"scheme": scheme, "algorithms": names}),
            num_samples=4,
        )
    )
    found = verify(output, model)
    assert found.ok and found.quantized == 14
    # The limits of the formats: what eight bits with so coarse scales may cost on this model.
    assert (
        kld(model, output, text)
        < {"int8-dynamic": 0.002, "fp8-tensor": 0.02, "fp8-block": 0.02, "mxfp8": 0.03}[scheme]
    )


@pytest.mark.slow
def test_searched_scales_are_those_of_the_codes(options, export_to, llama):
    recipe = recipe_of({"scheme": "fp8-dynamic", "algorithms": ["scale_search"]})
    searched, plain = (
        Checkpoint.open(quantized(replace(options, recipe=recipe))),
        Checkpoint.open(export_to("fp8-dynamic")),
    )
    base, name = Checkpoint.open(llama), "model.layers.1.mlp.gate_proj"
    errors = []
    for checkpoint in (searched, plain):
        values = (
            checkpoint.read(f"{name}.weight").float()
            * checkpoint.read(f"{name}.weight_scale").float()
        )
        errors.append(float((values - base.read(f"{name}.weight").float()).square().sum()))
    assert errors[0] < 0.99 * errors[1]


@pytest.mark.slow
def test_one_enormous_token_does_not_decide_for_all_others(options, monkeypatch):
    """What writes to the residual stream counts an error by what the next norm divides it by; what
    reads after a norm counts all tokens alike.
    """
    seen = {}
    weigh = BlockRun.weigh_tokens

    def with_an_enormous_token(work):
        enormous = work._states.get(0).clone()
        enormous[:, 0] *= 1000
        work._states.put(0, enormous)
        weigh(work)
        for linear in work.schemes:
            seen[linear] = work.importance(linear, 0, enormous.shape[0] * enormous.shape[1])

    monkeypatch.setattr(BlockRun, "weigh_tokens", with_an_enormous_token)
    calibrate(replace(options, num_samples=2, seq_len=32))
    assert {linear for linear, importance in seen.items() if importance is not None} == {
        "self_attn.o_proj",
        "mlp.down_proj",
    }
    importance = seen["mlp.down_proj"].flatten()
    assert (importance[::32] < 1e-3 * importance.median()).all() and importance.min() > 0


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(options, tmp_path):
    class Killed(BaseException):
        pass

    def die(what: str, done: float, total: float) -> None:
        if done > 1:
            raise Killed

    killed = replace(options, output=tmp_path / "killed")
    with pytest.raises(Killed):
        calibrate(killed, die)
    calibrate(replace(killed, resume=True))
    calibrate(options)
    contents = [
        {file.name: file.read_bytes() for file in path.iterdir()}
        for path in (killed.output, options.output)
    ]
    assert contents[0] == contents[1] and "weights-00001.safetensors" in contents[0]


@pytest.mark.slow
def test_weights_that_are_not_what_was_written_are_refused(options):
    calibrate(options)
    path = options.output / "weights-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="it has changed since it was written"):
        Calibration.open(options.output)


@pytest.mark.slow
def test_threads_change_no_byte(options, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        calibrate(options)
        torch.set_num_threads(1)
        calibrate(replace(options, output=tmp_path / "one"))
    finally:
        torch.set_num_threads(threads)
    for file in options.output.iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()


@pytest.mark.slow
def test_export_refuses_a_recipe_whose_algorithms_were_not_run(llama, calib, options, tmp_path):
    with pytest.raises(
        CalibrationError, match="need data to quantize weights; first `quantkit.calibrate"
    ):
        plan_export(ExportOptions(llama, tmp_path / "x", recipe_of(BEST)))
    with pytest.raises(CalibrationError, match="holds statistics alone"):
        plan_export(ExportOptions(llama, tmp_path / "x", recipe_of(BEST), calib))
    calibrate(options)
    for other in (SMOOTH, {"scheme": "int8-dynamic"}):
        with pytest.raises(CalibrationError, match="made for another recipe"):
            plan_export(ExportOptions(llama, tmp_path / "x", recipe_of(other), options.output))


@pytest.mark.slow
def test_quantize_runs_a_recipe_with_algorithms_and_inspect_shows_what_was_done(
    llama, text, tmp_path, run, run_json
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: int8-dynamic\nalgorithms: [smoothquant, gptq]\n")
    done = run(
        "quantize",
        llama,
        "-o",
        tmp_path / "q",
        "--recipe",
        recipe,
        "--data",
        text,
        "--num-samples",
        4,
        "--seq-len",
        64,
    )
    assert done.exit_code == 0, done.stderr
    assert "smoothquant" in done.stderr and "gptq" in done.stderr
    described = run_json("inspect", tmp_path / "q-calibration")
    assert len(described["chosen"]["linears"]) == 14
    folds = {
        (fold["into"].rpartition(".")[2], len(fold["linears"]))
        for fold in described["chosen"]["folds"]
    }
    assert folds <= {
        ("input_layernorm", 3),
        ("post_attention_layernorm", 2),
        ("v_proj", 1),
        ("up_proj", 1),
    }
    shown = run("inspect", tmp_path / "q-calibration")
    assert (
        shown.exit_code == 0
        and "scales folded by smoothquant" in shown.stdout
        and "quantized by" in shown.stdout
    )
    again = run(
        "quantize",
        llama,
        "-o",
        tmp_path / "q2",
        "--scheme",
        "int8-dynamic",
        "--calibration",
        tmp_path / "q-calibration",
    )
    assert again.exit_code == 1 and "made for another recipe" in again.stderr
    manifest = json.loads((tmp_path / "q" / "quantkit.json").read_text())
    assert "model.layers.0.self_attn.q_proj.weight" in manifest["changed"]


def test_grouped_heads_and_biases_are_folded(text, tmp_path, options):
    model = make_llama(
        tmp_path / "gqa", num_attention_heads=4, num_key_value_heads=2, attention_bias=True
    )
    output = quantized(
        replace(
            options,
            model=model,
            recipe=recipe_of(SMOOTH | {"algorithms": [{"smoothquant": {"strength": 0.5}}]}),
        )
    )
    folds = Calibration.open(options.output).description["chosen"]["folds"]
    assert [fold["into"].rpartition(".")[2] for fold in folds] == [
        "input_layernorm",
        "post_attention_layernorm",
        "v_proj",
        "up_proj",
    ] * 2
    assert kld(model, output, text) < 0.01


@pytest.mark.slow
def test_norms_that_add_one_are_folded_as_such(tmp_path, text, options):
    from tiny_llama import make_tokenizer

    make_model(tmp_path / "gemma", "gemma2", vocab_size=384)
    make_tokenizer(tmp_path / "gemma")
    smoothing = recipe_of(SMOOTH | {"algorithms": [{"smoothquant": {"strength": 0.5}}]})
    output = quantized(replace(options, model=tmp_path / "gemma", recipe=smoothing, seq_len=32))
    folds = Calibration.open(options.output).description["chosen"]["folds"]
    assert {"model.layers.0.input_layernorm", "model.layers.0.pre_feedforward_layernorm"} <= {
        fold["into"] for fold in folds
    }
    assert kld(tmp_path / "gemma", output, text) < 0.02


def test_what_cannot_be_folded_is_left_and_said(tmp_path, text, options):
    """A router reads what the norm returns, and no scale reaches the stacked experts."""
    from tiny_llama import make_tokenizer

    make_model(tmp_path / "moe", "qwen3_moe", vocab_size=384)
    make_tokenizer(tmp_path / "moe")
    smoothing = recipe_of(SMOOTH | {"algorithms": [{"smoothquant": {"strength": 0.5}}]})
    quantized(replace(options, model=tmp_path / "moe", recipe=smoothing, seq_len=32))
    chosen = Calibration.open(options.output).description["chosen"]
    assert not any("post_attention_layernorm" in fold["into"] for fold in chosen["folds"])
    experts = [entry for entry in chosen["linears"] if ".experts." in entry["name"]]
    assert (
        len(experts) == 2 * 4 * 3
        and {entry["algorithm"] for entry in experts} == {"rtn"}
        and experts[0]["reason"]
    )


def test_a_norm_of_each_head_is_not_taken_for_one_of_the_whole_input(tmp_path, text, options):
    from tiny_llama import make_tokenizer

    make_model(tmp_path / "next", "qwen3_next", vocab_size=384)
    make_tokenizer(tmp_path / "next")
    quantized(replace(options, model=tmp_path / "next", seq_len=32, num_samples=2))
    chosen = Calibration.open(options.output).description["chosen"]
    assert not any("linear_attn.norm" in fold["into"] for fold in chosen["folds"])
    assert "model.layers.0.linear_attn.out_proj" in {entry["name"] for entry in chosen["linears"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"files": [["a"]]},
        {"files": ["nowhere.safetensors"]},
        {"folds": [{"into": "norm"}]},
        {"refused": [{}]},
        {"linears": [{"name": "a", "algorithm": "gptq", "plain_error": "0"}]},
        {"linears": [{"name": "a", "algorithm": "rtn", "bias_corrected": "yes"}]},
        {"rotations": [{"block": "a", "norms": [], "writers": [3], "heads": [], "change": 0.0}]},
        {"rotations": [{"block": "a", "norms": [], "writers": [], "heads": [], "change": None}]},
        {"untied": {"lm_head.weight": 3}},
        {"untied": []},
        {"linears": 3},
    ],
    ids=str,
)
def test_a_damaged_description_is_refused_in_a_sentence(change, options):
    calibrate(options)
    path = options.output / "calibration.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"chosen": description["chosen"] | change}))
    with pytest.raises(CalibrationError, match="is damaged"):
        Calibration.open(options.output)
