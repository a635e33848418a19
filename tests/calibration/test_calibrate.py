import json
import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import make_llama, make_text, make_tokenizer
from tiny_models import HANDING_ON, make_model
from transformers import AutoModelForCausalLM

import quantkit.models.saved_states
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.describe import MIN_EXPERT_TOKENS, is_unsettled
from quantkit.calibration.hooks import require_linears
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.data.sampling import calibration_windows
from quantkit.data.tokenizer import load_tokenizer
from quantkit.errors import CalibrationError, CheckpointError, OutputError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.models.threads import one_thread
from quantkit.ops.fallback import histogram_edges
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme


@pytest.fixture
def options(llama, text, tmp_path):
    return CalibrationOptions(
        llama, tmp_path / "calib", (str(text),), num_samples=5, seq_len=32, batch_size=2
    )


def test_statistics_are_those_of_an_ordinary_forward(llama, text, options):
    calibrate(options)
    calibration = Calibration.open(options.output)
    windows = calibration_windows([str(text)], load_tokenizer(llama), 5, 32, 0)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    # In the same batches and on one thread: a CPU's matrix product may round otherwise for others.
    with one_thread(), torch.inference_mode():
        for start in (0, 2, 4):
            model(torch.tensor([window.tokens for window in windows.windows[start : start + 2]]))
    inputs = torch.cat([batch.reshape(-1, 32, batch.shape[-1]) for batch in seen]).float()
    observer = calibration.observer("model.layers.1.mlp.down_proj")
    # Three batches, two windows in each but the last; the quarters are of batches.
    assert observer.counts.tolist() == [5 * 31, 5, 0, 0]
    assert torch.equal(observer.channel_amax, inputs[:, 1:].abs().amax((0, 1)))
    assert observer.first_amax == inputs[:, 0].abs().max()
    torch.testing.assert_close(
        observer.channel_sum_of_squares,
        inputs[:, 1:].double().square().sum((0, 1)),
        rtol=1e-6,
        atol=0,
    )
    assert observer.histogram.sum() == inputs[:, 1:].numel()
    top = int(observer.histogram.nonzero().max())
    assert histogram_edges()[top] <= observer.amax < histogram_edges()[top + 1]


def test_linears_that_share_an_input_are_observed_once(calib):
    entries = json.loads((calib / "calibration.json").read_text())["inputs"]
    assert [len(entry["linears"]) for entry in entries] == [3, 1, 2, 1] * 2
    assert entries[0]["linears"] == [
        f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")
    ]


