"""Recipes as values, and the files that hold them."""

import pytest

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import INT8
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.quant_spec import QuantSpec, group
from quantkit.schemes.recipe import Algorithm, Recipe
from quantkit.schemes.scheme import SCHEMES

RECIPE = """
scheme: INT8
algorithms: [rtn]
ignore: ["re:.*layers\\\\.0\\\\..*", lm_head]
layers:
  "re:.*down_proj": fp8-dynamic
  "*q_proj":
    weights: {num_bits: 8, type: int, strategy: group, group_size: 64}
kv_cache: fp8
"""


def test_a_recipe_file_says_what_it_says(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = Recipe.load(path)
    assert recipe.scheme is SCHEMES["int8-dynamic"]
    assert recipe.algorithms == (Algorithm("rtn"),)
    assert recipe.ignore == (Pattern(r"re:.*layers\.0\..*"), Pattern("lm_head"))
    assert [pattern.text for pattern, _ in recipe.layers] == ["re:.*down_proj", "*q_proj"]
    assert recipe.layers[0][1] is SCHEMES["fp8-dynamic"]
    assert recipe.layers[1][1].weight == QuantSpec(INT8, group(64))
    assert recipe.kv_cache == "fp8"


def test_a_recipe_reads_back_from_its_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = Recipe.load(path)
    again = Recipe.from_mapping(recipe.to_mapping(), "calibration.json")
    assert again == recipe
    assert again.canonical() == recipe.canonical()


def test_one_meaning_has_one_canonical_text():
    one, alias = (
        Recipe.from_mapping({"scheme": "W8A8"}, "a"),
        Recipe.from_mapping({"ignore": [], "scheme": "int8-dynamic"}, "b"),
    )
    assert one.canonical() == alias.canonical()
    assert (
        one.canonical()
        != Recipe.from_mapping({"scheme": "int8-dynamic", "ignore": ["lm_head"]}, "c").canonical()
    )


def test_the_order_of_exceptions_is_part_of_the_meaning():
    entries = {"re:.*q_proj": "fp8-dynamic", "re:.*proj": "int8-dynamic"}
    one = Recipe.from_mapping({"scheme": "mxfp8", "layers": entries}, "a")
    other = Recipe.from_mapping({"scheme": "mxfp8", "layers": dict(reversed(entries.items()))}, "b")
    assert one.canonical() != other.canonical()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"scheme": "fp8", "ignored": []}, "unknown key 'ignored'"),
        ({"ignore": []}, "names no scheme"),
        ({"scheme": "fp8-dynamik"}, "did you mean 'fp8-dynamic'"),
        ({"scheme": "fp8", "ignore": "lm_head"}, "ignore must be a list"),
        ({"scheme": "fp8", "ignore": [7]}, "pattern 7"),
        ({"scheme": "fp8", "layers": ["lm_head"]}, "layers must be a mapping"),
        ({"scheme": "fp8", "layers": {"lm_head": "none"}}, "unknown scheme 'none'"),
        ({"scheme": "fp8", "algorithms": "rtn"}, "algorithms must be a list"),
        ({"scheme": "fp8", "algorithms": ["made-up"]}, "unknown algorithm 'made-up'"),
        ({"scheme": "fp8", "kv_cache": "int4"}, "unknown kv_cache 'int4'"),
        (["scheme"], "is not a recipe"),
        (None, "is not a recipe"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(content, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_mapping(content, "recipe.yaml")


def test_settings_of_an_algorithm_are_not_dropped_in_silence():
    with pytest.raises(RecipeError, match="damping"):
        Recipe.from_mapping(
            {"scheme": "fp8-dynamic", "algorithms": [{"rtn": {"damping": 0.01}}]}, "recipe.yaml"
        )


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"smoothquant": {"strength": 1.5}},
            "'strength' of the algorithm 'smoothquant' is 1.5, not a number from 0 to 1",
        ),
        ({"gptq": {"act_order": 1}}, "allowed are true and false"),
        (
            {"gptq": {"dampening": 0.1}},
            (
                "no setting 'dampening'; allowed are 'act_order', 'correct_inputs', 'damping',"
                " 'passes'"
            ),
        ),
        ({"gptq": {"passes": 1.5}}, "is 1.5, not a whole number"),
        ({"gptq": {"passes": -1}}, "is -1, not a number from 0 to 100"),
        ({"gptq": [0.1]}, "must be a mapping"),
        ({"gptq": {}, "rtn": {}}, "write each as a name"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(entry, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_mapping({"scheme": "fp8-dynamic", "algorithms": [entry]}, "recipe.yaml")


def test_settings_are_read_and_others_are_the_usual():
    recipe = Recipe.from_mapping(
        {"scheme": "int8", "algorithms": [{"smoothquant": {"strength": 0.5}}, "gptq"]},
        "recipe.yaml",
    )
    assert (
        recipe.quantizes_weights
        and recipe.needs_calibration
        and Recipe.from_mapping(recipe.to_mapping(), "again") == recipe
    )
    assert (
        recipe.algorithm("smoothquant")["strength"] == 0.5
        and recipe.algorithm("gptq")["act_order"] is True
    )
    assert not Recipe.from_mapping({"scheme": "int8", "algorithms": ["rtn"]}, "r").quantizes_weights
    with pytest.raises(RecipeError, match="'gptq' appears twice"):
        Recipe.from_mapping(
            {"scheme": "int8", "algorithms": ["gptq", {"gptq": {"damping": 0.1}}]}, "r"
        )


def test_a_missing_or_broken_recipe_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe file"):
        Recipe.load(tmp_path / "none.yaml")
    for content in (b"scheme: [", b"scheme: \xff\xfe"):
        (tmp_path / "broken.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match="not readable as YAML"):
            Recipe.load(tmp_path / "broken.yaml")


def test_options_add_to_a_recipe_and_leave_it_unchanged():
    recipe = Recipe.from_mapping({"scheme": "fp8-dynamic", "ignore": ["lm_head"]}, "recipe.yaml")
    wider = recipe.with_options(["*down_proj"], "fp8")
    assert [pattern.text for pattern in wider.ignore] == ["lm_head", "*down_proj"]
    assert (wider.kv_cache, recipe.kv_cache) == ("fp8", None)
    assert wider.with_options().kv_cache == "fp8"


def test_a_recipe_needs_calibration_for_one_static_layer_or_a_cache():
    dynamic = {"scheme": "fp8-dynamic"}
    assert not Recipe.from_mapping(dynamic, "r").needs_calibration
    assert Recipe.from_mapping(dynamic | {"kv_cache": "fp8"}, "r").needs_calibration
    assert Recipe.from_mapping(
        dynamic | {"layers": {"lm_head": "int8-static"}}, "r"
    ).needs_calibration
