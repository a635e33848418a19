"""Every recipe in configs/ runs end to end on a tiny model."""

from pathlib import Path

import pytest
import yaml

from quantkit.scheme import SCHEMES, Recipe
from quantkit.verification import verify

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_exports_a_sound_checkpoint(path, export_to, llama):
    found = verify(export_to(Recipe.load(path)), llama)
    assert found.faults == [] and found.quantized == 14


def test_every_scheme_has_a_recipe_of_its_name():
    assert set(SCHEMES) <= {path.stem for path in CONFIGS}
    for name in SCHEMES:
        assert Recipe.load(CONFIGS[0].parent / f"{name}.yaml").scheme == SCHEMES[name]


def test_every_recipe_says_what_it_is_for():
    for path in CONFIGS:
        assert path.read_text().startswith("# ") and yaml.safe_load(path.read_text())
