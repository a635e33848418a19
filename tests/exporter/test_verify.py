import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.exporter.verify import verify
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import SCHEMES


@pytest.fixture
def change(copy):
    """change(checkpoint, function) → a copy whose tensors the function has changed in place."""

    def make(directory, function):
        damaged = copy(directory, f"damaged-{directory.name}")
        tensors = load_file(damaged / "model.safetensors")
        function(tensors)
        save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
        (damaged / "quantkit.json").unlink()  # whose hash of the file would be one more fault
        return damaged

    return make


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_export_writes_is_sound(scheme, export_to, llama):
    found = verify(export_to(scheme), llama)
    assert found.faults == () and found.quantized == 14 and set(found.skipped) == {"lm_head"}
    assert min(found.sqnr_db.values()) > 25


def faults(path, **options):
    return dict(verify(path, **options).faults)


def test_file_that_changed_since_the_export_is_found(export_to):
    out = export_to("int8-dynamic")
    shard = out / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # a code that is as good as any: nothing but the hash tells
    shard.write_bytes(content)
    assert "not the file that was exported" in faults(out)["model.safetensors"]
    (out / "tokenizer.json").unlink()
    assert any(
        "tokenizer.json was exported but is missing" in warning for warning in verify(out).warnings
    )


def test_left_linears_come_with_the_reason(export_to):
    found = verify(export_to(Recipe(SCHEMES["fp8-dynamic"], ignore=(Pattern("re:.*o_proj"),))))
    assert (
        found.skipped["lm_head"] == "lm_head is skipped by rule"
        and "ignored" in found.skipped["model.layers.0.self_attn.o_proj"]
    )


def test_sqnr_is_that_of_the_reference_worst_first(export_to, llama):
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.ops.reference import quantize, sqnr_db

    for scheme in ("fp8-block", "fp8-tensor", "mxfp8", "int8-weight-only"):
        found = verify(export_to(scheme), llama)
        for name, value in found.sqnr_db.items():
            if scheme == "fp8-tensor" and not name.endswith(("o_proj", "down_proj")):
                continue  # a fused set's scale is not the member's own
            weight = Checkpoint.open(llama).read(f"{name}.weight")
            assert value == pytest.approx(
                float(sqnr_db(weight, quantize(weight, SCHEMES[scheme].weight).dequantize())),
                abs=1e-3,
            )
        layers = found.to_json()["layers"]
        assert [layer["weight_sqnr_db"] for layer in layers] == sorted(
            layer["weight_sqnr_db"] for layer in layers
        )


def test_missing_scale_is_found(export_to, change):
    damaged = change(export_to("fp8-dynamic"), lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    assert f"{UP}.weight" in faults(damaged)


def test_missing_input_scale_is_found(export_to, change):
    damaged = change(export_to("fp8-static"), lambda tensors: tensors.pop(f"{UP}.input_scale"))
    assert "missing" in faults(damaged)[f"{UP}.input_scale"]


@pytest.mark.parametrize(
    ("value", "word"),
    [(float("nan"), "NaN"), (float("inf"), "NaN"), (0.0, "zero"), (-1.0, "negative")],
)
def test_scale_that_ruins_the_layer_is_found(value, word, export_to, change):
    def ruin(tensors):
        tensors[f"{UP}.weight_scale"][3] = value

    assert word in faults(change(export_to("int8-dynamic"), ruin))[f"{UP}.weight_scale"]


def test_a_scale_of_the_models_own_may_be_negative(export_to, change):
    def add(tensors):
        tensors["model.layers.0.mixer.hc_scale"] = torch.tensor([-1.0, 0.0])

    assert "model.layers.0.mixer.hc_scale" not in faults(change(export_to("int8-dynamic"), add))


def test_nan_code_is_found(export_to, change):
    def ruin(tensors):
        tensors[f"{UP}.weight"].view(torch.uint8)[0, 0] = 0xFF

    assert "codes" in faults(change(export_to("fp8-dynamic"), ruin))[f"{UP}.weight"]


def test_nan_in_an_unquantized_weight_is_found(export_to, change):
    def ruin(tensors):
        tensors["model.norm.weight"][0] = float("nan")

    assert "model.norm.weight" in faults(change(export_to("fp8-dynamic"), ruin))


def test_wrong_scale_shape_is_found(export_to, change):
    def reshape(tensors):
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].reshape(-1)

    assert (
        "exactly [256, 1]"
        in faults(change(export_to("fp8-dynamic"), reshape))[f"{UP}.weight_scale"]
    )


def test_two_scales_in_a_fused_set_are_found(export_to, change):
    def double(tensors):
        tensors["model.layers.0.self_attn.k_proj.input_scale"] *= 2

    assert (
        "differs"
        in faults(change(export_to("int8-static"), double))[
            "model.layers.0.self_attn.q_proj.input_scale"
        ]
    )


def test_layer_that_is_neither_quantized_nor_ignored_is_found(export_to, change, llama):
    original = load_file(llama / "model.safetensors")[f"{UP}.weight"]

    def restore(tensors):
        del tensors[f"{UP}.weight_scale"]
        tensors[f"{UP}.weight"] = original

    assert (
        "neither quantized nor ignored"
        in faults(change(export_to("fp8-dynamic"), restore))[f"{UP}.weight"]
    )


