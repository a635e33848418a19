"""The recipe that a solution stands for."""

import re

from tiny_models import make_model

from quantkit.checkpoint.reader import Checkpoint
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.layer_sensitivity.advice import solution_recipe
from quantkit.models.assignment import assign_layers
from quantkit.schemes.pattern import Pattern
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

INT8 = Recipe(QuantScheme.parse("int8-dynamic"))


def test_the_recipe_of_a_solution_keeps_exceptions_for_stacked_experts(tmp_path):
    """Both schemes have the same size, so that only the recipe itself tells whether they were
    lost.
    """
    make_model(tmp_path / "moe", "granitemoe", times=2)
    checkpoint = Checkpoint.open(tmp_path / "moe")
    linears = [
        name
        for name in assign_layers(checkpoint, INT8).linears
        if ".layers.0." in name and ".experts." in name
    ]
    whole = plan_export(ExportOptions(tmp_path / "moe", tmp_path / "none", INT8)).bytes_after
    solution = {"choices": ["fp8-dynamic"], "bytes": whole}
    made = solution_recipe(
        {
            "recipe": INT8.to_mapping(),
            "bytes": {},
            "sets": [{"linears": linears}],
            "solution": solution,
        },
        checkpoint,
    )
    moved = {
        name
        for name, linear in assign_layers(checkpoint, made).linears.items()
        if linear.scheme.name == "fp8-dynamic"
    }
    assert len(linears) == 12 and moved == set(linears)


def test_patterns_name_blocks_together_and_experts_as_one():
    from quantkit.schemes.pattern import patterns_for

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
