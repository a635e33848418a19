"""The result of `sensitivity`: its JSON is that of a stored example, key for key, and comes back;
a solution's recipe.
"""

import dataclasses
import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llama import make_llama, make_text
from tiny_models import make_model

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import EvaluationError, NotComparableError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.layer_sensitivity import result as result_module
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.layer_sqnr import LayerSqnr
from quantkit.layer_sensitivity.options import KEEP, SensitivityOptions
from quantkit.layer_sensitivity.progress import ComparedLayers, ResumeState
from quantkit.layer_sensitivity.report import group_rows
from quantkit.layer_sensitivity.result import CheckpointBytes, LinearSqnr, ScoredModel, Sensitivity
from quantkit.layer_sensitivity.score import score_sensitivity
from quantkit.models.assignment import assign_layers
from quantkit.models.distributed import joined_ranks
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

STORED = Path(__file__).with_name("stored_result.json")
INT8 = Recipe(QuantScheme.parse("int8-dynamic"))
# Of the machine and the version, not of the model and the text.
OF_THE_MACHINE = {"quantkit_version", "fingerprint"}


def stored() -> dict:
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.fixture
def result() -> Sensitivity:
    return Sensitivity.from_json(stored())


def require_same(found, expected, key: str = "") -> None:
    """The same keys in the same order, the same types, and the same values but for the machine."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), key
        for name in set(expected) - OF_THE_MACHINE:
            require_same(found[name], expected[name], name)
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), key
        for ours, theirs in zip(found, expected):
            require_same(ours, theirs, key)
    elif isinstance(expected, float):
        assert isinstance(found, float), key
        # Rounding in another order may move a code, and one code more or less these small KLs.
        assert found == pytest.approx(expected, rel=0.1, abs=1e-6), key
    else:
        assert found == expected and type(found) is type(expected), key


def scored(directory: Path) -> Sensitivity:
    """The run that wrote the stored example, in the current directory."""
    make_llama(directory, dtype=torch.float32, hidden_size=64, intermediate_size=96)
    Path("text.txt").write_text(make_text(600))
    options = SensitivityOptions(
        directory,
        INT8,
        (KEEP, "fp8-dynamic"),
        data=("text.txt",),
        max_tokens=256,
        seq_len=64,
        max_size="+10%",
        device="cpu",
        output=Path("r.json"),
    )
    return score_sensitivity(options)


def test_the_json_is_that_of_the_stored_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = scored(Path("model"))
    content = json.loads(Path("r.json").read_text(encoding="utf-8"))
    require_same(content, stored())
    assert result.as_stored().to_json() == content
    assert list(result.to_json()) == [*content, "seconds", "peak_memory_bytes"]
    assert result.seconds > 0 and result.peak_memory_bytes > 0 and not result.was_finished


def test_a_result_comes_back_from_its_json_as_it_was(result):
    assert json.dumps(result.to_json()) == json.dumps(stored())
    assert Sensitivity.from_json(json.loads(json.dumps(result.to_json()))) == result
    first, kept = result.scores.groups[0], stored()["sets"][0]["choices"][KEEP]
    assert first.choices[KEEP].metrics is None and first.choices[KEEP].own_kld == 0
    assert kept == {"bytes": first.choices[KEEP].bytes}
    metrics = first.choices[RECIPE].metrics
    assert metrics.kld_low <= metrics.kld <= metrics.kld_high
    printed = replace(result, seconds=1.5, peak_memory_bytes=7, was_finished=True)
    assert list(printed.to_json())[-3:] == ["seconds", "peak_memory_bytes", "was_finished"]
    assert Sensitivity.from_json(printed.to_json()) == printed and printed.as_stored() == result


def test_a_result_of_an_earlier_version_lacks_what_came_later():
    content = stored()
    for name in ("quantkit_version", "fingerprint", "solution"):
        del content[name]
    del content["bytes"]["untied"]
    found = Sensitivity.from_json(content)
    assert found.solution is None and found.scores.bytes.untied == 0


def test_an_exact_linear_has_no_number_in_json_and_an_infinite_sqnr(result):
    exact = LinearSqnr(name="a", weight_sqnr_db=math.inf, output_sqnr_db=math.inf)
    unused = LinearSqnr(name="b", weight_sqnr_db=math.inf)
    group = replace(result.ranking[0], layers=(exact, unused))
    groups = tuple(group if each.name == group.name else each for each in result.scores.groups)
    changed = replace(result, scores=replace(result.scores, groups=groups))
    content = changed.to_json()
    assert content["sets"][result.order[0]]["layers"] == [
        {"name": "a", "weight_sqnr_db": None, "output_sqnr_db": None},
        {"name": "b", "weight_sqnr_db": None},
    ]
    assert Sensitivity.from_json(content) == changed
    assert group_rows(changed)[0][6:8] == ("exact", "exact")


def test_the_layers_of_an_interrupted_run_are_read_as_they_were_stored(tmp_path):
    exact = LinearSqnr(name="a", weight_sqnr_db=math.inf, output_sqnr_db=31.25)
    unused = LinearSqnr(name="b", weight_sqnr_db=40.5)
    layers = ComparedLayers(2, {0: (exact,), 3: (unused,)})
    with joined_ranks("cpu") as ranks:

        def state(resume: bool) -> ResumeState:
            output = tmp_path / "r.json"
            return ResumeState.open(ranks, None, output, {"a": "b"}, resume, overwrite=False)

        first = state(resume=False)
        assert first.layers() == ComparedLayers()
        first.record_layers(layers)
        assert state(resume=True).layers() == layers
        assert LayerSqnr(ranks, layers).by_place() == layers.by_place


def test_values_are_frozen(result):
    kinds = [
        kind
        for _, kind in inspect.getmembers(result_module, dataclasses.is_dataclass)
        if kind.__module__ == result_module.__name__
    ]
    assert len(kinds) == 13 and all(kind.__dataclass_params__.frozen for kind in kinds)
    for value in (result, result.model, result.scores.groups[0], result.solution):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.bytes = 0


def test_the_ranking_starts_with_the_group_that_costs_most(result):
    losses = [group.own_kld for group in result.ranking]
    assert losses == sorted(losses, reverse=True) and len(losses) == len(result.scores.groups)


def test_a_result_is_shown_on_one_line(result):
    shown = repr(result)
    assert "\n" not in shown and len(shown) < 300 and shown == str(result)
    for words in ("model", "int8-dynamic", "8 layer groups", "2 groups changed"):
        assert words in shown
    assert all((group.name in shown) == (rank < 3) for rank, group in enumerate(result.ranking))
    assert "no budget" in repr(replace(result, solution=None))


# ---- Recipes.


def test_the_recipe_is_what_the_command_writes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = scored(Path("model"))
    done = run(
        *("sensitivity", "model", "--from", "r.json", "--max-size", "+10%"),
        *("--recipe-out", "r.yaml"),
    )
    assert done.exit_code == 0, done.output
    assert result.recipe() == Recipe.load("r.yaml")
    assert Sensitivity.from_json(json.loads(Path("r.json").read_text())).recipe() == result.recipe()
    planned = plan_export(ExportOptions(Path("model"), Path("out"), result.recipe()))
    assert planned.bytes_after == result.solution.bytes

    moved = Path("model").rename("elsewhere")
    assert result.recipe(moved) == result.recipe(str(moved)) == Recipe.load("r.yaml")
    make_llama(Path("model"), seed=3)
    with pytest.raises(NotComparableError, match="the result was made from another model"):
        result.recipe()


def test_without_a_budget_there_is_no_recipe(result):
    with pytest.raises(EvaluationError, match="no budget was given"):
        replace(result, solution=None).recipe()


def test_the_recipe_of_a_solution_keeps_exceptions_for_stacked_experts(result, tmp_path):
    """Both schemes have the same size, so that only the recipe itself tells whether they were
    lost.
    """
    make_model(tmp_path / "moe", "granitemoe", times=2)
    checkpoint = Checkpoint.open(tmp_path / "moe")
    linears = tuple(
        name
        for name in assign_layers(checkpoint, INT8).linears
        if ".layers.0." in name and ".experts." in name
    )
    plan = plan_export(ExportOptions(tmp_path / "moe", tmp_path / "none", INT8))
    sizes = CheckpointBytes(all_kept=plan.bytes_before, all_quantized=plan.bytes_after)
    experts = replace(result.scores.groups[0], linears=linears)
    made = replace(
        result,
        model=ScoredModel(
            path=str(checkpoint.path), fingerprint=checkpoint.fingerprint(), bytes=plan.bytes_before
        ),
        scores=replace(result.scores, groups=(experts,), bytes=sizes),
        solution=replace(result.solution, choices=("fp8-dynamic",), bytes=plan.bytes_after),
    ).recipe()
    moved = {
        name
        for name, linear in assign_layers(checkpoint, made).linears.items()
        if linear.scheme.name == "fp8-dynamic"
    }
    assert len(linears) == 12 and moved == set(linears)
