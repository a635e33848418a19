"""Schemes, patterns and recipes as values."""

import subprocess
import sys

import pytest

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, TOKEN, QuantSpec, block, group
from quantkit.schemes.recipe import Algorithm, Recipe
from quantkit.schemes.scheme import CATALOGUE, SCHEMES, QuantScheme

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
    "lm_head",
]


def matching(text: str) -> list[str]:
    return [name for name in MODULES if Pattern(text).matches(name)]


def test_schemes_need_no_torch():
    code = "import sys, quantkit.schemes.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Granularity


@pytest.mark.parametrize(
    "granularity, shape, scales",
    [
        (TENSOR, (5, 7), (1, 1)),
        (CHANNEL, (5, 7), (5, 1)),
        (TOKEN, (0, 7), (0, 1)),
        (TOKEN, (1, 7), (1, 1)),
        (group(4), (5, 7), (5, 2)),
        (group(4), (5, 8), (5, 2)),
        (group(4), (0, 8), (0, 2)),
        (TENSOR, (0, 0), (0, 0)),
        (block(128, 128), (576, 576), (5, 5)),
        (block(128, 128), (1, 129), (1, 2)),
        (block(2, 3), (5, 7), (3, 3)),
        (block(2, 3), (0, 7), (0, 3)),
    ],
    ids=str,
)
def test_scales_cover_every_begun_block(granularity, shape, scales):
    assert granularity.scale_shape(*shape) == scales


@pytest.mark.parametrize("size", [0, -1, 1.5, "128", True])
def test_sizes_that_are_no_positive_whole_number_are_refused(size):
    with pytest.raises(RecipeError, match="positive whole number"):
        group(size)


# Names


def test_every_scheme_is_what_the_design_says():
    fp8, int8, mx = (
        QuantSpec(FP8_E4M3, CHANNEL),
        QuantSpec(INT8, CHANNEL),
        QuantSpec(FP8_E4M3, group(32), False, E8M0),
    )
    expected = {
        "fp8-dynamic": (fp8, QuantSpec(FP8_E4M3, TOKEN, True)),
        "fp8-static": (fp8, QuantSpec(FP8_E4M3, TENSOR)),
        "fp8-tensor": (QuantSpec(FP8_E4M3, TENSOR), QuantSpec(FP8_E4M3, TENSOR)),
        "fp8-block": (QuantSpec(FP8_E4M3, block(128, 128)), QuantSpec(FP8_E4M3, group(128), True)),
        "mxfp8": (mx, QuantSpec(FP8_E4M3, group(32), True, E8M0)),
        "fp8-weight-only": (fp8, None),
        "int8-dynamic": (int8, QuantSpec(INT8, TOKEN, True)),
        "int8-static": (int8, QuantSpec(INT8, TENSOR)),
        "int8-weight-only": (int8, None),
    }
    assert {name: (scheme.weight, scheme.input) for name, scheme in SCHEMES.items()} == expected


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("FP8_DYNAMIC", "fp8-dynamic"),
        ("FP8_STATIC", "fp8-static"),
        ("FP8", "fp8-tensor"),
        ("FP8_BLOCK", "fp8-block"),
        ("MXFP8", "mxfp8"),
        ("W8A8", "int8-dynamic"),
        ("INT8", "int8-dynamic"),
        ("W8A16", "int8-weight-only"),
    ],
)
def test_names_of_the_field_are_aliases(name, scheme):
    assert name in CATALOGUE[scheme].aliases
    assert QuantScheme.parse(name) is QuantScheme.parse(name.lower()) is SCHEMES[scheme]


@pytest.mark.parametrize("name", SCHEMES)
def test_names_ignore_case_and_the_kind_of_dash(name):
    for spelled in (name.upper(), name.title(), name.replace("-", "_"), f" {name} "):
        assert QuantScheme.parse(spelled) is SCHEMES[name]


def test_an_unknown_scheme_gets_the_nearest_name_and_all_of_them():
    with pytest.raises(
        RecipeError, match="unknown scheme 'fp8-dynmic'; did you mean 'fp8-dynamic'"
    ) as refusal:
        QuantScheme.parse("fp8-dynmic")
    assert all(name in str(refusal.value) for name in SCHEMES)


def test_a_name_like_no_scheme_gets_no_guess():
    with pytest.raises(RecipeError) as refusal:
        QuantScheme.parse("zzzzzzzzzz")
    assert "did you mean" not in str(refusal.value)


# Arguments


@pytest.mark.parametrize("name", SCHEMES)
def test_arguments_of_a_scheme_read_back_as_the_scheme(name):
    scheme = SCHEMES[name]
    description = {
        "weights": scheme.weight.to_arguments(),
        "input_activations": scheme.input and scheme.input.to_arguments(),
    }
    assert QuantScheme.parse(description) is scheme
    assert QuantScheme.parse(scheme.to_description()) is scheme


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(INT8, group(64)),
        QuantSpec(FP8_E4M3, block(64, 32)),
        QuantSpec(FP8_E4M3, TOKEN, True),
    ],
    ids=str,
)
def test_arguments_of_a_spec_read_back_as_the_spec(spec):
    assert QuantSpec.from_arguments(spec.to_arguments(), "weights") == spec


