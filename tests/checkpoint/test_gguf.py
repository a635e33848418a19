"""A GGUF file as MODEL, through the commands."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_llama

from quantkit.checkpoint import gguf as gguf_files
from quantkit.checkpoint.gguf import checkpoint_of_gguf, is_gguf
from quantkit.errors import CheckpointError


def write_gguf(model: Path, target: Path) -> Path:
    """The tiny Llama and its tokenizer in GGUF's words, its weights in float32."""
    gguf = pytest.importorskip("gguf")
    config, tokenizer = (
        json.loads((model / name).read_text()) for name in ("config.json", "tokenizer.json")
    )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn": "attn",
        "mlp": "ffn",
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "o_proj": "output",
        "gate_proj": "gate",
        "up_proj": "up",
    }
    names |= {
        "down_proj": "down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, tensor in load_file(model / "model.safetensors").items():
        if name not in outer:
            _, _, block, *parts, _ = name.split(".")
            if parts[-1] in ("q_proj", "k_proj"):
                # GGUF's rotary embedding turns neighbours, transformers' turns halves.
                tensor = (
                    tensor.reshape(heads, 2, -1, tensor.shape[1])
                    .transpose(1, 2)
                    .reshape(tensor.shape)
                )
            outer[name] = f"blk.{block}.{'_'.join(names[part] for part in parts)}.weight"
        writer.add_tensor(outer[name], tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.slow
def test_a_gguf_file_goes_the_whole_way(tmp_path, text, run, run_json):
    model = make_llama(tmp_path / "model")
    file = write_gguf(model, tmp_path / "tiny.gguf")
    calibrated = run(
        "calibrate",
        file,
        "-o",
        tmp_path / "calib",
        "--data",
        text,
        "--num-samples",
        2,
        "--seq-len",
        32,
    )
    assert calibrated.exit_code == 0, calibrated.stderr
    assert (
        run(
            "export",
            file,
            "-o",
            tmp_path / "out",
            "--scheme",
            "int8-static",
            "--calibration",
            tmp_path / "calib",
        ).exit_code
        == 0
    )
    judged = run_json(
        "eval", file, tmp_path / "out", "--data", text, "--seq-len", 32, "--max-tokens", 160
    )
    assert judged["quants"][0]["linears_quantized"] == 14
    # The file holds the same weights, so it is as good a model as the one that it was made from.
    original = run_json("eval", model, "--data", text, "--seq-len", 32, "--max-tokens", 160)
    assert judged["base"]["perplexity"] == pytest.approx(original["base"]["perplexity"], rel=1e-3)
    assert run("verify", tmp_path / "out", "--base", file).exit_code == 0


def test_a_file_is_read_once(tmp_path):
    file = write_gguf(make_llama(tmp_path / "model"), tmp_path / "tiny.gguf")
    made = checkpoint_of_gguf(file)
    assert (
        checkpoint_of_gguf(file) == made
        and load_file(made / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    )
    changed = write_gguf(make_llama(tmp_path / "other", seed=1), file)
    assert checkpoint_of_gguf(changed) != made


def test_what_is_no_gguf_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, they say")
    (tmp_path / "directory.gguf").mkdir()
    assert is_gguf(tmp_path / "broken.gguf") and not is_gguf(tmp_path / "directory.gguf")
    with pytest.raises(CheckpointError, match=r"transformers can't read .*broken\.gguf"):
        checkpoint_of_gguf(tmp_path / "broken.gguf")


@pytest.mark.parametrize("name", ["absent.gguf", "gone/absent.gguf", "~/nowhere/absent.gguf"])
def test_a_file_that_is_not_there_is_called_a_file(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("eval", name, "--data", "text.txt"),
        ("export", name, "-o", "out", "--scheme", "fp8-dynamic"),
        ("calibrate", name, "-o", "calib"),
    ):
        (tmp_path / "text.txt").write_text("words")
        refused = run(*arguments)
        assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
        assert f"there is no file {Path(name).expanduser()}" in refused.stderr


def test_copies_that_were_not_used_for_longest_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    files = [
        write_gguf(make_llama(tmp_path / f"model-{seed}", seed=seed), tmp_path / f"{seed}.gguf")
        for seed in range(4)
    ]
    monkeypatch.setattr(gguf_files, "MOST_BYTES", 5 * files[0].stat().st_size)
    first, second, third = (checkpoint_of_gguf(file) for file in files[:3])
    assert first.is_dir()  # used today
    for path, days in ((first, 3), (second, 2), (third, 0)):
        os.utime(path, (time.time() - 86400 * days,) * 2)
    assert checkpoint_of_gguf(files[0]) == first  # used again
    fourth = checkpoint_of_gguf(files[3])
    assert first.is_dir() and not second.exists() and third.is_dir() and fourth.is_dir()


def test_without_the_reader_the_way_to_install_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pip install 'quantkit\[gguf\]'"):
        checkpoint_of_gguf(tmp_path / "some.gguf")
