"""What is added from outside, in as few places as docs promise, works everywhere.

One section for each kind of extension.
"""

# ---- Algorithms: one row in the table, and one module.

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from chosen_weights import quantized, recipe_of

from quantkit.algorithms.layer_group import INPUT_SUMS
from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.calibration.results import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CalibrationError, RecipeError
from quantkit.ops.reference import quantize
from quantkit.schemes.algorithms import (
    ALGORITHMS,
    CHANGES_WEIGHTS,
    AlgorithmRow,
    Description,
    Setting,
)

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
        changes=CHANGES_WEIGHTS,
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
