"""A library leaves the process as it found it: whatever a program has set is as it was after a
call, also after one that fails, and nothing is printed.
"""

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings

import huggingface_hub.utils
import numpy as np
import pytest
import torch
import transformers

from quantkit.calibration.calibrate import calibrate
from quantkit.calibration.options import CalibrationOptions
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.verify import verify
from quantkit.exporter.write import export
from quantkit.layer_sensitivity.options import SensitivityOptions
from quantkit.layer_sensitivity.score import score_sensitivity
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

RECIPE = Recipe(QuantScheme.parse("int8-static"))


def state() -> dict[str, object]:
    """Everything of the process and of libraries that a program may have set."""
    numpy_state = np.random.get_state()
    return {
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "denormals are zero": torch.tensor([1e-38]).mul(1e-3).item() == 0,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "matmul": (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.mkldnn.enabled,
        ),
        "random numbers of torch": torch.random.get_rng_state().tolist(),
        "random numbers of Python": random.getstate(),
        "random numbers of numpy": (numpy_state[1].tolist(), numpy_state[2]),
        "errors of numpy": np.geterr(),
        "transformers": (
            transformers.utils.logging.get_verbosity(),
            transformers.utils.logging.is_progress_bar_enabled(),
        ),
        "bars of the hub library": huggingface_hub.utils.are_progress_bars_disabled(),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "modules' path": list(sys.path),
        "hooks": (sys.excepthook, threading.excepthook),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "garbage collection": gc.isenabled(),
        "process group": torch.distributed.is_initialized(),
    }


@pytest.fixture(params=[None, 1, 3], ids=["defaults", "one thread", "three threads"])
def settings(request):
    """Also settings that differ from the defaults: a setting that is reset to its default shows
    only with them.
    """
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    if request.param is not None:
        torch.set_num_threads(request.param)
        torch.set_flush_denormal(True)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("high")
        torch.backends.mkldnn.enabled = True
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.enable_progress_bar()
        huggingface_hub.utils.enable_progress_bars()
        np.seterr(all="raise")
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.set_verbosity(verbosity)
    if not bars:
        transformers.utils.logging.disable_progress_bar()
    np.seterr(all="warn")


def require_same(before: dict[str, object], what: str) -> None:
    after = state()
    changed = [name for name, value in before.items() if value != after[name]]
    assert changed == [], f"{what} changed {[(before[name], after[name]) for name in changed]}"


class Failure(Exception):
    pass


def fail_in_the_middle(what: str, done: float, total: float) -> None:
    if done > total / 3:
        raise Failure


@pytest.mark.slow
def test_a_call_leaves_the_process_as_it_was_and_prints_nothing(
    llama, text, tmp_path, settings, capfd
):
    data, sizes = (str(text),), {"num_samples": 6, "seq_len": 32, "device": "cpu"}
    calibration = CalibrationOptions(llama, tmp_path / "c", data, **sizes)
    exporting = ExportOptions(llama, tmp_path / "o", RECIPE, tmp_path / "c", max_shard_bytes=10**5)
    evaluation = EvaluationOptions(
        llama, (tmp_path / "o",), data, 32, 320, noise_floor=True, device="cpu", cache=False
    )
    sensitivity = SensitivityOptions(
        llama,
        Recipe(QuantScheme.parse("fp8-dynamic")),
        data=data,
        max_tokens=64,
        seq_len=32,
        device="cpu",
    )
    before = state()
    for what, call in {
        "calibrate": lambda *progress: calibrate(calibration, *progress),
        "export": lambda *progress: export(plan_export(exporting), *progress),
        "verify": lambda *progress: verify(tmp_path / "o", llama, None, *progress),
        "evaluate": lambda *progress: evaluate(evaluation, *progress),
        "sensitivity": lambda *progress: score_sensitivity(sensitivity, *progress),
    }.items():
        with pytest.raises(Failure) as caught:
            call(fail_in_the_middle)
        require_same(before, f"a {what} that failed")
        del caught
        for partial in tmp_path.glob("*.partial"):
            partial.rename(tmp_path / f"{what} that failed")
        call()
        require_same(before, what)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
