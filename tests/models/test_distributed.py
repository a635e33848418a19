"""Processes that a program starts and connects itself, without the command line: the library uses
their process group, makes none that stays, and destroys none.
"""

import json

import pytest
from processes import as_library, command, contents, quantkit, ranks

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.errors import QuantkitError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.models.distributed import joined_ranks

CALIBRATION = {"num_samples": 8, "seq_len": 64, "batch_size": 1, "device": "cpu"}


def of_calls(results):
    """The processes' results. Their group is alive, and no other is left."""
    for _, afterwards in results:
        assert afterwards == {"initialized": True, "sum of ones": 2.0, "groups more": 0}
    return [found for found, _ in results]


@pytest.mark.slow
@pytest.mark.parametrize("sends_cpu", [True, False], ids=["gloo", "another group for nccl"])
def test_a_callers_group_calibrates_and_evaluates_as_torchrun_does(
    llama, text, export_to, tmp_path, sends_cpu
):
    (tmp_path / "place").mkdir()
    quant = export_to("fp8-dynamic")
    evaluation = {"seq_len": 32, "max_tokens": 320, "device": "cpu", "cache": False}
    results = of_calls(
        as_library(
            ("calibrate", {"model": llama, "output": tmp_path / "c", "data": (str(text),)}
             | CALIBRATION),
            ("evaluate", {"base": llama, "quants": (quant,), "data": (str(text),)} | evaluation),
            place=tmp_path / "place",
            sends_cpu=sends_cpu,
        )
    )  # fmt: skip
    assert [windows for windows, _ in results] == [8, 8]
    done = ranks(*command(llama, text, tmp_path / "torchrun", "--device", "cpu"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "c") == contents(tmp_path / "torchrun")
    done = quantkit(
        "eval", llama, quant, "--data", text, "--seq-len", 32, "--max-tokens", 320, "--json"
    )
    alone = json.loads(done.stdout)
    for _, evaluated in results:
        assert evaluated["processes"] == 2 and alone["processes"] == 1
        assert evaluated["base"]["perplexity"] == alone["base"]["perplexity"]
        assert evaluated["quants"][0]["kld"] == alone["quants"][0]["kld"]


@pytest.mark.slow
def test_a_callers_group_scores_sensitivity_as_torchrun_does(llama, text, tmp_path):
    (tmp_path / "place").mkdir()
    options = {"max_tokens": 256, "seq_len": 32, "device": "cpu"}
    given = {"model": llama, "output": tmp_path / "r.json", "data": (str(text),)}
    of_calls(as_library(("sensitivity", given | options), place=tmp_path / "place"))
    arguments = ("--scheme", "fp8-dynamic", "--max-tokens", 256, "--seq-len", 32, "--data", text)
    done = ranks("sensitivity", llama, *arguments, "--device", "cpu", "-o", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "t.json").read_bytes()


def test_processes_without_a_group_are_refused_before_anything_is_written(
    llama, text, tmp_path, monkeypatch
):
    """Each would do all of the work, and write the same output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QuantkitError, match="not initialized; call torch.distributed.init_process"):
        calibrate(CalibrationOptions(llama, tmp_path / "c", (str(text),), **CALIBRATION))
    assert not list(tmp_path.iterdir())
    with pytest.raises(QuantkitError, match="not initialized; call"):
        evaluate(EvaluationOptions(llama, (), (str(text),), 32, 96, device="cpu"))


def test_one_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined_ranks("cpu") as found:
        assert (found.rank, found.count, found.device, found.group) == (0, 1, "cpu", None)
