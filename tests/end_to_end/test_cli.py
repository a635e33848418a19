"""The command line as its users meet it: what it prints, what it refuses, and its exit codes."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama

from quantkit.cli.main import main
from quantkit.ops import native

COMMANDS = sorted(main.commands)


def refusal(result, *words: str) -> str:
    """The one line of a refusal: exit 1, nothing on stdout, every word in it."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def test_help_needs_no_torch_and_comes_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "quantkit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy", "rich", "yaml"} & imported


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_common_options(command, run):
    for flag in ("-h", "--help"):
        result = run(command, flag)
        assert result.exit_code == 0
        for option in ("--quiet", "--verbose", "--json"):
            assert option in result.stdout


def test_version_and_module_entry():
    from quantkit import __version__

    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in done.stdout


def test_the_three_walks_end_to_end(run, run_json, llama, text, tmp_path):
    calib, out, result = tmp_path / "calib", tmp_path / "out", tmp_path / "result.json"
    assert (
        run(
            "calibrate", llama, "-o", calib, "--data", text, "--num-samples", 4, "--seq-len", 64
        ).exit_code
        == 0
    )
    assert (
        run("export", llama, "-o", out, "--scheme", "FP8_STATIC", "--calibration", calib).exit_code
        == 0
    )
    done = run(
        "eval",
        llama,
        out,
        "--data",
        text,
        "--seq-len",
        64,
        "--max-tokens",
        640,
        "-o",
        result,
        "--markdown",
        tmp_path / "card.md",
        "--html",
        tmp_path / "r.html",
    )
    assert done.exit_code == 0, done.output
    assert "fp8-static" in done.stdout and "perplexity" in done.stdout
    stored = json.loads(result.read_text())
    assert stored["quants"][0]["scheme"] == "fp8-static" and stored["windows"] == 10
    assert "| fp8-static |" in (tmp_path / "card.md").read_text()
    page = (tmp_path / "r.html").read_text()
    assert "<svg" in page and "fp8-static" in page and "src=" not in page
    assert run_json("inspect", out)["linears_quantized"] == 14
    assert run_json("inspect", calib)["kind"] == "calibration"


def test_quantize_calibrates_exports_verifies_and_names_the_next_command(
    run, llama, text, tmp_path
):
    result = run(
        "quantize",
        llama,
        "-o",
        tmp_path / "out",
        "--scheme",
        "int8-static",
        "--data",
        text,
        "--seq-len",
        32,
        "--num-samples",
        3,
    )
    assert result.exit_code == 0, result.output
    assert "no faults" in result.stderr
    assert f"quantkit eval {llama} {tmp_path / 'out'}" in result.stderr
    assert (tmp_path / "out-calibration" / "calibration.json").is_file()
    assert "model.layers.0.mlp.up_proj.input_scale" in load_file(
        tmp_path / "out" / "model.safetensors"
    )


def test_quantize_without_need_makes_no_calibration(run, llama, tmp_path):
    assert run("quantize", llama, "-o", tmp_path / "out", "--scheme", "fp8-dynamic").exit_code == 0
    assert not (tmp_path / "out-calibration").exists()


def test_stdout_is_data_and_stderr_the_rest(run, llama, text):
    result = run("eval", llama, "--data", text, "--seq-len", 64, "--max-tokens", 128, "--json")
    assert json.loads(result.stdout)["quants"] == []
    quiet = run("eval", llama, "--data", text, "--seq-len", 64, "--max-tokens", 128, "--json", "-q")
    assert quiet.stderr == ""


def test_schemes_lists_nine_with_runtimes(run, run_json):
    rows = run_json("schemes")
    assert len(rows) == 9 and all(
        set(row["runtimes"]) == {"vllm", "sglang", "tensorrt-llm", "transformers"} for row in rows
    )
    assert "mxfp8" in run("schemes").stdout


def test_doctor_finds_nothing_broken_here(run_json):
    examination = run_json("doctor")
    assert examination["ok"] and {
        "torch",
        "FP8 and INT8 rounding",
        "CPU kernels",
        "CUDA kernels",
    } <= {check["name"] for check in examination["checks"]}


def test_doctor_exits_with_1_when_something_is_broken(run, monkeypatch):
    monkeypatch.setattr("quantkit.cli.doctor.REQUIRED", {"torch": (99,)})
    refusal_line = run("doctor", "--json")
    assert refusal_line.exit_code == 1 and "needs 99" in refusal_line.stderr


# What is refused, in one sentence and with nothing written.


