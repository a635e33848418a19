import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama

from quantkit.checkpoint.files import sha256_file
from quantkit.checkpoint.formats import FORMATS, read_quantization_config
from quantkit.checkpoint.output_dir import OutputDirectory
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardWriter
from quantkit.errors import CalibrationError, CheckpointError, Interrupted, OutputError, RecipeError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.verify import verify
from quantkit.exporter.write import export
from quantkit.ops import cpu
from quantkit.ops.reference import dequantize, quantize
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.quant_spec import block
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import SCHEMES, QuantScheme


def planned(model, scheme="fp8-dynamic", **recipe):
    return plan_export(
        ExportOptions(model, model.parent / "unused", Recipe(QuantScheme.parse(scheme), **recipe))
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_holds_the_reference_codes_in_the_exact_shapes(scheme, llama, export_to):
    checkpoint, base = Checkpoint.open(export_to(scheme)), Checkpoint.open(llama)
    name = "model.layers.1.mlp.down_proj"
    weight = base.read(f"{name}.weight")
    expected = FORMATS["compressed-tensors"].tensors(SCHEMES[scheme], tuple(weight.shape))
    assert {
        suffix: (
            checkpoint.tensors[f"{name}.{suffix}"].dtype,
            checkpoint.tensors[f"{name}.{suffix}"].shape,
        )
        for suffix in expected
    } == expected
    stored, _ = FORMATS["compressed-tensors"].decode(
        {suffix: checkpoint.read(f"{name}.{suffix}") for suffix in expected}, SCHEMES[scheme], name
    )
    reference = quantize(weight, SCHEMES[scheme].weight)
    assert torch.equal(stored.dequantize(), reference.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_quantized_is_carried_over_bit_for_bit(scheme, llama, export_to):
    out, base = (
        load_file(export_to(scheme) / "model.safetensors"),
        load_file(llama / "model.safetensors"),
    )
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        assert torch.equal(out[name], base[name])


def test_other_files_are_carried_over_and_the_card_says_what_was_done(llama, copy, export_to):
    model = copy(llama)
    (model / "LICENSE").write_text("free")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# My model\n")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    out = export_to("fp8-dynamic", model)
    assert (out / "LICENSE").read_text() == "free"
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    card = (out / "README.md").read_text()
    assert (
        card.startswith("---\nlicense: mit\n---\n# My model")
        and "14 Linears in fp8-dynamic" in card
    )


def test_fused_sets_share_their_scales_where_a_scale_is_per_tensor(export_to):
    tensors = load_file(export_to("fp8-tensor") / "model.safetensors")
    for members in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        for suffix in ("weight_scale", "input_scale"):
            assert (
                len({tensors[f"model.layers.0.{member}.{suffix}"].item() for member in members})
                == 1
            )
    assert tensors["model.layers.0.mlp.gate_proj.weight_scale"].shape == (1,)


def test_stored_scales_are_exact_in_bfloat16(export_to):
    for scheme in ("fp8-static", "int8-dynamic", "fp8-block"):
        for name, tensor in load_file(export_to(scheme) / "model.safetensors").items():
            if name.endswith("_scale"):
                assert tensor.dtype == torch.float32 and torch.equal(
                    tensor, tensor.bfloat16().float()
                ), name


def test_dry_run_accounts_for_every_parameter_once(llama, run_json, tmp_path):
    rows = run_json(
        "export", llama, "-o", tmp_path / "out", "--scheme", "int8-dynamic", "--dry-run"
    )["parameters"]
    base = Checkpoint.open(llama)
    assert sorted(row["name"] for row in rows) == sorted(base.tensors)
    assert {row["status"] for row in rows} == {"quantized", "left"}
    assert sum(row["bytes_before"] for row in rows) == base.nbytes
    assert not (tmp_path / "out").exists()
    reasons = {row["name"]: row["reason"] for row in rows if row["status"] == "left"}
    assert "embedding" in reasons["model.embed_tokens.weight"]
    assert "lm_head" in reasons["lm_head.weight"] and "outside" in reasons["model.norm.weight"]
    norms = [name for name in reasons if name.endswith("layernorm.weight")]
    assert len(norms) == 4 and all("norms" in reasons[name] for name in norms)
    assert len(reasons) == 3 + len(norms)


def test_dry_run_predicts_the_size_of_the_file(llama, export_to):
    plan = planned(llama)
    assert Checkpoint.open(export_to("fp8-dynamic")).nbytes == plan.bytes_after


def test_ignore_and_layers_decide_and_the_config_says_so(llama, export_to):
    recipe = Recipe(
        QuantScheme.parse("int8-dynamic"),
        ignore=(Pattern("re:.*layers\\.0\\..*"),),
        layers=((Pattern("re:.*down_proj"), QuantScheme.parse("fp8-dynamic")),),
    )
    out = export_to(recipe)
    config = json.loads((out / "config.json").read_text())
    stored_config = read_quantization_config(config)
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert stored_config.scheme_of("model.layers.1.mlp.down_proj").name == "fp8-dynamic"
    assert stored_config.scheme_of("model.layers.1.mlp.up_proj").name == "int8-dynamic"
    assert (
        stored_config.scheme_of("model.layers.0.mlp.up_proj") is None
        and stored_config.scheme_of("lm_head") is None
    )
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn


def test_lm_head_is_left_by_rule_and_quantized_when_a_layers_entry_says_so(llama, export_to):
    assert "lm_head" in planned(llama, ignore=()).skipped
    out = export_to(
        Recipe(
            QuantScheme.parse("fp8-dynamic"),
            layers=((Pattern("lm_head"), QuantScheme.parse("fp8-dynamic")),),
        )
    )
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.float8_e4m3fn
    assert (
        "lm_head"
        not in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    )


def test_tied_lm_head_may_be_named_in_ignore_but_not_quantized(tmp_path):
    tied = make_llama(tmp_path / "tied", tie=True)
    assert "lm_head" in planned(tied, ignore=(Pattern("lm_head"),)).skipped
    with pytest.raises(RecipeError, match="tied to the embedding"):
        planned(tied, layers=((Pattern("lm_head"), QuantScheme.parse("int8-dynamic")),))


def test_layer_that_is_no_linear_cannot_be_asked_for(llama):
    with pytest.raises(RecipeError, match="no Linear"):
        planned(llama, layers=((Pattern("model.embed_tokens"), QuantScheme.parse("fp8-dynamic")),))


def test_shape_that_does_not_fit_the_groups_is_left_with_its_reason(tmp_path):
    model = make_llama(
        tmp_path / "m",
        hidden_size=96,
        intermediate_size=200,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    plan = planned(model, "mxfp8")
    reasons = {row.name: row.reason for row in plan.parameters}
    assert "200 is no multiple" in reasons["model.layers.0.mlp.down_proj.weight"]
    assert (
        "model.layers.0.mlp.down_proj" in plan.skipped
        and "model.layers.0.mlp.up_proj" in plan.linears
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weight_stops_the_export_and_is_named(value, llama, copy, export_to, tmp_path):
    model = copy(llama)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.1.self_attn.o_proj.weight"):
        export_to("fp8-dynamic", model)
    assert not (tmp_path / "out-fp8-dynamic").exists()


def test_what_cannot_be_quantized_is_refused_unless_it_is_ignored_or_allowed(
    llama, copy, run_json, run, tmp_path
):
    model = copy(llama)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 128, 250)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="gate_up_proj.*stack of matrices"):
        planned(model)
    (left,) = [
        row
        for row in planned(model, ignore=(Pattern("re:.*experts.*"),)).parameters
        if "experts" in row.name
    ]
    assert left.status == "left" and left.reason.startswith("ignored by 're:.*experts.*'")
    command = ("export", model, "-o", tmp_path / "out", "--scheme", "fp8-dynamic", "--dry-run")
    assert "--allow-unreached" in run(*command).stderr
    rows = run_json(*command, "--allow-unreached")["parameters"]
    (row,) = [row for row in rows if row["status"] == "unreached"]
    assert (
        row["name"].endswith("gate_up_proj")
        and row["bytes_before"] == row["bytes_after"] == 4 * 128 * 250 * 4
    )


def test_float16_and_float32_models_export(tmp_path, export_to):
    for dtype in (torch.float16, torch.float32):
        model = make_llama(tmp_path / str(dtype), dtype=dtype)
        tensors = load_file(
            export_to("int8-dynamic", model, name=f"out-{dtype}") / "model.safetensors"
        )
        assert (
            tensors["model.norm.weight"].dtype == dtype
            and tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
        )


def test_several_shards_hold_the_same_tensors_as_one(export_to):
    one, many = (
        export_to("fp8-dynamic"),
        export_to("fp8-dynamic", max_shard_bytes=100_000, name="many"),
    )
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    tensors = {
        name: tensor
        for shard in set(index["weight_map"].values())
        for name, tensor in load_file(many / shard).items()
    }
    single = load_file(one / "model.safetensors")
    assert set(tensors) == set(single) == set(index["weight_map"])
    assert all(
        torch.equal(tensors[name].view(torch.uint8), single[name].view(torch.uint8))
        for name in single
    )


def test_kv_cache_scales_cover_the_largest_key_and_value(llama, calib, export_to):
    out = export_to("fp8-dynamic", kv_cache="fp8")
    tensors = load_file(out / "model.safetensors")
    measured = {
        entry["module"]: entry
        for entry in json.loads((calib / "calibration.json").read_text())["kv"]
    }
    assert set(measured) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for module, entry in measured.items():
        for which in ("k", "v"):
            scale = tensors[f"{module}.{which}_scale"]
            assert scale.shape == (1,) and scale.item() == pytest.approx(
                entry[f"{which}_amax"] / 448, rel=0.004
            )
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"][
            "num_bits"
        ]
        == 8
    )


