"""Every recipe in configs/ runs end to end on a tiny model."""

from pathlib import Path

import pytest
import yaml

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.exporter.verify import verify
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import SCHEMES

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_exports_a_sound_checkpoint(path, export_to, llama, calib, text, tmp_path):
    recipe = Recipe.load(path)
    if recipe.quantizes_weights:
        calib = tmp_path / "own"
        calibrate(CalibrationOptions(llama, calib, (str(text),), recipe, num_samples=4, seq_len=32))
    found = verify(export_to(recipe, calibration=calib), llama)
    assert found.faults == () and found.quantized == 14


def test_every_scheme_has_a_recipe_of_its_name():
    assert set(SCHEMES) <= {path.stem for path in CONFIGS}
    for name in SCHEMES:
        assert Recipe.load(CONFIGS[0].parent / f"{name}.yaml").scheme == SCHEMES[name]


def test_every_recipe_says_what_it_is_for():
    for path in CONFIGS:
        assert path.read_text().startswith("# ") and yaml.safe_load(path.read_text())


def test_commands_of_the_ci_example_parse_and_its_gates_too():
    import shlex

    from quantkit.cli.main import main
    from quantkit.evaluation.gates import Gate, gate_units

    workflow = yaml.safe_load((CONFIGS[0].parent / "ci" / "quality-gate.yml").read_text())
    commands = [
        shlex.split(step["run"])
        for step in workflow["jobs"]["evaluate"]["steps"]
        if step.get("run", "").startswith("quantkit ")
    ]
    parsed = {
        name: main.commands[name].make_context(name, arguments).params
        for _, name, *arguments in commands
    }
    assert set(parsed) == {"quantize", "eval"} and parsed["eval"]["strict"]
    assert {Gate.parse(gate).metric for gate in parsed["eval"]["gates"]} == set(gate_units())
    assert (CONFIGS[0].parent.parent / workflow["env"]["RECIPE"]) in CONFIGS