@pytest.fixture
def untouched(tmp_path):
    """Asserts that a refused command leaves the directory as it was."""
    before = sorted(path.name for path in tmp_path.iterdir())
    yield tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_such_path(run, untouched, text):
    refusal(run("calibrate", "./gone", "-o", untouched / "c"), "no directory")
    refusal(
        run("export", "./gone", "-o", untouched / "o", "--scheme", "fp8-dynamic"), "no directory"
    )
    refusal(run("eval", "./gone", "--data", text), "no directory")
    refusal(run("verify", "./gone"), "no directory")
    refusal(run("inspect", "./gone"), "nothing at")


def test_pickle_only_model_with_the_command_that_converts_it(run, llama, copy, tmp_path):
    model = copy(llama, "pickle")
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    refusal(
        run("export", model, "-o", tmp_path / "o", "--scheme", "fp8-dynamic"),
        "pickle",
        "save_pretrained",
    )
    (model / "pytorch_model.bin").unlink()
    refusal(
        run("export", model, "-o", tmp_path / "o", "--scheme", "fp8-dynamic"), "no *.safetensors"
    )
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


def test_no_tokenizer_where_one_is_needed(run, llama, copy, text, tmp_path):
    model = copy(llama, "mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    refusal(run("calibrate", model, "-o", tmp_path / "c"), "no tokenizer")
    refusal(run("eval", model, "--data", text), "no tokenizer")
    assert run("export", model, "-o", tmp_path / "o", "--scheme", "fp8-dynamic").exit_code == 0
    assert not (tmp_path / "c.partial").exists()


def test_text_shorter_than_one_window(run, llama, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    refusal(run("eval", llama, "--data", short, "--seq-len", 128), "less than one window of 128")
    refusal(run("calibrate", llama, "-o", tmp_path / "c", "--data", short), "less than one window")
    assert not (tmp_path / "c.partial").exists()


def test_seq_len_beyond_the_models_positions(run, llama, text):
    refusal(run("eval", llama, "--data", text, "--seq-len", 4096), "256")


def test_missing_and_unreadable_data(run, llama, untouched):
    refusal(run("eval", llama, "--data", "gone.txt"), "no data file gone.txt")


def test_unknown_scheme_with_a_suggestion(run, llama, untouched):
    refusal(
        run("export", llama, "-o", untouched / "o", "--scheme", "fp8-dinamic"),
        "did you mean 'fp8-dynamic'",
    )


@pytest.mark.parametrize("option", ["--ignore", "layers"])
def test_pattern_that_matches_nothing(option, run, llama, tmp_path):
    if option == "--ignore":
        result = run(
            "export",
            llama,
            "-o",
            tmp_path / "o",
            "--scheme",
            "fp8-dynamic",
            "--ignore",
            "re:.*dwon_proj",
        )
    else:
        (tmp_path / "r.yaml").write_text(
            'scheme: fp8-dynamic\nlayers: {"re:.*dwon_proj": int8-dynamic}\n'
        )
        result = run("export", llama, "-o", tmp_path / "o", "--recipe", tmp_path / "r.yaml")
    refusal(result, "re:.*dwon_proj", "matches no module")
    assert not (tmp_path / "o").exists()


def test_static_scheme_without_a_calibration(run, llama, untouched):
    refusal(
        run("export", llama, "-o", untouched / "o", "--scheme", "fp8-static"), "quantkit calibrate"
    )
    refusal(
        run("export", llama, "-o", untouched / "o", "--scheme", "fp8-dynamic", "--kv-cache", "fp8"),
        "KV cache",
        "calibrate",
    )


def test_calibration_of_another_model_or_recipe(run, llama, calib, text, tmp_path):
    other = make_llama(tmp_path / "other", seed=3)
    refusal(
        run(
            "export", other, "-o", tmp_path / "o", "--scheme", "fp8-static", "--calibration", calib
        ),
        "another model",
    )
    (tmp_path / "a.yaml").write_text("scheme: fp8-static\n")
    (tmp_path / "b.yaml").write_text("scheme: int8-static\n")
    assert (
        run(
            "calibrate",
            llama,
            "-o",
            tmp_path / "c",
            "--data",
            text,
            "--recipe",
            tmp_path / "a.yaml",
            "--seq-len",
            32,
            "--num-samples",
            2,
        ).exit_code
        == 0
    )
    refusal(
        run(
            "export",
            llama,
            "-o",
            tmp_path / "o",
            "--recipe",
            tmp_path / "b.yaml",
            "--calibration",
            tmp_path / "c",
        ),
        "another recipe",
    )
    assert (
        run(
            "export",
            llama,
            "-o",
            tmp_path / "o",
            "--recipe",
            tmp_path / "a.yaml",
            "--calibration",
            tmp_path / "c",
        ).exit_code
        == 0
    )


def test_output_that_exists_and_is_not_empty(run, llama, tmp_path):
    (tmp_path / "o").mkdir()
    assert run("export", llama, "-o", tmp_path / "o", "--scheme", "fp8-dynamic").exit_code == 0
    refusal(
        run("export", llama, "-o", tmp_path / "o", "--scheme", "int8-dynamic"),
        "not empty",
        "--overwrite",
    )
    assert (
        run(
            "export", llama, "-o", tmp_path / "o", "--scheme", "int8-dynamic", "--overwrite"
        ).exit_code
        == 0
    )


def test_model_itself_is_never_overwritten(run, llama, copy):
    model = copy(llama, "mine")
    refusal(run("export", model, "-o", model, "--scheme", "fp8-dynamic", "--overwrite"), "input")
    assert (model / "model.safetensors").is_file()


def test_quantized_model_is_not_quantized_again(run, export_to, tmp_path):
    refusal(
        run("export", export_to("fp8-dynamic"), "-o", tmp_path / "o", "--scheme", "int8-dynamic"),
        "quantized already",
    )


def test_runtime_that_cannot_load_the_shapes_refuses_when_named_and_warns_otherwise(run, tmp_path):
    model = make_llama(
        tmp_path / "m576",
        hidden_size=576,
        intermediate_size=256,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    refusal(
        run("export", model, "-o", tmp_path / "o", "--scheme", "fp8-block", "--runtime", "vllm"),
        "vllm",
        "576",
        "128",
    )
    assert not (tmp_path / "o").exists()
    warned = run("export", model, "-o", tmp_path / "o", "--scheme", "fp8-block")
    assert warned.exit_code == 0
    assert "Warning: vllm" in warned.stderr and "Warning: transformers" in warned.stderr


def test_fused_set_may_not_be_split_for_a_runtime_that_merges_it(run, llama, tmp_path):
    command = (
        "export",
        llama,
        "-o",
        tmp_path / "o",
        "--scheme",
        "fp8-dynamic",
        "--ignore",
        "re:.*q_proj",
    )
    refusal(run(*command, "--runtime", "vllm"), "merges", "q_proj")
    assert run(*command, "--runtime", "transformers").exit_code == 0


def test_kernels_that_are_not_there_are_not_pretended(run, llama, text, export_to, monkeypatch):
    monkeypatch.setattr(native, "cpu_kernels", lambda: None)
    refusal(
        run("eval", llama, export_to("int8-dynamic"), "--data", text, "--exec", "kernel"),
        "no compiled kernels",
    )


def test_int8_as_blackwell_computes_is_refused(run, llama, text, export_to):
    refusal(
        run("eval", llama, export_to("int8-dynamic"), "--data", text, "--hardware", "blackwell"),
        "Blackwell",
    )


def test_damaged_config_is_one_sentence(run, llama, copy, tmp_path):
    model = copy(llama, "bad")
    (model / "config.json").write_text("{")
    refusal(
        run("export", model, "-o", tmp_path / "o", "--scheme", "fp8-dynamic"), "config.json", "JSON"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "m", "-o", "o"),
        ("export", "m", "-o", "o", "--scheme", "fp8-dynamic", "--recipe", "r.yaml"),
        ("export", "m", "-o", "o", "--sceme", "fp8-dynamic"),
        ("eval", "m"),
        ("calibrate", "m"),
        ("calibrate", "m", "-o", "c", "--num-samples", "0"),
        ("quantise",),
        ("eval", "m", "--data", "f", "--protocol", "mine"),
        ("eval", "m", "--data", "f", "--device", "gpu"),
        ("calibrate", "m", "-o", "c", "--device", "xpu"),
        ("calibrate", "m", "-o", "c", "--memory", "much"),
        ("export", "m", "-o", "o", "--scheme", "fp8-dynamic", "--max-shard-size", "-1GB"),
    ],
)
def test_bad_usage_exits_with_2(arguments, run):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("option", ["--memory", "--max-shard-size"])
def test_a_size_of_nothing_is_bad_usage_and_said_so(option, run, tmp_path):
    for size in ("0", "0GB", "0.1"):
        result = run("quantize", "m", "-o", tmp_path / "o", "--scheme", "fp8-static", option, size)
        assert result.exit_code == 2 and f"{option} must be more than 0" in result.stderr


@pytest.mark.parametrize("command", ["calibrate", "quantize", "eval"])
def test_a_source_that_is_given_twice_is_bad_usage(command, run, llama, text, tmp_path):
    output = {
        "calibrate": ["-o", tmp_path / "c"],
        "quantize": ["-o", tmp_path / "c", "--scheme", "int8-static"],
        "eval": [],
    }[command]
    result = run(command, llama, *output, "--data", text, "--data", f"{text.parent}/./{text.name}")
    assert result.exit_code == 2 and f"{text.name} is given twice" in result.stderr
    assert (
        run(command, llama, *output, "--data", "dataset:a:b", "--data", "dataset:a:b").exit_code
        == 2
    )
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_gates_decide_the_exit_code(run, llama, text, export_to):
    out = export_to("fp8-dynamic")
    base = ("eval", llama, out, "--data", text, "--seq-len", 32, "--max-tokens", 1280)
    assert run(*base, "--gate", "size_ratio<=0.99", "--gate", "kld_mean<=5").exit_code == 0
    failed = run(*base, "--gate", "size_ratio<=0.1", "--json")
    assert failed.exit_code == 3 and json.loads(failed.stdout)["gates"][0]["result"] == "fail"
    value = json.loads(run(*base, "--json").stdout)["quants"][0]["ppl_delta_pct"]["value"]
    undecided = (*base, "--gate", f"ppl_delta_pct<={value:.6f}")
    assert run(*undecided).exit_code == 0
    assert run(*undecided, "--strict").exit_code == 4


def test_not_comparable_exits_with_5(run, llama, text, tmp_path):
    assert (
        run("eval", llama, make_llama(tmp_path / "other", hidden_size=64), "--data", text).exit_code
        == 5
    )


def test_read_only_place_is_refused(run, llama, tmp_path):
    if os.geteuid() == 0:
        refusal(run("export", llama, "-o", "/proc/out", "--scheme", "fp8-dynamic"), "/proc")
        return
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refusal(run("export", llama, "-o", locked / "o", "--scheme", "fp8-dynamic"), "write")


def test_full_disk_is_one_sentence_and_leaves_no_output(run, llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    refusal(run("export", llama, "-o", tmp_path / "o", "--scheme", "fp8-dynamic"), "No space left")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_ctrl_c_in_calibration_keeps_the_work(run, text, tmp_path):
    model = make_llama(tmp_path / "deep", num_hidden_layers=12)
    command = [
        "calibrate",
        str(model),
        "-o",
        str(tmp_path / "c"),
        "--data",
        str(text),
        "--seq-len",
        "32",
        "--batch-size",
        "1",
        "--num-samples",
        "12",
    ]
    undisturbed = [*command[:3], str(tmp_path / "whole"), *command[4:]]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "c.partial").exists():
        time.sleep(0.01)
    # caught from the moment there is something to keep; the block is finished and kept
    process.send_signal(2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "--resume" in errors
    assert run(*command, "--resume").exit_code == 0
    assert run(*undisturbed).exit_code == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("c", "whole")
    )
    assert ours == theirs and len(ours) == 13


@pytest.mark.slow
def test_bench_measures_each_kind_beside_its_rivals(run):
    if native.cpu_kernels() is None:
        refusal(run("bench", "--shape", "64x32"), "no compiled kernels")
        return
    result = run("bench", "--shape", "96x48", "--tokens", 1, "--tokens", 3, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (
        printed["machine"]["kernels"] == native.cpu_level()
        and printed["machine"]["read_gb_per_s"] > 0
    )
    rivals = {figure["what"]: set(figure["times"]) for figure in printed["figures"]}
    assert (
        rivals["matmul_int8"] == {"onednn.qlinear", "bfloat16 linear"}
        and "torch._scaled_mm" in rivals["matmul_fp8"]
    )
    assert {figure["kind"] for figure in printed["figures"]} == {
        "int8",
        "fp8",
        "weight-only",
        "bf16",
        "convert",
    }
    assert all(
        figure["microseconds"] > 0 and min(figure["times"].values()) > 0
        for figure in printed["figures"]
    )
    table = run("bench", "--kind", "bf16", "--shape", "96x48", "--tokens", 2)
    assert "matmul_bf16" in table.stdout and "against float32 linear" in table.stdout
    usage = run("bench", "--shape", "96")
    assert usage.exit_code == 2 and "no shape" in usage.stderr


def test_inspect_shows_a_checkpoint_with_stacked_quantized_experts(run_json, llama, export_to):
    """No runtime reads such a file, but `inspect` shows what is there."""
    out = export_to("fp8-dynamic")
    tensors = load_file(out / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"
    for name, shape in (("gate_up_proj", (2, 512, 128)), ("down_proj", (2, 128, 256))):
        tensors[f"{prefix}.{name}.weight"] = torch.zeros(shape).to(torch.float8_e4m3fn)
        tensors[f"{prefix}.{name}.weight_scale"] = torch.ones(2, shape[1], 1)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    shapes = {entry["name"]: entry["shape"] for entry in run_json("inspect", out)["linears"]}
    assert shapes[f"{prefix}.down_proj"] == [] and shapes["model.layers.0.mlp.up_proj"]