def test_arguments_are_in_the_words_of_compressed_tensors():
    assert SCHEMES["fp8-dynamic"].weight.to_arguments() == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    assert SCHEMES["int8-dynamic"].input.to_arguments() == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    assert SCHEMES["fp8-block"].weight.to_arguments()["block_structure"] == [128, 128]
    assert (
        SCHEMES["mxfp8"].weight.to_arguments() | {"group_size": 32, "scale_dtype": "torch.uint8"}
        == SCHEMES["mxfp8"].weight.to_arguments()
    )


def test_a_custom_scheme_keeps_its_arithmetic_through_its_description():
    scheme = QuantScheme.parse(
        {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}}
    )
    assert (scheme.weight, scheme.input) == (QuantSpec(INT8, group(64)), None)
    assert scheme.name not in SCHEMES
    assert QuantScheme.parse(scheme.to_description()) == scheme


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_bits": 4, "type": "int"}, "4 bits"),
        ({"type": "complex"}, "'complex'"),
        ({"symetric": True}, "unknown key 'symetric'"),
        ({"symmetric": False}, "asymmetric"),
        ({"strategy": "row"}, "unknown strategy 'row'"),
        ({"strategy": "group", "group_size": 0}, "positive whole number"),
        ({"strategy": "group"}, "group"),
        ({"strategy": "block"}, "block_structure"),
        ({"strategy": "block", "block_structure": [128]}, "block_structure"),
        ({"strategy": "block", "block_structure": [None, 128]}, "block"),
        ({"dynamic": "local"}, "'local'"),
        ({"actorder": "group"}, "actorder"),
        ("int8", "must be a mapping"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(RecipeError, match=words):
        QuantSpec.from_arguments(arguments, "here")


def test_a_refusal_names_the_place():
    description = {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 3},
    }
    with pytest.raises(RecipeError, match="layers: lm_head: input_activations asks for 3 bits"):
        Recipe.from_mapping({"scheme": "fp8", "layers": {"lm_head": description}}, "recipe.yaml")


@pytest.mark.parametrize(
    "weight, inputs, words",
    [
        (QuantSpec(INT8, CHANNEL, dynamic=True), None, "dynamic"),
        (QuantSpec(INT8, TOKEN), None, "per token"),
        (QuantSpec(INT8, CHANNEL), QuantSpec(FP8_E4M3, TOKEN, True), "one format"),
        (QuantSpec(INT8, CHANNEL), QuantSpec(INT8, TENSOR, True), "dynamic inputs"),
        (QuantSpec(INT8, CHANNEL), QuantSpec(INT8, TOKEN), "static inputs"),
    ],
    ids=["dynamic weight", "token weight", "two formats", "dynamic tensor", "static token"],
)
def test_schemes_that_nothing_computes_are_refused(weight, inputs, words):
    with pytest.raises(RecipeError, match=words):
        QuantScheme("made-up", weight, inputs)


def test_a_scheme_with_an_unknown_key_is_refused():
    with pytest.raises(RecipeError, match="unknown key 'activations'"):
        QuantScheme.parse({"weights": {"strategy": "channel"}, "activations": None})


def test_static_inputs_need_calibration_and_no_others_do():
    assert {name for name, scheme in SCHEMES.items() if scheme.needs_calibration} == {
        "fp8-static",
        "fp8-tensor",
        "int8-static",
    }


# Patterns


def test_a_name_matches_itself_only():
    assert matching("lm_head") == ["lm_head"]
    assert matching("model.layers.1.mlp.down_proj") == ["model.layers.1.mlp.down_proj"]
    assert matching("down_proj") == matching("model.layers.1") == []
    assert not Pattern("a.b").matches("axb")


def test_a_glob_matches_the_whole_name():
    assert matching("*down_proj") == MODULES[1:4]
    assert matching("model.layers.?.mlp.*") == MODULES[1:3]
    assert matching("model.layers.[1-9].*") == ["model.layers.1.mlp.down_proj"]
    assert matching("*mlp") == []


def test_a_regular_expression_is_anchored_at_the_start_only():
    assert matching(r"re:.*layers\.1\.") == ["model.layers.1.mlp.down_proj"]
    assert matching("re:down_proj") == []
    assert matching("re:model") == MODULES[:4]


@pytest.mark.parametrize("text", ["", "  ", None, 7, "re:(", "re:*"])
def test_a_pattern_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="pattern"):
        Pattern(text)


@pytest.mark.parametrize(
    "text, hint",
    [
        ("down_proj", "did you mean 're:.*down_proj'"),
        ("lm_haed", "the nearest name is 'lm_head'"),
        ("model.layers.0.mlp.down_prj", "the nearest name is 'model.layers.0.mlp.down_proj'"),
        ("re:.*xyz", "a name looks like 'model.layers.0.self_attn.q_proj'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_a_hint(text, hint):
    with pytest.raises(RecipeError, match="matches no module") as refusal:
        Pattern(text).require_match(MODULES, "ignore")
    assert hint in str(refusal.value)
    assert "ignore" in str(refusal.value)


def test_a_pattern_that_matches_one_name_is_accepted():
    assert Pattern("re:.*q_proj").require_match(iter(MODULES), "ignore") is None


# Recipes


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
        recipe.chooses_weights
        and recipe.needs_calibration
        and Recipe.from_mapping(recipe.to_mapping(), "again") == recipe
    )
    assert (
        recipe.algorithm("smoothquant")["strength"] == 0.5
        and recipe.algorithm("gptq")["act_order"] is True
    )
    assert not Recipe.from_mapping({"scheme": "int8", "algorithms": ["rtn"]}, "r").chooses_weights
    with pytest.raises(RecipeError, match="'gptq' stands twice"):
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