def test_keys_are_measured_after_rotary_embedding(llama, text, options):
    calibrate(replace(options, num_samples=1, batch_size=1))
    entry = Calibration.open(options.output).kv_amax["model.layers.0.self_attn"]
    window = calibration_windows([str(text)], load_tokenizer(llama), 1, 32, 0).windows[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    with torch.inference_mode():
        cache = model(torch.tensor([window.tokens]), use_cache=True).past_key_values
    assert entry == (
        cache.layers[0].keys.abs().max().item(),
        cache.layers[0].values.abs().max().item(),
    )


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_same_seed_gives_the_same_bytes_and_another_gives_others(options):
    calibrate(options)
    first = contents(options.output)
    calibrate(replace(options, overwrite=True))
    assert contents(options.output) == first
    calibrate(replace(options, overwrite=True, seed=1))
    assert contents(options.output)["block-00000.safetensors"] != first["block-00000.safetensors"]


def test_neither_threads_nor_files_of_hidden_states_change_a_byte(options, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        calibrate(options)
        torch.set_num_threads(1)
        calibrate(replace(options, output=tmp_path / "one"))
    finally:
        torch.set_num_threads(threads)
    calibrate(replace(options, output=tmp_path / "file", memory=0))
    assert contents(options.output) == contents(tmp_path / "one") == contents(tmp_path / "file")


class Killed(BaseException):
    pass


def die_in_block(number: int):
    """Progress that ends the run inside a block."""

    def progress(what: str, done: float, total: float) -> None:
        if done > number:
            raise Killed

    return progress


@pytest.fixture
def killed(options, tmp_path):
    """Options of a run that was killed in its second block."""
    options = replace(options, output=tmp_path / "killed")
    with pytest.raises(Killed):
        calibrate(options, die_in_block(1))
    return options


def test_killed_calibration_resumes_to_the_same_bytes(options, killed):
    assert not killed.output.exists()
    with pytest.raises(OutputError, match="`resume=True`"):
        calibrate(killed)
    told = []
    calibrate(replace(killed, resume=True), lambda what, done, total: told.append(what))
    # run for its hidden states, not measured
    assert any("again, block 1 of 2" in text for text in told)
    calibrate(options)
    assert contents(killed.output) == contents(options.output)


@pytest.mark.slow
def test_a_calibration_whose_blocks_hand_on_more_than_hidden_states_resumes_to_the_same_bytes(
    options, tmp_path, monkeypatch
):
    """Side outputs aren't saved, so blocks that are done run again, though hidden states after
    them are there.
    """
    vocabulary = make_tokenizer(tmp_path / "zaya")
    make_model(tmp_path / "zaya", "zaya", vocab_size=vocabulary, **HANDING_ON["zaya"])
    options = replace(options, model=tmp_path / "zaya", output=tmp_path / "killed")
    monkeypatch.setattr(quantkit.models.saved_states, "SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(Killed):
        calibrate(options, die_in_block(2))
    assert list((tmp_path / "killed.partial").glob("hidden-states-*"))
    calibrate(replace(options, resume=True))
    calibrate(replace(options, output=tmp_path / "undisturbed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "a different seed, different windows"),
        ({"batch_size": 1}, "a different batch size"),
        ({"num_samples": 4}, "a different `num_samples`, different windows"),
        ({"seq_len": 48}, "a different `seq_len`, different windows"),
        ({"recipe": Recipe(QuantScheme.parse("fp8-static"))}, "a different recipe"),
        ({"all_experts": True}, "a different choice of experts"),
    ],
)
def test_other_work_is_not_continued_and_the_refusal_says_what_differs(killed, change, named):
    with pytest.raises(OutputError, match=f"with {named};"):
        calibrate(replace(killed, resume=True, **change))


def test_changed_text_or_model_is_not_continued(options, killed, copy, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(make_text(6000, seed=8))
    with pytest.raises(OutputError, match="with different data, different windows;"):
        calibrate(replace(killed, resume=True, data=(str(other),)))
    model = make_llama(tmp_path / "another", seed=4)
    with pytest.raises(OutputError, match="with different model files;"):
        calibrate(replace(killed, resume=True, model=model))


def test_finished_calibration_is_not_made_again(options):
    calibrate(options)
    before = contents(options.output)
    summary = calibrate(replace(options, resume=True))
    assert summary.was_finished and contents(options.output) == before
    with pytest.raises(OutputError, match="different seed"):
        calibrate(replace(options, resume=True, seed=9))
    (options.output / "block-00001.safetensors").write_bytes(b"damaged")
    with pytest.raises(OutputError, match="block-00001.safetensors has changed"):
        calibrate(replace(options, resume=True))


@pytest.mark.slow
def test_fewer_windows_than_asked_for_are_used_and_told(options, run, tmp_path):
    summary = calibrate(replace(options, num_samples=10_000))
    assert summary.windows < summary.requested == 10_000
    result = run(
        "calibrate",
        options.model,
        "-o",
        tmp_path / "more",
        "--data",
        options.data[0],
        "--seq-len",
        64,
        "--num-samples",
        9999,
    )
    assert result.exit_code == 0 and "fewer than the 9999" in result.stderr


def test_bundled_text_serves_without_data(llama, tmp_path):
    summary = calibrate(CalibrationOptions(llama, tmp_path / "c", num_samples=2, seq_len=64))
    assert summary.windows == 2


def test_one_window_is_not_called_windows(run, llama, text, tmp_path):
    calibrated = run(
        "calibrate",
        llama,
        "-o",
        tmp_path / "c",
        "--data",
        text,
        "--num-samples",
        1,
        "--seq-len",
        32,
    )
    assert "from 1 window of 32 tokens" in calibrated.stderr
    assert "in 1 window of 32" in run("inspect", tmp_path / "c").stdout
    assert (
        "in 1 window of 32"
        in run("eval", llama, "--data", text, "--seq-len", 32, "--max-tokens", 32).stdout
    )


def test_activation_that_overflows_stops_the_run_and_is_named(tmp_path, text):
    model = make_llama(tmp_path / "m")
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="model.layers.0.mlp.down_proj"):
        calibrate(
            CalibrationOptions(model, tmp_path / "c", (str(text),), num_samples=1, seq_len=16)
        )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_itself(value, llama, copy, text, tmp_path):
    """Not the next Linear, whose input it ruins."""
    from safetensors.torch import load_file, save_file

    model = copy(llama)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match="the weight model.layers.1.mlp.up_proj.weight of .* holds NaN or infinity",
    ):
        calibrate(
            CalibrationOptions(model, tmp_path / "c", (str(text),), num_samples=1, seq_len=16)
        )
    assert not (tmp_path / "c").exists()


def test_a_model_without_linears_is_refused_by_what_it_is_made_of():
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.Bilinear(2, 2, 2), torch.nn.Embedding(4, 2)])}
    )
    with pytest.raises(CheckpointError, match="are made of Embedding and hold no torch.nn.Linear"):
        require_linears(SimpleNamespace(model=model, blocks_name="layers", where="model"))


