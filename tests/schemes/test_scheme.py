"""Schemes as values."""

import subprocess
import sys

import pytest

from quantkit.errors import RecipeError
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, TOKEN, QuantSpec, block, group
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import CATALOGUE, SCHEMES, QuantScheme


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
