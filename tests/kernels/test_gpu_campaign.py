"""kernels/bench/gpu.py without a GPU: whatever fails, its results are written with what was said,
and its tables take every kind of figure.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "kernels" / "bench"))

import gpu  # noqa: E402


@pytest.mark.slow
def test_what_fails_is_written_and_loses_nothing_else(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [
        sys.executable,
        str(ROOT / "kernels" / "bench" / "gpu.py"),
        "-o",
        str(tmp_path / "out"),
        "--libraries",
        str(empty),
        "--only",
        "build,speed",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["stages"]["build"]["status"] == "failed: no libquantkit_cuda.so"
    assert (
        results["stages"]["speed"]["status"] == "failed (1)"
        and "no compiled CUDA kernels" in results["stages"]["speed"]["output"]
    )
    assert "no compiled CUDA kernels" in (tmp_path / "out" / "gpu.md").read_text()


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended(tmp_path):
    campaign = gpu.Campaign(tmp_path, 60, None, None)
    ended = campaign.command(
        [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"], 2
    )
    assert ended["status"] == "timed out" and ended["output"] == "began\n" and ended["seconds"] < 30
    assert campaign.command(["/no/such/program"], 2)["status"] == "failed"


def test_tables_hold_every_kind_of_figure():
    timed = {"microseconds": 10.0, "least": 9.0, "most": 12.0}
    product = {
        "what": "fp8",
        "out_features": 4096,
        "in_features": 4096,
        "tokens": 8192,
        **timed,
        "tflops": 1200.0,
        "gb_per_s": 900.0,
    }
    figures = [
        {
            "what": "ceilings",
            "copy_gb_per_s": 4300.0,
            "bfloat16_tflops": 790.0,
            "fp8_fast_tflops": 1500.0,
            "int8_tflops": "not there",
        },
        product
        | {
            "rivals": {
                "torch": {**timed, "microseconds": 15.0},
                "other": {"error": "not supported"},
            }
        },
        product | {"what": "int8", "tokens": 1, "rivals": {}},
        product | {"what": "int8", "rivals": {}},
        {
            "what": "quantize_rows",
            "tokens": 8192,
            "in_features": 4096,
            **timed,
            "gb_per_s": 4000.0,
            "rivals": {"copy": timed},
        },
    ]
    judged = {
        "scheme": "int8-dynamic",
        "bound": 1e-6,
        "apart": 0.0,
        "kernel": {"perplexity": 12.5},
        "reference": {"perplexity": 12.5},
    }
    results = {
        "machine": {"device": "a GPU"},
        "stages": {"speed": {"status": "ok", "seconds": 1.0}},
        "speed": figures,
        "eval": [{"model": "m", "schemes": [judged]}],
    }
    table = gpu.table_of(results)
    assert (
        "| 8192 | 4096 × 4096 | 10.0 (9.0, 12.0) | 1200 | 900 | 80% | torch: 1.50×; other: not"
        " supported |" in table
    )
    assert (
        "| 1 | 4096 × 4096 | 10.0 (9.0, 12.0) | 1200 | 900 | 21% |" in table
        and "| int8-dynamic | 12.500000 | 12.500000 | 0 | 1e-06 |" in table
    )