def test_calibration_of_another_model_is_refused(calib, tmp_path):
    other = Checkpoint.open(make_llama(tmp_path / "other", seed=1))
    with pytest.raises(CalibrationError, match="another model"):
        Calibration.open(calib).require_same_model(other, other.fingerprint())


def test_damaged_calibration_is_refused(calib, copy):
    damaged = copy(calib)
    (damaged / "calibration.json").write_text('{"schema_version": 1}')
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.open(damaged)


def test_windows_are_mixed_evenly_from_several_files(llama, text, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text(make_text(3000, seed=5))
    calibrate(
        CalibrationOptions(
            llama, tmp_path / "c", (str(text), str(second)), num_samples=4, seq_len=32
        )
    )
    described = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert described["windows"] == 4 and described["data"]["sources"] == [str(text), str(second)]


# ---- Was there enough text?


def test_growth_and_held_out_share_are_those_of_the_quarters(llama, text, options):
    calibrate(replace(options, num_samples=8, batch_size=1))
    windows = calibration_windows([str(text)], load_tokenizer(llama), 8, 32, 0)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype="auto").eval()
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0][0, 1:].float().abs())
    )
    with one_thread(), torch.inference_mode():
        for window in windows.windows:
            model(torch.tensor([window.tokens]))
    quarters = [torch.stack(seen[start : start + 2]) for start in (0, 2, 4, 6)]
    growth = [max(float(quarter.max()) for quarter in quarters[: count + 1]) for count in range(4)]
    described = json.loads((options.output / "calibration.json").read_text())["inputs"]
    entry = next(entry for entry in described if entry["name"] == "model.layers.1.mlp.down_proj")
    assert entry["amax_quarters"] == growth and entry["amax"] == growth[-1]
    assert entry["held_out_values"] == quarters[3].numel()
    assert entry["held_out_above"] == int((quarters[3] > growth[2]).sum())


@pytest.mark.parametrize(
    ("quarters", "above", "unsettled"),
    [
        ((1.0, 2.0, 3.0, 3.0), 0, False),
        ((1.0, 2.0, 3.0, 3.3), 1, False),
        ((1.0, 2.0, 3.0, 4.0), 1, True),
        ((1.0, 2.0, 3.0, 3.1), 200, True),
    ],
)
def test_inputs_that_still_grow_are_unsettled(quarters, above, unsettled):
    entry = {
        "amax_quarters": list(quarters),
        "held_out_values": 1_000_000,
        "held_out_above": above,
        "estimated": False,
    }
    assert is_unsettled(entry) == unsettled
    assert not is_unsettled(entry | {"estimated": True})