def test_ignored_layer_with_codes_is_found(export_to):
    out = export_to("fp8-dynamic")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"].append(UP)
    (out / "config.json").write_text(json.dumps(config))
    assert "doesn't target" in faults(out)[UP]


def test_codes_without_a_quantization_config_are_found(export_to):
    out = export_to("fp8-dynamic")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    assert len(faults(out)) == 14


def test_kv_scheme_without_scales_is_found(export_to, change):
    out = export_to("fp8-dynamic", kv_cache="fp8")
    assert faults(out) == {}
    damaged = change(
        out,
        lambda tensors: [
            tensors.pop(f"model.layers.{layer}.self_attn.{which}_scale")
            for layer in (0, 1)
            for which in "kv"
        ],
    )
    assert any("scale 1" in message for message in faults(damaged).values())


def test_weight_that_is_another_is_found_against_the_base(export_to, change, llama):
    def swap(tensors):
        tensors[f"{UP}.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].clone()

    damaged = change(export_to("int8-dynamic"), swap)
    assert faults(damaged) == {} and "dB" in faults(damaged, base=llama)[f"{UP}.weight"]


def test_missing_and_extra_tensors_are_found_against_the_base(export_to, change, llama):
    def change_names(tensors):
        tensors["stray"] = tensors.pop("model.layers.0.input_layernorm.weight")

    assert {"stray", "model.layers.0.input_layernorm.weight"} <= set(
        faults(change(export_to("fp8-dynamic"), change_names), base=llama)
    )


def test_runtime_that_cannot_load_it_is_a_fault_when_named_and_a_warning_otherwise(export_to):
    out = export_to("int8-dynamic")
    assert faults(out) == {} and any("tensorrt-llm" in warning for warning in verify(out).warnings)
    assert any(
        "tensorrt-llm" in message for message in faults(out, runtime="tensorrt-llm").values()
    )


def test_verify_exits_with_3_and_prints_its_faults(run, export_to, change):
    out = export_to("fp8-dynamic")
    assert run("verify", out).exit_code == 0
    damaged = change(out, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    result = run("verify", damaged, "--json")
    assert result.exit_code == 3
    report = json.loads(result.stdout)
    assert (
        report["ok"] is False
        and report["faults"][0]["tensor"] == "model.norm.weight"
        and isinstance(report["warnings"], list)
    )


@pytest.mark.parametrize("declared", ["int-quantized", "pack-quantized", "xyz", None])
def test_format_that_runtimes_would_decompress_wrongly_is_found(declared, export_to):
    out = export_to("fp8-dynamic")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format"] = declared
    (out / "config.json").write_text(json.dumps(config))
    assert "float-quantized" in faults(out)["quantization_config.group_0"]


def test_tensors_of_another_scheme_are_found(export_to, change):
    def add(tensors):
        tensors[f"{UP}.weight_zero_point"] = torch.zeros(256, 1, dtype=torch.int8)

    assert (
        "not a tensor" in faults(change(export_to("int8-dynamic"), add))[f"{UP}.weight_zero_point"]
    )


def test_verify_against_a_quantized_base_is_refused(export_to, llama):
    from quantkit.errors import CheckpointError

    with pytest.raises(CheckpointError, match="quantized itself"):
        verify(llama, export_to("fp8-dynamic"))


def test_left_tensor_that_is_another_is_a_fault_against_the_base(export_to, change, llama):
    damaged = change(
        export_to("fp8-dynamic", name="zeroed"),
        lambda tensors: tensors["model.norm.weight"].zero_(),
    )
    assert (
        faults(damaged) == {}
        and "another tensor" in faults(damaged, base=llama)["model.norm.weight"]
    )
    nudged = change(
        export_to("fp8-dynamic", name="again"),
        lambda tensors: tensors["model.norm.weight"].mul_(1.01),
    )
    assert faults(nudged, base=llama) == {} and any(
        "model.norm.weight isn't quantized, but differs" in warning
        for warning in verify(nudged, llama).warnings
    )


def test_many_left_tensors_that_differ_are_one_warning(export_to, change, llama):
    def nudge(tensors):
        for name in [name for name in tensors if name.endswith("layernorm.weight")]:
            tensors[name].mul_(1.01)

    nudged = change(export_to("fp8-dynamic", name="nudged"), nudge)
    (warning,) = [warning for warning in verify(nudged, llama).warnings if "differs" in warning]
    assert (
        warning == "model.layers.0.input_layernorm.weight isn't quantized, but differs from the"
        " base's (and 3 more)"
    )


def test_config_of_another_depth_is_a_fault_and_of_another_model_is_refused(
    export_to, llama, tmp_path
):
    from tiny_llama import make_llama

    from quantkit.errors import CheckpointError

    out = export_to("fp8-dynamic")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "num_hidden_layers 3; the base has 2" in faults(out, base=llama)["config.json"]
    with pytest.raises(CheckpointError, match="give its own base"):
        verify(out, make_llama(tmp_path / "wide", hidden_size=256))


def test_checkpoint_that_cannot_be_opened_is_a_fault_and_nothing_at_all_an_error(
    run, export_to, tmp_path
):
    out = export_to("fp8-dynamic")
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    result = run("verify", out, "--json")
    assert (
        result.exit_code == 3
        and not json.loads(result.stdout)["ok"]
        and result.stderr.count("\n") == 1
    )
    shard.unlink()
    assert run("verify", out).exit_code == 3
    assert run("verify", tmp_path / "nothing").exit_code == 1
