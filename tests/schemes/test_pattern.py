"""Patterns made for names match all of these and none of those, whatever the names are."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import RecipeError
from quantkit.schemes.pattern import Pattern, covering_patterns, patterns_for

# Parts as modules have them, a few of which one name has in the place of another.
PARTS = st.sampled_from(
    ["model", "layers", "h", "experts", "0", "1", "2", "10", "q_proj", "k_proj", "up"]
) | st.text("ab_01", min_size=1, max_size=3)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@st.composite
def separated_names(draw) -> tuple[list[str], list[str]]:
    """Two lists without a name in common."""
    names = draw(st.lists(NAMES, min_size=1, max_size=12, unique=True))
    meant = draw(st.lists(st.sampled_from(names), unique=True))
    return meant, [name for name in names if name not in meant]


# As models have them, so that blocks and modules are covered as wholes.
LINEARS = [
    f"model.layers.{number}.{part}"
    for number in (0, 1, 10)
    for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "mlp.experts.3.w1")
]


@st.composite
def separated_linears(draw) -> tuple[list[str], list[str]]:
    meant = draw(st.lists(st.sampled_from(LINEARS), unique=True))
    return meant, [name for name in LINEARS if name not in meant]


def matched(patterns: list[Pattern], names: list[str]) -> list[str]:
    return [name for name in names if any(pattern.matches(name) for pattern in patterns)]


@given(separated_linears() | separated_names())
def test_covering_patterns_match_all_of_these_and_none_of_those(names):
    meant, others = names
    patterns = [Pattern(text) for text in covering_patterns(meant, others)]
    assert matched(patterns, meant) == meant and matched(patterns, others) == []
    assert len(patterns) <= len(meant)


@given(separated_linears() | separated_names())
def test_patterns_of_a_mixed_recipe_match_all_of_these_and_none_of_those(names):
    meant, others = names
    patterns = patterns_for(meant, others)
    assert matched(patterns, meant) == meant and matched(patterns, others) == []
    assert len(patterns) <= len(meant)


def test_a_name_of_one_part_is_covered():
    assert matched([Pattern(text) for text in covering_patterns(["lm_head"], [])], ["lm_head"])


def test_a_whole_block_is_one_pattern():
    block = [name for name in LINEARS if ".layers.1." in name]
    others = [name for name in LINEARS if name not in block]
    assert covering_patterns(block, others) == ["model.layers.1.*"]


def test_one_linear_of_every_block_is_one_pattern():
    queries = [name for name in LINEARS if name.endswith("q_proj")]
    others = [name for name in LINEARS if name not in queries]
    assert len(covering_patterns(queries, others)) == 1 == len(patterns_for(queries, others))


MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.mlp.down_proj",
    "lm_head",
]


def matching(text: str) -> list[str]:
    return [name for name in MODULES if Pattern(text).matches(name)]


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


def test_patterns_name_blocks_together_and_experts_as_one():
    everything = [
        f"model.layers.{block}.mlp.experts.{number}.{leaf}"
        for block in range(12)
        for number in range(3)
        for leaf in ("gate_proj", "up_proj")
    ]
    everything += [f"model.layers.{block}.mlp.down_proj" for block in range(12)]
    names = [name for name in everything if re.match(r"model\.layers\.(1|11)\.", name)]
    patterns = patterns_for(names, set(everything) - set(names))
    assert len(patterns) == 2
    assert [
        name for name in everything if any(pattern.matches(name) for pattern in patterns)
    ] == names
    # what no pattern of whole layers can mean
    some = [name for name in everything if ".experts.1." in name]
    assert set(patterns_for(some, set(everything) - set(some))) == {Pattern(name) for name in some}