def test_unsettled_inputs_are_warned_of_and_shown(llama, text, tmp_path, run, monkeypatch):
    monkeypatch.setattr("quantkit.calibration.describe.UNSETTLED_GROWTH", -1.0)
    result = run(
        "calibrate",
        llama,
        "-o",
        tmp_path / "c",
        "--data",
        text,
        "--num-samples",
        8,
        "--seq-len",
        32,
    )
    assert "8 of 8 inputs still grew" in result.stderr and "raise --num-samples" in result.stderr
    rest = run(
        "calibrate",
        llama,
        "-o",
        tmp_path / "it's all",
        "--data",
        text,
        "--num-samples",
        5000,
        "--seq-len",
        64,
    )
    assert (
        "inputs still grew" in rest.stderr
        and "give it as --data" in rest.stderr
        and "raise --num-samples" not in rest.stderr
    )
    (hint,) = re.findall("`(quantkit inspect .*)` lists these inputs", rest.stderr)
    assert shlex.split(hint) == ["quantkit", "inspect", str(tmp_path / "it's all")]
    shown = run("inspect", tmp_path / "c")
    assert (
        shown.exit_code == 0
        and "after each quarter" in shown.stdout
        and "held-out values above, ppm" in shown.stdout
    )


# ---- Experts


@pytest.fixture
def mixtral(tmp_path):
    """Four experts, of which the router never chooses the last."""
    from safetensors.torch import load_file, save_file
    from transformers import MixtralConfig, MixtralForCausalLM

    directory = tmp_path / "mixtral"
    directory.mkdir()
    vocabulary = make_tokenizer(directory)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(
        vocab_size=vocabulary,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.08,
        **sizes,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(2):
        gate = next(
            tensor
            for name, tensor in tensors.items()
            if f"layers.{layer}." in name and name.endswith(".gate.weight")
        )
        gate[3] = -1
        # Hidden states sum to something positive, so the last expert's logit is far below the
        # others.
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"].fill_(1)
    tensors["model.embed_tokens.weight"] += 0.04
    for name in tensors:
        if name.endswith(("o_proj.weight", "w2.weight")):
            tensors[name] *= 0.01
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def expert_inputs(path, leaf: str, layer: int = 1) -> dict[int, dict]:
    described = json.loads((path / "calibration.json").read_text())["inputs"]
    wanted = {
        f"model.layers.{layer}.block_sparse_moe.experts.{number}.{leaf}": number
        for number in range(4)
    }
    return {
        wanted[linear]: entry
        for entry in described
        for linear in entry["linears"]
        if linear in wanted
    }


def test_an_expert_without_tokens_gets_a_scale_from_its_weights_and_the_others(
    mixtral, text, tmp_path, run
):
    result = run(
        "calibrate",
        mixtral,
        "-o",
        tmp_path / "c",
        "--data",
        text,
        "--num-samples",
        8,
        "--seq-len",
        64,
    )
    assert (
        result.exit_code == 0
        and "2 experts saw too few tokens" in result.stderr
        and "--all-experts" in result.stderr
    )
    first, second = json.loads((tmp_path / "c" / "calibration.json").read_text())["experts"]
    assert second["module"] == "model.layers.1.block_sparse_moe.experts" and second[
        "starved"
    ] == first["starved"] == [3]
    assert second["tokens"][3] == 0 and sum(second["tokens"]) == 2 * 8 * 64
    for leaf in ("w1", "w2"):
        entries = expert_inputs(tmp_path / "c", leaf)
        others = [entries[number]["amax"] for number in range(3)]
        assert entries[3]["estimated"] and not entries[0]["estimated"]
        assert (
            entries[3]["amax"] == max(others)
            if leaf == "w1"
            else 0.3 * max(others) < entries[3]["amax"] < 3 * max(others)
        )
    shown = run("inspect", tmp_path / "c")
    assert "(estimated)" in shown.stdout and "tokens per expert" in shown.stdout
    out = tmp_path / "out"
    export(
        plan_export(
            ExportOptions(mixtral, out, Recipe(QuantScheme.parse("fp8-static")), tmp_path / "c")
        )
    )
    checkpoint = Checkpoint.open(out)
    for leaf in ("w1", "w2", "w3"):
        scale = checkpoint.read(f"model.layers.1.block_sparse_moe.experts.3.{leaf}.input_scale")
        assert torch.isfinite(scale).all() and (scale > 1e-6).all()


def test_an_estimate_follows_the_experts_own_weights(mixtral, text, tmp_path):
    """Ten times the gate's and up's weights give about a hundred times the second input, where the
    activation is linear enough.
    """
    from safetensors.torch import load_file, save_file

    options = CalibrationOptions(mixtral, tmp_path / "c", (str(text),), num_samples=4, seq_len=64)
    calibrate(options)
    tensors = load_file(mixtral / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"] *= 8
    save_file(tensors, mixtral / "model.safetensors", {"format": "pt"})
    calibrate(replace(options, output=tmp_path / "larger"))
    before, after = (expert_inputs(tmp_path / name, "w2")[3]["amax"] for name in ("c", "larger"))
    assert after == pytest.approx(8 * before, rel=1e-3)
    assert (
        expert_inputs(tmp_path / "larger", "w1")[3]["amax"]
        == expert_inputs(tmp_path / "c", "w1")[3]["amax"]
    )


def test_all_experts_see_every_token_when_asked(mixtral, text, tmp_path):
    calibrate(
        CalibrationOptions(
            mixtral, tmp_path / "c", (str(text),), num_samples=4, seq_len=64, all_experts=True
        )
    )
    assert {
        entry["tokens"]
        for leaf in ("w1", "w2")
        for entry in expert_inputs(tmp_path / "c", leaf).values()
    } == {4 * 64}
    described = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert [entry["starved"] for entry in described["experts"]] == [[], []] and described[
        "experts"
    ][0]["tokens"][3] == 0
    # The router's choice alone goes on, so what later blocks see is the same.
    calibrate(CalibrationOptions(mixtral, tmp_path / "d", (str(text),), num_samples=4, seq_len=64))
    ours, theirs = (
        json.loads((tmp_path / name / "calibration.json").read_text())["kv"] for name in "cd"
    )
    assert ours == theirs
    assert MIN_EXPERT_TOKENS <= 4 * 64


@pytest.mark.parametrize(
    ("kind", "changes", "warning", "ignored"),
    [
        (
            "gpt_oss",
            {},
            "export can't quantize 8 parameters (model.layers.0.mlp.experts.",
            "model.layers.*.mlp.experts.*",
        ),
        ("mamba", {}, "", ""),  # what no token reaches is skipped by rule
        ("qwen3_moe", {}, "", ""),  # one tensor in transformers, but one by one on disk
    ],
)
def test_what_export_will_not_take_is_told_with_the_pattern_that_leaves_it(
    kind, changes, warning, ignored, text, tmp_path, run
):
    from tiny_models import make_model

    make_model(tmp_path / kind, kind, vocab_size=384, **changes)
    make_tokenizer(tmp_path / kind)
    calibrated = run(
        "calibrate",
        tmp_path / kind,
        "-o",
        tmp_path / "c",
        "--data",
        text,
        "--num-samples",
        2,
        "--seq-len",
        32,
    )
    assert calibrated.exit_code == 0
    assert warning in calibrated.stderr and ("Warning: export" in calibrated.stderr) == (
        kind == "gpt_oss"
    )
    (following,) = [
        line for line in calibrated.stderr.splitlines() if line.startswith("Next: quantkit ")
    ]
    assert (f"--ignore '{ignored}'" in following) == ("--ignore" in following) == bool(ignored)
    command = [
        str(tmp_path / "out") if word == "OUT" else word for word in shlex.split(following)[2:]
    ]
    exported = run(*command)
    assert exported.exit_code == 0, exported.stderr
    refused = run(*[word for word in command if word not in ("--ignore", ignored)], "--overwrite")
    assert (refused.exit_code == 1) == bool(ignored)


# ---- What is done with it


def test_observers_are_chosen_at_export(llama, calib, tmp_path, run):
    scales = {}
    for observer in ("absmax", "percentile:99", "mse"):
        out = tmp_path / observer.replace(":", "-")
        result = run(
            "export",
            llama,
            "-o",
            out,
            "--scheme",
            "int8-static",
            "--calibration",
            calib,
            "--observer",
            observer,
        )
        assert result.exit_code == 0, result.stderr
        scales[observer] = float(
            Checkpoint.open(out).read("model.layers.1.mlp.down_proj.input_scale")
        )
    assert scales["percentile:99"] < scales["mse"] < scales["absmax"]
    refused = run(
        "export",
        llama,
        "-o",
        tmp_path / "x",
        "--scheme",
        "int8-static",
        "--calibration",
        calib,
        "--observer",
        "entropy",
    )
    assert refused.exit_code == 1 and "absmax, percentile, mse" in refused.stderr
    warned = run(
        "export",
        llama,
        "-o",
        tmp_path / "y",
        "--scheme",
        "fp8-static",
        "--calibration",
        calib,
        "--observer",
        "percentile",
    )
    assert warned.exit_code == 0 and "that FP8 could represent" in warned.stderr


@pytest.mark.slow
def test_eval_warns_of_text_that_was_calibrated_on(llama, text, tmp_path, run, run_json):
    calibrate(CalibrationOptions(llama, tmp_path / "c", (str(text),), num_samples=200, seq_len=64))
    export(
        plan_export(
            ExportOptions(
                llama, tmp_path / "q", Recipe(QuantScheme.parse("fp8-static")), tmp_path / "c"
            )
        )
    )
    result = run(
        "eval", llama, tmp_path / "q", "--data", text, "--seq-len", 48, "--max-tokens", 960
    )
    assert result.exit_code == 0 and "was calibrated on text of" in result.stderr
    fresh = tmp_path / "fresh.txt"
    fresh.write_text(make_text(800, seed=77))
    (quant,) = run_json("eval", llama, tmp_path / "q", "--data", fresh, "--seq-len", 48)["quants"]
    assert quant["windows_calibrated_on"] == 0


@pytest.mark.slow
def test_eval_warns_of_the_same_file_whatever_the_windows_were(llama, text, tmp_path, run):
    """Windows of 16 tokens leave no piece of 32 to be known by, so the file itself is."""
    other = tmp_path / "other.txt"
    other.write_text(make_text(800, seed=78))
    calibrate(
        CalibrationOptions(
            llama, tmp_path / "c", (str(text), str(other)), num_samples=4, seq_len=16
        )
    )
    export(
        plan_export(
            ExportOptions(
                llama, tmp_path / "q", Recipe(QuantScheme.parse("fp8-static")), tmp_path / "c"
            )
        )
    )
    same = tmp_path / "same.txt"
    same.write_bytes(text.read_bytes())
    for source, is_known in (
        (text, True),
        (other, True),
        (same, True),
        (tmp_path / "new.txt", False),
    ):
        if not is_known:
            source.write_text(make_text(800, seed=79))
        result = run(
            "eval", llama, tmp_path / "q", "--data", source, "--seq-len", 48, "--max-tokens", 480
        )
        assert (
            result.exit_code == 0
            and (f"was calibrated on {source}; evaluate it" in result.stderr) == is_known
        ), result.stderr
    manifest = tmp_path / "q" / "quantkit.json"
    for broken in (5, {"source_sha256": [[]], "token_pieces": ""}, {"source_sha256": 1}):
        manifest.write_text(
            json.dumps(json.loads(manifest.read_text()) | {"calibrated_on": broken})
        )
        result = run(
            "eval", llama, tmp_path / "q", "--data", text, "--seq-len", 48, "--max-tokens", 480
        )
        assert result.exit_code == 1 and "quantkit.json is damaged (calibrated_on)" in result.stderr
