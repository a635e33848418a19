"""A scheme, a runtime's rule and a checkpoint format added from outside, by one table each, work
from `export` to `verify`, `inspect` and the table of schemes.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from quantkit.checkpoint.formats import FORMATS
from quantkit.checkpoint.formats.format import Format, QuantizationConfig
from quantkit.exporter import runtimes
from quantkit.ops.reference import quantize
from quantkit.schemes.number_formats import FP8_E4M3
from quantkit.schemes.scheme import CATALOGUE, SCHEMES, CatalogueRow, QuantScheme, QuantSpec, group
from quantkit.schemes.serving import HARDWARE, NATIVE, RUNTIMES, WEIGHTS, YES, Support

DOWN = "model.layers.1.mlp.down_proj"


def test_a_scheme_is_one_row_of_the_catalogue(monkeypatch, run, run_json, llama, tmp_path):
    scheme = QuantScheme("toy-groups", QuantSpec(FP8_E4M3, group(64)))
    row = CatalogueRow(
        scheme,
        dict.fromkeys(RUNTIMES, YES) | {"sglang": Support(False, "has no toys")},
        dict.fromkeys(HARDWARE, WEIGHTS) | {"hopper": NATIVE},
        aliases=("TOY",),
    )
    monkeypatch.setitem(CATALOGUE, scheme.name, row)
    out = tmp_path / "out"

    assert run("export", llama, "-o", out, "--scheme", "TOY", "--runtime", "vllm").exit_code == 0
    original = load_file(llama / "model.safetensors")[f"{DOWN}.weight"]
    stored = load_file(out / "model.safetensors")
    expected = quantize(original, scheme.weight)
    assert torch.equal(stored[f"{DOWN}.weight_scale"], expected.scale)

    report = run_json("verify", out, "--base", llama)
    assert report["ok"] and report["quantized"] == 14
    assert [warning for warning in report["warnings"] if "has no toys" in warning]
    assert run_json("inspect", out)["schemes"] == {"toy-groups": 14}
    entry = next(row for row in run_json("schemes") if row["scheme"] == "toy-groups")
    assert entry["aliases"] == ["TOY"] and not entry["runtimes"]["sglang"]["loads"]
    assert entry["hardware"]["hopper"] == NATIVE


def test_a_runtimes_rule_is_one_function_in_the_list(monkeypatch, run, run_json, llama, tmp_path):
    def no_down_proj(deployment):
        if deployment.runtime == "sglang":
            for name in deployment.by_name:
                if name.endswith("down_proj"):
                    yield f"sglang fears {name}"
                    return

    monkeypatch.setattr(runtimes, "RULES", [*runtimes.RULES, no_down_proj])
    out = tmp_path / "out"

    refused = run("export", llama, "-o", out, "--scheme", "fp8-dynamic", "--runtime", "sglang")
    assert refused.exit_code == 1 and "sglang fears model.layers.0.mlp.down_proj" in refused.stderr
    written = run("export", llama, "-o", out, "--scheme", "fp8-dynamic", "--runtime", "vllm")
    assert written.exit_code == 0
    assert [w for w in run_json("verify", out)["warnings"] if "sglang fears" in w]
    assert run("verify", out, "--runtime", "sglang").exit_code == 3
    assert run("verify", out, "--runtime", "vllm").exit_code == 0


class ToyFormat(Format):
    """Scales have another name, and a side file repeats the config."""

    name = label = "toy"
    only_scheme = SCHEMES["int8-dynamic"]
    runtimes = dict.fromkeys(RUNTIMES, YES) | {"vllm": Support(False, "has no toys")}
    scale_suffix = "toy_scale"
    side_file = "toy.json"

    def config(self, layers):
        return {"quant_method": self.name, "skipped": list(layers.skipped)}

    def read_config(self, stored):
        groups = ((("Linear",), self.only_scheme),)
        return QuantizationConfig(self, groups, tuple(stored["skipped"]), False)

    def side_file_content(self, layers):
        return {"toys": list(layers.skipped)}

    def config_of_side_file(self, content):
        return {"quant_method": self.name, "skipped": content["toys"]}


@pytest.fixture
def toy_format(monkeypatch) -> str:
    """Its name, as `--format` would have it."""
    monkeypatch.setitem(FORMATS, ToyFormat.name, ToyFormat())
    return ToyFormat.name


def test_a_checkpoint_format_is_one_class_and_a_line_of_the_table(
    toy_format, export_to, run_json, llama, text
):
    out = export_to("int8-dynamic", file_format=toy_format)
    tensors = load_file(out / "model.safetensors")
    assert f"{DOWN}.toy_scale" in tensors and f"{DOWN}.weight_scale" not in tensors
    assert json.loads((out / "toy.json").read_text()) == {"toys": ["lm_head"]}

    report = run_json("verify", out, "--base", llama)
    assert report["ok"] and report["quantized"] == 14
    assert [warning for warning in report["warnings"] if "has no toys" in warning]
    described = run_json("inspect", out)
    assert described["quantization"]["method"] == toy_format
    assert described["schemes"] == {"int8-dynamic": 14}
    shapes = {entry["name"]: entry["shape"] for entry in described["linears"]}
    assert shapes[DOWN] == [128, 256]
    entry = next(row for row in run_json("schemes") if row["scheme"] == "int8-dynamic")
    assert not entry["formats"][toy_format]["vllm"]["loads"]
    result = run_json("eval", llama, out, "--data", text, "--seq-len", 64, "--max-tokens", 256)
    assert result["quants"][0]["scheme"] == "int8-dynamic"

    # The side file alone says the same.
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantkit.json").unlink()
    assert run_json("verify", out)["quantized"] == 14
