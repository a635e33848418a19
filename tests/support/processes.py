"""Commands in processes of their own, alone and under torchrun."""

import os
import subprocess
import sys


def command(model, text, output, *more: object) -> list[str]:
    arguments = [
        "-m",
        "quantkit",
        "calibrate",
        model,
        "-o",
        output,
        "--data",
        text,
        "--num-samples",
        8,
        "--seq-len",
        64,
        "--batch-size",
        1,
        *more,
    ]
    return [str(argument) for argument in arguments]


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return subprocess.run(
        [*launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | environment,
    )


DYING = """
import atexit, os, pathlib, sys
from quantkit.errors import CalibrationError
from quantkit.models.blockwise import BlockwiseModel
block = BlockwiseModel.block
def dying(self, number, *arguments):
    if os.environ["RANK"] == "1" and number == 1 and "DIE" in os.environ:
        raise CalibrationError("the input of model.layers.1.mlp.down_proj holds NaN")
    return block(self, number, *arguments)
BlockwiseModel.block = dying
def threads_left():
    names = [task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("gloo left behind" if any("gloo" in name for name in names) else "gloo is gone", file=sys.stderr)
if "DIE" not in os.environ:
    atexit.register(threads_left)
from quantkit.cli.main import main
main(sys.argv[1:])
"""
