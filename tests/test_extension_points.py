"""What a newcomer adds in one place is found everywhere."""

import pytest

# ---- A metric of `eval`: one row of evaluation/metrics.py.


@pytest.fixture
def surprise(monkeypatch):
    """A toy metric, the mean NLL of the candidate's tokens, as a row from outside."""
    from quantkit.evaluation import metrics
    from quantkit.evaluation.intervals import Interval, paired_interval
    from quantkit.evaluation.token_statistics import per_window

    row = metrics.Metric(
        "surprise",
        Interval,
        lambda scores, text: paired_interval(
            per_window(scores.quant_nll, text.counts), text.counts
        ),
        columns=(metrics.Shown("surprise", lambda value: f"{value.value:.3f} nats"),),
        rows=(metrics.Shown("surprise of a token", lambda value: value.text(4, " nats")),),
        gate=metrics.Gateable("surprise", "nats", lambda value: value),
        pairing=metrics.Pairing(
            "window_surprise",
            lambda scores: scores.quant_nll,
            "surprise_delta",
            "surprise B − A",
            lambda delta: delta.text(4, ""),
        ),
    )
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, row))
    return row


def test_a_metric_is_in_the_json_the_report_the_gates_and_compare(
    surprise, run, run_json, llama, text, export_to, tmp_path
):
    pytest.importorskip("matplotlib")
    stored, markdown, page = (tmp_path / name for name in ("r.json", "r.md", "r.html"))
    arguments = ("eval", llama, export_to("int8-dynamic"), "--data", text, "--seq-len", 32)
    files = ("-o", stored, "--markdown", markdown, "--html", page)
    printed = run_json(*arguments, "--max-tokens", 320, "--gate", "surprise<=99", *files)
    (quant,) = printed["quants"]
    mean = sum(quant["window_nll"]) / printed["tokens_scored"]
    assert quant["surprise"]["value"] == pytest.approx(mean)
    assert quant["window_surprise"] == quant["window_nll"]
    assert (printed["gates"][0]["result"], printed["gates"][0]["value"]) == (
        "pass",
        quant["surprise"]["value"],
    )
    for written in (markdown.read_text(), page.read_text()):
        assert f"{mean:.3f} nats" in written and "surprise of a token" in written
    failed = run(*arguments, "--max-tokens", 320, "--gate", "surprise<=0.1")
    assert failed.exit_code == 3 and "surprise<=0.1" in failed.stderr
    comparison = run_json("compare", stored, stored)
    assert comparison["pairs"][0]["surprise_delta"]["value"] == 0
    assert "surprise B" in run("compare", stored, stored).stdout


def test_the_help_names_every_metric_that_a_gate_may_ask_for(run):
    from quantkit.evaluation.gates import gate_units

    shown = " ".join(run("eval", "--help").stdout.split())
    for name in gate_units():
        assert name in shown
