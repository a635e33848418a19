"""`quantize` checks its result: sane ones pass, ruined ones exit with 3 and are kept."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama

from quantkit.evaluation.sanity_check import MOST_KLD, MOST_PPL_DELTA_PCT, check_sanity

pytestmark = pytest.mark.slow  # each test runs several commands on a model


def make_sharp(directory, outliers: float = 1.0):
    """A tiny Llama that is sure of its guesses, a few channels of whose norms are scaled up and of
    the weights behind them down: the same function, with outliers.
    """
    make_llama(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    channels = torch.arange(0, 128, 16)
    tensors["lm_head.weight"] *= 8
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        block = name.rpartition(".")[0].rpartition(".")[0]
        readers = (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            if "input" in name
            else ("mlp.gate_proj", "mlp.up_proj")
        )
        tensors[name][channels] *= outliers
        for reader in readers:
            tensors[f"{block}.{reader}.weight"][:, channels] /= outliers
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def ruined_model(tmp_path_factory):
    return make_sharp(tmp_path_factory.mktemp("checked") / "outliers", 2.0**12)


@pytest.fixture(scope="module")
def sane_model(tmp_path_factory):
    return make_sharp(tmp_path_factory.mktemp("checked") / "plain")


SMALL = ("--num-samples", 4, "--seq-len", 64, "--judge-tokens", 2048)


def test_a_sane_result_is_checked_and_exits_with_0(run, sane_model, tmp_path):
    done = run(
        "quantize", sane_model, "-o", tmp_path / "out", "--scheme", "int8-dynamic", *SMALL, "--json"
    )
    assert done.exit_code == 0, done.output
    judgement = json.loads(done.stdout)["judgement"]
    assert (
        judgement["sane"] and judgement["tokens_scored"] == 8 * 255 and judgement["problem"] == ""
    )
    assert (
        judgement["ppl_delta_pct"]["low"] < MOST_PPL_DELTA_PCT
        and judgement["kld"]["mean"] < MOST_KLD
    )
    assert "KL " in done.stderr and "bundled text" in done.stderr


def test_a_ruined_result_exits_with_3_is_kept_and_says_where(run, ruined_model, text, tmp_path):
    done = run(
        "quantize",
        ruined_model,
        "-o",
        tmp_path / "out",
        "--scheme",
        "int8-static",
        "--data",
        text,
        *SMALL,
        "--json",
    )
    assert done.exit_code == 3, done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    judgement = json.loads(done.stdout)["judgement"]
    assert judgement["sane"] is False and judgement["worst_layers"][0]["blame"] == "inputs"
    assert {layer["name"].rpartition(".")[2] for layer in judgement["worst_layers"]} <= {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    }
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert (
        judgement["worst_layers"][0]["name"] in line
        and "by its inputs" in line
        and "kept" in line
        and "dynamic" in line
    )


def test_it_can_be_left_out(run, ruined_model, text, tmp_path):
    done = run(
        "quantize",
        ruined_model,
        "-o",
        tmp_path / "out",
        "--scheme",
        "int8-static",
        "--data",
        text,
        *SMALL,
        "--no-judge",
        "--json",
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["judgement"] is None


def test_data_that_no_calibration_reads_is_checked_on(run, run_json, llama, text, tmp_path):
    printed = run_json(
        "quantize",
        llama,
        "-o",
        tmp_path / "out",
        "--scheme",
        "fp8-dynamic",
        "--data",
        text,
        "--judge-tokens",
        512,
    )
    assert printed["judgement"]["data"]["sources"] == [str(text)]
    gone = run(
        "quantize", llama, "-o", tmp_path / "o", "--scheme", "fp8-dynamic", "--data", "gone.txt"
    )
    assert gone.exit_code == 1 and "no data file" in gone.stderr and not (tmp_path / "o").exists()


def test_what_cannot_be_run_is_said_and_not_called_sane(run, llama, copy, tmp_path):
    model = copy(llama, "mute")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    done = run("quantize", model, "-o", tmp_path / "o", "--scheme", "fp8-dynamic", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["judgement"]["sane"] is None
    assert "is not checked" in done.stderr and "no tokenizer" in done.stderr


def test_a_result_that_computes_nan_is_ruined(llama, export_to, text):
    out = export_to("int8-dynamic")
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 3e38
    tensors["model.layers.1.mlp.up_proj.weight_scale"] *= 3e38
    save_file(tensors, path, {"format": "pt"})
    check = check_sanity(llama, out, (str(text),), 256)
    assert (
        not check.is_sane
        and "NaN or infinity" in check.problem
        and check.to_json()["sane"] is False
    )


def test_quantize_names_the_scheme_that_it_took_and_why(run, llama, tmp_path):
    done = run("quantize", llama, "-o", tmp_path / "o", "--judge-tokens", 256, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["scheme"] == "fp8-dynamic"
    assert "fp8-dynamic, because vllm, sglang" in done.stderr
    refused = run(
        "quantize",
        llama,
        "-o",
        tmp_path / "p",
        "--scheme",
        "int8-dynamic",
        "--hardware",
        "blackwell",
    )
    assert (
        refused.exit_code == 1 and "Blackwell" in refused.stderr and not (tmp_path / "p").exists()
    )
