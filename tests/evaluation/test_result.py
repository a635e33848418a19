"""The JSON of `eval`: that of a stored example, key for key, and the way back."""

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import make_llama, make_text

from quantkit.checkpoint.files import finite
from quantkit.evaluation.compare import compare
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.metrics import KLD, METRICS, PPL_DELTA
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.result import Evaluation
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

STORED = Path(__file__).with_name("stored_result.json")
# Of the machine and the version, not of the model and the text.
OF_THE_MACHINE = {
    "quantkit_version",
    "kernel_level",
    "fingerprint",
    "tokens_per_second",
    "peak_memory_bytes",
}
# Counts of tokens near an edge, where the last bit of a float may decide.
COUNTS = {"counts", "zero", "to_wrong", "to_right", "tokens", "more_tokens_needed"}


def stored() -> dict:
    return json.loads(STORED.read_text(encoding="utf-8"))


def require_same(found, expected, key: str = "") -> None:
    """The same keys in the same order, the same types, and the same values but for the machine."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), key
        for name in expected:
            if name not in OF_THE_MACHINE:
                require_same(found[name], expected[name], name)
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), key
        if key == "layers":  # ranked by differences that may be tiny
            found, expected = (
                sorted(rows, key=lambda row: row["name"]) for rows in (found, expected)
            )
        for ours, theirs in zip(found, expected):
            require_same(ours, theirs, key)
    elif key in COUNTS:
        assert found == pytest.approx(expected, rel=0.1, abs=3), key
    elif isinstance(expected, float):
        assert isinstance(found, float) and found == pytest.approx(expected, rel=0.02, abs=1e-4), (
            key
        )
    else:
        assert found == expected and type(found) is type(expected), key


def test_the_json_of_eval_is_that_of_the_stored_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(make_text(600, seed=1))
    make_llama(Path("base"), dtype=torch.float32)
    recipe = Recipe(QuantScheme.parse("int8-dynamic"))
    export(plan_export(ExportOptions(Path("base"), Path("quant"), recipe)))
    options = EvaluationOptions(
        Path("base"),
        (Path("quant"),),
        ("text.txt",),
        32,
        320,
        exec="reference",
        noise_floor=True,
        cache=False,
        gates=tuple(gate["expr"] for gate in stored()["gates"]),
    )
    require_same(finite(evaluate(options).to_json()), stored())


def test_a_result_comes_back_from_its_json_as_it_was():
    evaluation = Evaluation.from_json(stored())
    assert json.dumps(evaluation.to_json()) == json.dumps(stored())
    (quant,) = evaluation.quants
    assert quant.metrics[KLD].mean == stored()["quants"][0]["kld"]["mean"]
    assert quant.window_sums[PPL_DELTA] == tuple(stored()["quants"][0]["window_nll"])
    assert set(quant.metrics.values) == {metric.name for metric in METRICS}


def test_a_result_of_an_earlier_version_lacks_what_came_later():
    content = stored()
    for name in ("tokens_per_unit", "noise_floor", "peak_memory_bytes", "remarks"):
        del content[name]
    del content["quants"][0]["delta_p"], content["base"]["fingerprint"]
    evaluation = Evaluation.from_json(content)
    assert evaluation.tokens_per_unit == 1.0 and evaluation.base.fingerprint is None
    assert "delta_p" not in evaluation.quants[0].metrics.values


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.pop("protocol"),
        lambda content: content.update(quants={}),
        lambda content: content["quants"][0].update(bytes="many"),
        lambda content: content["quants"][0].update(kld=[]),
        lambda content: content["quants"][0].update(window_kld=None),
        lambda content: content["base"].update(perplexity=True),
    ],
)
def test_other_content_is_refused(edit):
    content = stored()
    edit(content)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Evaluation.from_json(content)


def test_the_json_of_compare_has_its_keys_in_order():
    content = compare(STORED, STORED).to_json()
    assert list(content) == [
        *("schema_version", "a", "b", "protocol", "data", "tokens_scored", "windows", "base"),
        *("pairs", "remarks"),
    ]
    assert content["protocol"] == stored()["protocol"] and content["data"] == stored()["data"]
    (pair,) = content["pairs"]
    assert list(pair) == ["a", "b", "ppl_delta_pct", "kld_delta", "top1_delta", "size_ratio"]
    assert list(pair["a"]) == ["path", "scheme", "perplexity", "bytes"]
    assert list(pair["kld_delta"]) == ["value", "low", "high", "method", "smallest_resolvable"]
