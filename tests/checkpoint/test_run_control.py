"""Runs that are stopped from outside, as a program sees it that uses the library: finished work is
kept, no thread is left, and nobody but the program catches signals.
"""

import signal
import threading
from dataclasses import replace

import pytest
import torch
from processes import contents
from tiny_llama import make_llama

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.errors import Interrupted
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.verify import verify
from quantkit.exporter.write import export
from quantkit.layer_sensitivity.options import SensitivityOptions
from quantkit.layer_sensitivity.score import score_sensitivity
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

RECIPE = Recipe(QuantScheme.parse("fp8-dynamic"))


class Asked:
    """A should_stop that says so when it is asked for the nth time, and from then on."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self) -> bool:
        self.times -= 1
        return self.times <= 0


def ctrl_c_after(done_before: float):
    """A progress that presses Ctrl-C, as the terminal does, once more than this is done."""

    def progress(what: str, done: float, total: float) -> None:
        if done > done_before:
            signal.raise_signal(signal.SIGINT)

    return progress


def calibrations(llama, text, output) -> CalibrationOptions:
    return CalibrationOptions(llama, output, (str(text),), num_samples=8, seq_len=32, batch_size=1)


@pytest.fixture
def several_shards(llama, tmp_path) -> ExportOptions:
    return ExportOptions(llama, tmp_path / "out", RECIPE, max_shard_bytes=50_000)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Threads, torch's number of threads and signal handlers are what they were."""

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return set(threading.enumerate()), torch.get_num_threads(), handlers

    torch.set_num_threads(max(2, torch.get_num_threads()))
    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize("where", ["inside a block", "between two blocks"])
def test_a_calibration_ended_by_ctrl_c_is_resumed_to_the_same_bytes(llama, text, tmp_path, where):
    options = calibrations(llama, text, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(options, ctrl_c_after(1.0 if where == "inside a block" else 0.99))
    # Also while the exception, and with it the frames that it came through, are still held.
    assert not [each for each in threading.enumerate() if "ThreadPool" in each.name], caught
    assert not options.output.exists() and (tmp_path / "stopped.partial").is_dir()
    calibrate(replace(options, resume=True))
    calibrate(replace(options, output=tmp_path / "whole"))
    assert contents(options.output) == contents(tmp_path / "whole")


def test_a_stopped_calibration_says_where_and_is_resumed(llama, text, tmp_path):
    options = calibrations(llama, text, tmp_path / "stopped")
    with pytest.raises(Interrupted) as caught:
        calibrate(options, should_stop=lambda: True)
    assert str(caught.value) == (
        "stopped after block 1 of 2; run it again with `resume=True` to continue"
    )
    reported: list[float] = []
    calibrate(replace(options, resume=True), lambda what, done, total: reported.append(done))
    assert min(done for done in reported if done) > 1, "the first block has run again"
    calibrate(replace(options, output=tmp_path / "whole"))
    assert contents(options.output) == contents(tmp_path / "whole")


def test_an_export_ended_by_ctrl_c_is_resumed_to_the_same_bytes(several_shards, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        export(plan_export(several_shards), ctrl_c_after(0))
    assert not several_shards.output.exists() and (tmp_path / "out.partial").is_dir()
    export(plan_export(replace(several_shards, resume=True)))
    export(plan_export(replace(several_shards, output=tmp_path / "whole")))
    assert contents(several_shards.output) == contents(tmp_path / "whole")


def test_a_stopped_export_says_so_and_is_resumed(several_shards, tmp_path):
    model = make_llama(tmp_path / "deep", num_hidden_layers=12)
    options = replace(several_shards, model=model)
    with pytest.raises(Interrupted, match=r"stopped with \d+ of \d+ shards .*`resume=True`"):
        export(plan_export(options), should_stop=lambda: True)
    export(plan_export(replace(options, resume=True)))
    assert verify(options.output, model).ok


def test_a_stopped_evaluation_keeps_nothing_and_says_no_more_than_that(llama, text):
    options = EvaluationOptions(llama, (), (str(text),), 32, 96, cache=False)
    with pytest.raises(Interrupted) as caught:
        evaluate(options, should_stop=Asked(2))
    assert str(caught.value) == "stopped before block 2 of 2 of " + llama.name
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, ctrl_c_after(0))


def test_a_stopped_verification_says_how_far_it_came(llama):
    with pytest.raises(Interrupted, match=r"^stopped with \d+ of \d+ tensors read$"):
        verify(llama, should_stop=Asked(2))
    with pytest.raises(KeyboardInterrupt):
        verify(llama, progress=ctrl_c_after(0))


@pytest.mark.slow
def test_a_stopped_sensitivity_is_resumed_only_if_it_has_an_output(llama, text, tmp_path):
    options = SensitivityOptions(llama, RECIPE, data=(str(text),), max_tokens=64, seq_len=32)
    with pytest.raises(Interrupted, match=r"^stopped after block 1 of 2$"):
        score_sensitivity(options, should_stop=lambda: True)
    kept = replace(options, output=tmp_path / "r.json")
    with pytest.raises(Interrupted, match=r"^stopped after block 1 of 2; .*`resume=True`"):
        score_sensitivity(kept, should_stop=lambda: True)
    score_sensitivity(replace(kept, resume=True))
    score_sensitivity(replace(kept, output=tmp_path / "whole.json"))
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