def test_export_is_the_same_bytes_twice(export_to):
    first, second = export_to("fp8-tensor"), export_to("fp8-tensor", name="again")
    assert sha256_file(first / "model.safetensors") == sha256_file(second / "model.safetensors")


def test_stopped_export_leaves_no_output_and_resumes_to_the_same_bytes(
    llama, export_to, tmp_path, monkeypatch
):
    undisturbed = export_to("fp8-dynamic", max_shard_bytes=50_000, name="undisturbed")
    options = ExportOptions(
        llama, tmp_path / "killed", Recipe(QuantScheme.parse("fp8-dynamic")), max_shard_bytes=50_000
    )
    record = OutputDirectory.record

    class Killed(BaseException):
        pass

    def die(self, name, content):
        if len(self.done) == 3:
            raise Killed
        record(self, name, content)

    monkeypatch.setattr(OutputDirectory, "record", die)
    with pytest.raises(Killed):
        export(plan_export(options))
    monkeypatch.undo()
    partial = tmp_path / "killed.partial"
    assert not (tmp_path / "killed").exists() and partial.is_dir()
    finished = sorted(json.loads((partial / "progress.json").read_text())["done"])
    assert len(finished) == 3
    kept = {name: (partial / name).stat().st_mtime_ns for name in finished[1:]}
    # A shard that was damaged meanwhile is made again; the others are not.
    (partial / finished[0]).write_bytes(b"damaged")
    made = []
    monkeypatch.setattr(
        OutputDirectory,
        "record",
        lambda self, name, content: (made.append(name), record(self, name, content)),
    )
    export(plan_export(replace(options, resume=True)))
    assert finished[0] in made and not set(kept) & set(made)
    assert all(
        (tmp_path / "killed" / name).stat().st_mtime_ns == time for name, time in kept.items()
    )
    names = sorted(path.name for path in undisturbed.iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names
    assert all(
        (tmp_path / "killed" / name).read_bytes() == (undisturbed / name).read_bytes()
        for name in names
    )


def test_resume_of_a_finished_export_says_so_and_of_another_refuses(llama, export_to, tmp_path):
    done = export_to("fp8-dynamic")
    before = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    options = ExportOptions(llama, done, Recipe(QuantScheme.parse("fp8-dynamic")), resume=True)
    assert export(plan_export(options)).path == done
    assert {path.name: path.stat().st_mtime_ns for path in done.iterdir()} == before
    with pytest.raises(OutputError, match="different recipe"):
        export(plan_export(replace(options, recipe=Recipe(QuantScheme.parse("int8-dynamic")))))
    (done / "model.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="model.safetensors has changed"):
        export(plan_export(options))


@pytest.mark.slow
def test_sigterm_ends_with_75_and_resume_completes(run, tmp_path):
    model = make_llama(tmp_path / "deep", num_hidden_layers=40)
    command = [
        "export",
        str(model),
        "-o",
        str(tmp_path / "out"),
        "--scheme",
        "fp8-dynamic",
        "--max-shard-size",
        "200kB",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "quantkit", *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(
        (tmp_path / "out.partial").glob("*.safetensors")
    ):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "--resume" in errors and not (tmp_path / "out").exists()
    assert run(*command, "--resume").exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out.partial").exists()


def test_a_stop_ends_a_maker_that_waits_to_open_a_shard(tmp_path, monkeypatch):
    """A maker must not wait with a job of a shard that another maker has opened: that shard can't
    be finished without the job, and keeps its place.
    """
    stop = threading.Event()
    write_part = ShardWriter.write_part

    class Unfair(threading.Semaphore):
        """Maker 1 comes after the stop, if it comes with another shard's first job."""

        def acquire(self, *arguments, **options):
            if threading.current_thread().name == "maker 1":
                stop.wait(5)
                time.sleep(0.3)
            return super().acquire(*arguments, **options)

    def stop_in_the_third_shard(writer, tensor, *arguments):
        is_slow = threading.current_thread().name == "maker 0"
        if "model-00001-" in str(writer.path) and is_slow:
            time.sleep(0.1)  # so that maker 1 is the first to come to the second shard
        if "model-00003-" in str(writer.path) and not stop.is_set():
            stop.set()
            time.sleep(0.2)
        write_part(writer, tensor, *arguments)

    monkeypatch.setattr("quantkit.exporter.write.cores", lambda: 2)
    monkeypatch.setattr("quantkit.exporter.write.threading.Semaphore", Unfair)
    monkeypatch.setattr(ShardWriter, "write_part", stop_in_the_third_shard)
    model = make_llama(tmp_path / "deep", num_hidden_layers=8)
    options = ExportOptions(model, tmp_path / "out", Recipe("fp8-dynamic"), max_shard_bytes=200_000)
    found = []

    def work():
        try:
            export(plan_export(options), should_stop=stop.is_set)
        except Interrupted as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert found, "the export hangs"


def test_entry_that_never_applies_is_refused(llama):
    int8 = QuantScheme.parse("int8-dynamic")
    with pytest.raises(RecipeError, match="never applies"):
        planned(llama, layers=((Pattern("re:.*proj"), int8), (Pattern("re:.*down_proj"), int8)))


def test_nonfinite_tensor_that_is_only_copied_stops_the_export_too(
    llama, copy, export_to, tmp_path
):
    model = copy(llama)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        export_to("fp8-dynamic", model)
    assert not (tmp_path / "out-fp8-dynamic.partial").exists()


def test_link_to_a_directory_is_filled_not_replaced(llama, export_to, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_to("fp8-dynamic", name="link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()


def test_static_scale_leaves_the_first_position_out_for_int8_and_keeps_it_for_fp8(
    llama, calib, export_to
):
    """One enormous first token costs INT8 the codes of all others; a float format has range to
    spare.
    """
    seen = {
        entry["name"]: entry
        for entry in json.loads((calib / "calibration.json").read_text())["inputs"]
    }
    entry = seen["model.layers.1.mlp.down_proj"]
    for scheme, amax, largest in (
        ("int8-static", entry["amax"], 127),
        ("fp8-static", max(entry["amax"], entry["first_position_amax"]), 448),
    ):
        scale = load_file(export_to(scheme) / "model.safetensors")[
            "model.layers.1.mlp.down_proj.input_scale"
        ]
        assert scale.item() == torch.tensor(amax / largest).bfloat16().item()


def test_fp8_format_is_deepseeks(llama, export_to):
    out = export_to("fp8-block", file_format="fp8")
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (
        stored["quant_method"] == "fp8"
        and stored["weight_block_size"] == [128, 128]
        and stored["modules_to_not_convert"] == ["lm_head"]
    )
    tensors, reference = (
        load_file(out / "model.safetensors"),
        load_file(export_to("fp8-block", name="reference") / "model.safetensors"),
    )
    assert not any(name.endswith(".weight_scale") for name in tensors)
    for name, tensor in reference.items():
        same = tensors[name.replace(".weight_scale", ".weight_scale_inv")]
        assert same.shape == tensor.shape and torch.equal(
            same.view(torch.uint8), tensor.view(torch.uint8)
        )
    assert verify(out, llama).faults == ()


def test_modelopt_format_says_the_same_in_both_places(llama, export_to):
    out = export_to("fp8-tensor", file_format="modelopt", kv_cache="fp8")
    inline = json.loads((out / "config.json").read_text())["quantization_config"]
    beside = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (
        inline["quant_method"] == "modelopt"
        and inline["quant_algo"] == beside["quant_algo"] == "FP8"
    )
    assert inline["ignore"] == beside["exclude_modules"] == ["lm_head"]
    assert beside["kv_cache_quant_algo"] == "FP8" and inline["kv_cache_scheme"] == {
        "num_bits": 8,
        "type": "float",
        "dynamic": False,
    }
    tensors = load_file(out / "model.safetensors")
    for suffix in ("q_proj.weight_scale", "q_proj.input_scale", "k_proj.k_scale", "v_proj.v_scale"):
        assert (
            tensors[f"model.layers.0.self_attn.{suffix}"].shape == ()
            and tensors[f"model.layers.0.self_attn.{suffix}"].dtype == torch.float32
        )
    assert (
        verify(out, llama).faults == ()
        and verify(out, runtime="tensorrt-llm").ok
        and not verify(out, runtime="transformers").ok
    )
    # Others keep only the file beside; it reads alike.
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert (
        Checkpoint.open(out).config["quantization_config"]["quant_method"] == "modelopt"
        and verify(out, llama).faults == ()
    )


@pytest.mark.parametrize(
    ("file_format", "scheme"),
    [
        ("fp8", "fp8-dynamic"),
        ("modelopt", "int8-dynamic"),
        ("fp8", "fp8-tensor"),
        ("modelopt", "fp8-block"),
    ],
)
def test_format_that_does_not_hold_the_scheme_is_refused(file_format, scheme, llama, tmp_path):
    with pytest.raises(RecipeError, match=f"`format='{file_format}'` holds"):
        plan_export(
            ExportOptions(
                llama, tmp_path / "out", Recipe(QuantScheme.parse(scheme)), file_format=file_format
            )
        )
    with pytest.raises(RecipeError, match="KV cache"):
        plan_export(
            ExportOptions(
                llama,
                tmp_path / "out",
                Recipe(QuantScheme.parse("fp8-block"), kv_cache="fp8"),
                file_format="fp8",
            )
        )


def test_fp8_blocks_are_dequantized_on_the_way(llama, export_to):
    blocks = export_to("fp8-block", file_format="fp8", name="blocks")
    source = load_file(blocks / "model.safetensors")
    with pytest.raises(CalibrationError):  # the statistics are of the original model
        export_to("fp8-tensor", blocks, name="static")
    for scheme in ("int8-dynamic", "mxfp8"):
        recipe = Recipe(QuantScheme.parse(scheme), ignore=(Pattern("re:.*o_proj"),))
        out = load_file(
            export_to(recipe, blocks, name=f"from-blocks-{scheme}") / "model.safetensors"
        )
        name = "model.layers.1.mlp.down_proj"
        dense = dequantize(
            source[f"{name}.weight"], source[f"{name}.weight_scale_inv"], block(128, 128)
        )
        expected = quantize(dense, SCHEMES[scheme].weight)
        assert torch.equal(
            out[f"{name}.weight"].view(torch.uint8), expected.qdata.view(torch.uint8)
        )
        left = "model.layers.1.self_attn.o_proj"
        dense = dequantize(
            source[f"{left}.weight"], source[f"{left}.weight_scale_inv"], block(128, 128)
        )
        assert (
            torch.equal(out[f"{left}.weight"], dense.bfloat16())
            and f"{left}.weight_scale_inv" not in out
        )
        assert verify(export_to(recipe, blocks, name=f"again-{scheme}"), blocks).faults == ()


def test_blocks_that_stay_blocks_keep_their_codes(export_to):
    blocks = export_to("fp8-block", file_format="fp8", name="blocks")
    source, out = (
        load_file(blocks / "model.safetensors"),
        load_file(export_to("fp8-block", blocks, name="kept") / "model.safetensors"),
    )
    for name, tensor in source.items():
        same = out[name.replace(".weight_scale_inv", ".weight_scale")]
        assert torch.equal(same.view(torch.uint8), tensor.view(torch.uint8))


def test_dry_run_counts_the_scales_of_fp8_blocks_with_their_weights(export_to):
    blocks = export_to("fp8-block", file_format="fp8", name="blocks")
    plan = planned(blocks, "int8-dynamic", ignore=(Pattern("re:.*o_proj"),))
    assert plan.bytes_before == Checkpoint.open(blocks).nbytes and not any(
        row.name.endswith("scale_inv") for row in plan.parameters
    )
    row = next(row for row in plan.parameters if row.name.endswith("0.self_attn.o_proj.weight"))
    assert row.bytes_after == 128 * 128 * 2 and "FP8 blocks become BF16" in row.reason


@pytest.mark.parametrize("scheme", SCHEMES)
def test_export_without_kernels_writes_the_same_bytes(scheme, export_to, monkeypatch):
    compiled = export_to(scheme)
    monkeypatch.setattr(cpu, "cpu_kernels", lambda: None)
    assert (export_to(scheme, name="reference") / "model.safetensors").read_bytes() == (
        compiled / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 700, 4096])
def test_the_size_of_a_step_does_not_change_the_bytes(step, llama, export_to, monkeypatch):
    for scheme in ("fp8-block", "fp8-tensor", "int8-weight-only"):
        whole = export_to(scheme, name=f"{scheme}-whole")
        with monkeypatch.context() as patch:
            patch.setattr("quantkit.checkpoint.stream.STEP_BYTES", step)
            assert (
                export_to(scheme, name=f"{scheme}-{step}") / "model.safetensors"
            ).read_bytes() == (whole / "model.safetensors").read_bytes()
            assert verify(export_to(scheme, name=f"{scheme}-{step}-again"), llama).ok


def test_no_thread_outlives_an_export_that_is_torn_out_of_its_loop(llama, tmp_path, monkeypatch):
    """As by a second Ctrl-C: the process must be able to end."""

    def die(what: str, done: float, total: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.checkpoint.stream.STEP_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        export(
            plan_export(
                ExportOptions(llama, tmp_path / "out", Recipe(QuantScheme.parse("fp8-dynamic")))
            ),
            die,
        )
    assert not [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(("maker", "follower"))
    ]
    assert not (tmp_path / "out").exists()
