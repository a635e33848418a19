import json
import math

import numpy as np
import pytest

from quantkit.errors import EvaluationError, NotComparableError
from quantkit.evaluation.compare import compare
from quantkit.evaluation.metrics import PPL_DELTA


@pytest.fixture
def stored(run, llama, text, export_to, tmp_path):
    """stored("int8-dynamic") → the file of `eval -o` for that scheme."""

    def make(
        scheme: str,
        *options: object,
        base=llama,
        data=text,
        length: int = 32,
        name: str | None = None,
    ):
        path, out = tmp_path / f"{name or scheme}.json", tmp_path / f"out-{scheme}"
        out = out if out.exists() else export_to(scheme)
        assert (
            run(
                "eval",
                base,
                out,
                "--data",
                data,
                "--seq-len",
                length,
                "--max-tokens",
                960,
                "-o",
                path,
                "-q",
                *options,
            ).exit_code
            == 0
        )
        return path

    return make


def change(path, edit):
    result = json.loads(path.read_text())
    edit(result)
    path.write_text(json.dumps(result))
    return path


def test_two_results_compare_as_if_evaluated_together(stored, run, run_json):
    first, second = stored("int8-dynamic"), stored("fp8-dynamic")
    a, b = (json.loads(path.read_text())["quants"][0] for path in (first, second))
    comparison = run_json("compare", first, second)
    (pair,) = comparison["pairs"]
    assert pair["ppl_delta_pct"]["value"] == pytest.approx(
        100 * (b["perplexity"] / a["perplexity"] - 1)
    )
    assert (
        pair["ppl_delta_pct"]["low"]
        < pair["ppl_delta_pct"]["value"]
        < pair["ppl_delta_pct"]["high"]
    )
    assert pair["kld_delta"]["value"] == pytest.approx(b["kld"]["mean"] - a["kld"]["mean"])
    assert pair["top1_delta"]["value"] == pytest.approx(b["top1_agreement"] - a["top1_agreement"])
    # Paired: narrower than the difference of two intervals.
    apart = math.hypot(
        *(quant["ppl_delta_pct"]["high"] - quant["ppl_delta_pct"]["low"] for quant in (a, b))
    )
    assert pair["ppl_delta_pct"]["high"] - pair["ppl_delta_pct"]["low"] < 1.05 * apart
    (itself,) = run_json("compare", first, first)["pairs"]
    assert (
        itself["ppl_delta_pct"]["value"],
        itself["kld_delta"]["high"],
        itself["top1_delta"]["low"],
        itself["size_ratio"],
    ) == (0, 0, 0, 1)
    table = run("compare", first, second)
    assert (
        table.exit_code == 0 and "B against A" in table.stdout and "out-fp8-dynamic" in table.stdout
    )


def test_several_quants_are_compared_each_with_each(stored, run_json):
    first, second = stored("int8-dynamic"), stored("fp8-dynamic")
    both = json.loads(first.read_text())
    both["quants"] += json.loads(second.read_text())["quants"]
    second.write_text(json.dumps(both))
    assert len(run_json("compare", first, second)["pairs"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, length, what",
    [
        ((), 64, "different protocols"),
        (("--protocol", "llamacpp"), 32, "different protocols"),
        (("--max-tokens", 320), 32, "different tokens"),
    ],
)
def test_other_protocols_or_tokens_are_not_comparable(options, length, what, stored, run):
    first, second = (
        stored("int8-dynamic"),
        stored("int8-dynamic", *options, length=length, name="other"),
    )
    refused = run("compare", first, second)
    assert (
        refused.exit_code == 5
        and what in refused.stderr
        and len(refused.stderr.strip().splitlines()) == 1
    )


def test_another_base_is_not_comparable(stored, tmp_path):
    from tiny_llama import make_llama

    first, second = (
        stored("int8-dynamic"),
        stored("int8-dynamic", base=make_llama(tmp_path / "base", seed=9), name="other"),
    )
    with pytest.raises(NotComparableError, match="different bases"):
        compare(first, second)


def test_another_place_of_the_same_base_is_comparable(stored, copy, llama):
    first, second = (stored("int8-dynamic"), stored("int8-dynamic", base=copy(llama), name="other"))
    assert compare(first, second).pairs[0].deltas[PPL_DELTA].value == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit, what",
    [
        (lambda result: result.update(schema_version=99), "schema version 99"),
        (lambda result: result.update(quants=[]), "base model only"),
        (lambda result: result["quants"][0].pop("window_kld"), "damaged"),
        (lambda result: result["quants"][0]["window_nll"].pop(), "damaged"),
        (lambda result: result["quants"][0]["window_nll"].__setitem__(0, None), "damaged"),
        (lambda result: result.pop("protocol"), "damaged"),
        (lambda result: result.pop("schema_version"), "no stored result"),
    ],
)
def test_a_file_that_is_no_whole_result_is_refused(edit, what, stored):
    with pytest.raises(EvaluationError, match=what):
        compare(change(stored("int8-dynamic"), edit), stored("int8-dynamic", name="other"))


def test_what_is_no_json_is_refused(tmp_path, run):
    (tmp_path / "a.json").write_text("{")
    assert run("compare", tmp_path / "a.json", tmp_path / "a.json").exit_code == 1
    refused = run("compare", tmp_path / "gone.json", tmp_path / "a.json")
    assert refused.exit_code == 1 and "there is no file" in refused.stderr


def test_window_sums_are_those_of_the_figures(stored):
    quant = json.loads(stored("int8-dynamic").read_text())["quants"][0]
    result = json.loads(stored("int8-dynamic").read_text())
    assert np.sum(quant["window_kld"]) / result["tokens_scored"] == pytest.approx(
        quant["kld"]["mean"]
    )
    assert np.sum(quant["window_same_top1"]) / result["tokens_scored"] == pytest.approx(
        quant["top1_agreement"]
    )
