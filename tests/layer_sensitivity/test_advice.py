"""Earlier results: which are read, and another budget's solution of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import make_llama

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import EvaluationError, NotComparableError, RecipeError
from quantkit.layer_sensitivity.advice import read_earlier_result, solve_again
from quantkit.layer_sensitivity.result import Sensitivity

STORED = Path(__file__).with_name("stored_result.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(make_llama(tmp_path_factory.mktemp("advice") / "model"))


@pytest.fixture
def content(checkpoint) -> dict:
    """The JSON of a result of that checkpoint."""
    content = json.loads(STORED.read_text(encoding="utf-8"))
    content["model"]["fingerprint"] = checkpoint.fingerprint()
    return content


def written(tmp_path, content) -> Path:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    return path


def test_a_result_is_read_as_it_was_written(checkpoint, content, tmp_path):
    found = read_earlier_result(written(tmp_path, content), checkpoint)
    assert json.dumps(found.to_json()) == json.dumps(content)
    # What `--json` printed of a run that was complete already isn't a run itself.
    printed = written(tmp_path, content | {"was_finished": True})
    assert read_earlier_result(printed, checkpoint) == found


def test_keys_of_a_later_version_are_ignored(checkpoint, content, tmp_path):
    more = content | {"more": [1]}
    more["sets"] = [group | {"more": None} for group in content["sets"]]
    found = read_earlier_result(written(tmp_path, more), checkpoint)
    assert found == Sensitivity.from_json(content)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.clear(),
        lambda content: content.pop("sets"),
        lambda content: content.pop("model"),
        lambda content: content.pop("pareto"),
        lambda content: content.update(sets={}),
        lambda content: content.update(sets=[], ranking=[]),
        lambda content: content.update(ranking=content["ranking"][1:]),
        lambda content: content.update(floor=[]),
        lambda content: content.update(additivity={}),
        lambda content: content["sets"][0].update(choices=[]),
        lambda content: content["sets"][0]["choices"].pop("keep"),
        lambda content: content["sets"][0]["choices"]["recipe"].pop("kld"),
        lambda content: content["sets"][0]["choices"]["recipe"].update(bytes="many"),
        lambda content: content["sets"][0].update(block=7),
        lambda content: content["solution"]["choices"].pop(),
        lambda content: content["solution"].update(choices=["mxfp8"] * 8),
    ],
)
def test_damaged_files_are_refused(edit, checkpoint, content, tmp_path):
    edit(content)
    with pytest.raises(EvaluationError, match="is not a result that sensitivity has written"):
        read_earlier_result(written(tmp_path, content), checkpoint)


def test_what_is_no_json_object_is_refused(checkpoint, content, tmp_path):
    for text in ("", "[1]", json.dumps(content)[:-2]):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(EvaluationError, match="is not a result"):
            read_earlier_result(tmp_path / "r.json", checkpoint)
    with pytest.raises(EvaluationError, match="is not a result"):
        read_earlier_result(tmp_path / "none.json", checkpoint)


def test_results_of_other_versions_models_and_recipes_are_refused(checkpoint, content, tmp_path):
    with pytest.raises(EvaluationError, match="has format 9"):
        read_earlier_result(written(tmp_path, content | {"schema_version": 9}), checkpoint)
    other = content | {"model": content["model"] | {"fingerprint": "x"}}
    with pytest.raises(NotComparableError, match="r.json was made from another model"):
        read_earlier_result(written(tmp_path, other), checkpoint)
    unknown = content | {"recipe": content["recipe"] | {"scheme": "int9-dynamic"}}
    with pytest.raises(RecipeError, match="int9-dynamic"):
        read_earlier_result(written(tmp_path, unknown), checkpoint)


def test_another_budget_changes_the_solution_alone(content):
    result = Sensitivity.from_json(content)
    solved = solve_again(result, "+60%", None, [])
    assert replace(solved, solution=result.solution) == result
    assert solved.solution.kld_predicted < result.solution.kld_predicted
    assert solved.solution.measured is None and result.solution.measured is not None
    assert solve_again(result, None, None, []).solution is None
    with pytest.raises(EvaluationError, match="mxfp8 was not scored"):
        solve_again(result, "+5%", None, ["mxfp8"])
