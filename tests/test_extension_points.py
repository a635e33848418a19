"""A scheme, a runtime's rule and a checkpoint format added from outside, by one table each, work
from `export` to `verify`, `inspect` and the table of schemes.
"""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from quantized_weights import quantized, recipe_of
from safetensors.torch import load_file

from quantkit.algorithms.layer_group import INPUT_SUMS
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.formats import FORMATS
from quantkit.checkpoint.formats.format import Format, QuantizationConfig
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CalibrationError, RecipeError
from quantkit.exporter import runtimes
from quantkit.ops.reference import quantize
from quantkit.schemes.algorithms import ALGORITHMS, AlgorithmRow, Description, Setting
from quantkit.schemes.number_formats import FP8_E4M3
from quantkit.schemes.quant_spec import QuantSpec, group
from quantkit.schemes.scheme import CATALOGUE, SCHEMES, CatalogueRow, QuantScheme
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


TOY = {"scheme": "int8-dynamic", "algorithms": [{"toy": {"factor": 0.5}}, "bias_correction"]}


def shrink_group(group, settings) -> None:
    """Codes of the weights times a factor."""
    assert all(linear.inputs is not None for linear in group.linears.values())
    for linear in group.linears.values():
        linear.codes = quantize(linear.weight * settings["factor"], linear.scheme.weight)
        linear.described |= {"algorithm": "toy", "shrunk_by": settings["factor"]}


@pytest.fixture
def toy(monkeypatch):
    """The algorithm `toy`, as another package would add it."""
    module = ModuleType("toy_algorithm")
    module.needs = lambda settings: INPUT_SUMS
    module.quantize_group = shrink_group
    module.describe = lambda chosen: Description(
        (f"toy: {len(chosen['linears'])} Linears shrunk",),
        (("shrunk", ("Linear",), [[entry["name"]] for entry in chosen["linears"]], ()),),
    )
    monkeypatch.setitem(sys.modules, "toy_algorithm", module)
    row = AlgorithmRow(
        "toy_algorithm",
        is_recoverable=False,
        settings={"factor": Setting(1.0, 0.1, 2.0)},
        linear_fields={"shrunk_by": "magnitude"},
    )
    monkeypatch.setitem(ALGORITHMS, "toy", row)


@pytest.fixture
def options(llama, text, tmp_path):
    return CalibrationOptions(
        llama, tmp_path / "calib", (str(text),), None, num_samples=2, seq_len=32, batch_size=1
    )


def test_a_recipe_validates_the_settings_of_an_added_algorithm(toy):
    (algorithm,) = recipe_of({"scheme": "int8-dynamic", "algorithms": ["toy"]}).algorithms
    assert algorithm["factor"] == 1.0
    for settings, message in (
        ({"factor": 3.0}, "not a number from 0.1 to 2"),
        ({"other": 1}, "has no setting 'other'; allowed are 'factor'"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe_of({"scheme": "int8-dynamic", "algorithms": [{"toy": settings}]})


def test_an_added_algorithm_is_applied_exported_and_described(toy, options, llama, run):
    output = quantized(replace(options, recipe=recipe_of(TOY)))
    exported, base = Checkpoint.open(output), Checkpoint.open(llama)
    name = "model.layers.1.mlp.up_proj"
    values = exported.read(f"{name}.weight").float() * exported.read(f"{name}.weight_scale").float()
    torch.testing.assert_close(values, base.read(f"{name}.weight").float() / 2, atol=1e-3, rtol=0)
    shown = run("inspect", options.output)
    assert shown.exit_code == 0 and "shrunk" in shown.stdout and name in shown.stdout
    summary = calibrate(replace(options, recipe=recipe_of(TOY), resume=True))
    assert summary.chosen[-1] == "toy: 14 Linears shrunk"


def test_what_an_added_algorithm_wrote_is_checked(toy, options):
    calibrate(replace(options, recipe=recipe_of(TOY)))
    path = options.output / "calibration.json"
    description = json.loads(path.read_text())
    assert description["chosen"]["linears"][0]["shrunk_by"] == 0.5
    description["chosen"]["linears"][0]["shrunk_by"] = "much"
    path.write_text(json.dumps(description))
    with pytest.raises(CalibrationError, match="'shrunk_by' is 'much', not a finite magnitude"):
        Calibration.open(options.output)


def test_sensitivity_refuses_weights_that_it_cannot_recover(toy, options, llama, text, run):
    recipe = options.output.with_name("recipe.yaml")
    recipe.write_text(json.dumps(TOY))
    calibrate(replace(options, recipe=recipe_of(TOY)))
    arguments = ["--recipe", recipe, "--calibration", options.output, "--data", text]
    refused = run("sensitivity", llama, *arguments, "--max-tokens", 64, "--seq-len", 32)
    assert refused.exit_code == 1 and "toy changed weights in a way" in refused.stderr


# ---- A metric of `eval`: one row of evaluation/metrics.py.


@pytest.fixture
def surprise(monkeypatch):
    """A toy metric, the mean NLL of the candidate's tokens, as a row from outside."""
    from quantkit.evaluation import metrics
    from quantkit.evaluation.intervals import Interval, paired_interval
    from quantkit.evaluation.token_statistics import per_window

    row = metrics.Metric(
        "surprise",
        Interval,
        lambda scores, text: paired_interval(
            per_window(scores.quant_nll, text.counts), text.counts
        ),
        columns=(metrics.Shown("surprise", lambda value: f"{value.value:.3f} nats"),),
        rows=(metrics.Shown("surprise of a token", lambda value: value.text(4, " nats")),),
        gate=metrics.Gateable("surprise", "nats", lambda value: value),
        pairing=metrics.Pairing(
            "window_surprise",
            lambda scores: scores.quant_nll,
            "surprise_delta",
            "surprise B − A",
            lambda delta: delta.text(4, ""),
        ),
    )
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, row))
    return row


def test_a_metric_is_in_the_json_the_report_the_gates_and_compare(
    surprise, run, run_json, llama, text, export_to, tmp_path
):
    pytest.importorskip("matplotlib")
    stored, markdown, page = (tmp_path / name for name in ("r.json", "r.md", "r.html"))
    arguments = ("eval", llama, export_to("int8-dynamic"), "--data", text, "--seq-len", 32)
    files = ("-o", stored, "--markdown", markdown, "--html", page)
    printed = run_json(*arguments, "--max-tokens", 320, "--gate", "surprise<=99", *files)
    (quant,) = printed["quants"]
    mean = sum(quant["window_nll"]) / printed["tokens_scored"]
    assert quant["surprise"]["value"] == pytest.approx(mean)
    assert quant["window_surprise"] == quant["window_nll"]
    assert (printed["gates"][0]["result"], printed["gates"][0]["value"]) == (
        "pass",
        quant["surprise"]["value"],
    )
    for written in (markdown.read_text(), page.read_text()):
        assert f"{mean:.3f} nats" in written and "surprise of a token" in written
    failed = run(*arguments, "--max-tokens", 320, "--gate", "surprise<=0.1")
    assert failed.exit_code == 3 and "surprise<=0.1" in failed.stderr
    comparison = run_json("compare", stored, stored)
    assert comparison["pairs"][0]["surprise_delta"]["value"] == 0
    assert "surprise B" in run("compare", stored, stored).stdout


def test_the_help_names_every_metric_that_a_gate_may_ask_for(run):
    from quantkit.evaluation.gates import gate_units

    shown = " ".join(run("eval", "--help").stdout.split())
    for name in gate_units():
        assert name in shown
