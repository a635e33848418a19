"""Commands in processes of their own, alone and as the ranks of one job.

Most are forked from a process that has imported torch already; `torchrun` is the real launcher, for
tests of what a launch does.
"""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Modules that import torch, but neither transformers nor huggingface_hub: these read the
# environment when they are imported.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "quantkit.calibration.calibrate",
        "quantkit.evaluation.evaluate",
        "quantkit.exporter.write",
        "quantkit.layer_sensitivity.score",
    ]
)


def quantkit(*arguments: object, cwd: Path | None = None, **environment: str):
    """The command in a process of its own, whose environment has these variables too."""
    return _finished([environment], arguments, cwd)[0]


def ranks(*arguments: object, count: int = 2) -> subprocess.CompletedProcess:
    """The command as `count` processes of one job, with what they print in the order of ranks."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    places = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    done = _finished(places, arguments)
    return subprocess.CompletedProcess(
        done[0].args,
        max((each.returncode for each in done), key=abs),
        "".join(each.stdout for each in done),
        "".join(each.stderr for each in done),
    )


def _finished(
    environments: Sequence[dict[str, str]], arguments: Sequence[object], cwd: Path | None = None
) -> list[subprocess.CompletedProcess]:
    """One process for each environment, all at the same time."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, str(number)) for number in range(len(environments))]
        running = [
            _FORKS.Process(
                target=_run_command,
                args=(words, os.environ | added, str(cwd or Path.cwd()), str(output)),
            )
            for added, output in zip(environments, outputs)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join(200)
            process.kill()  # one that hangs
            process.join()
        return [
            subprocess.CompletedProcess(
                words,
                process.exitcode,
                output.with_suffix(".out").read_text(),
                output.with_suffix(".err").read_text(),
            )
            for process, output in zip(running, outputs)
        ]


def _run_command(words: list[str], environment: dict[str, str], cwd: str, output: str) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)  # as torchrun has it
    from quantkit.cli.main import main

    main(words)


def command(model, text, output, *more: object) -> list[str]:
    """`calibrate` on a little text."""
    arguments = [
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
    left = any("gloo" in name for name in names)
    print("gloo left behind" if left else "gloo is gone", file=sys.stderr)
if "DIE" not in os.environ:
    atexit.register(threads_left)
from quantkit.cli.main import main
main(sys.argv[1:])
"""


def as_library(*calls: tuple[str, dict], place: Path, count: int = 2, sends_cpu: bool = True):
    """Calls of the library's functions in `count` processes that make their process group
    themselves. Returns what each process returned: the results by function, and afterwards.

    calls: name of a function below, and its arguments.
    place: an empty directory.
    sends_cpu: whether the group says that it sends CPU tensors; nccl's doesn't.
    """
    running = [
        _FORKS.Process(target=_run_calls, args=(calls, str(place), rank, count, sends_cpu))
        for rank in range(count)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(200)
        process.kill()
        process.join()
    results = []
    for rank in range(count):
        errors = (place / f"{rank}.err").read_text()
        assert (place / f"{rank}.pickle").is_file(), errors
        results.append(pickle.loads((place / f"{rank}.pickle").read_bytes()))
    return results


def _run_calls(calls, place: str, rank: int, count: int, sends_cpu: bool) -> None:
    os.dup2(os.open(f"{place}/{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=count
    )
    if not sends_cpu:
        dist.get_backend_config = lambda group=None: "cuda:nccl"
    groups = len(dist.distributed_c10d._world.pg_map)
    results = [_CALLS[name](**arguments) for name, arguments in calls]
    alive = torch.ones(1)
    dist.all_reduce(alive)
    afterwards = {
        "initialized": dist.is_initialized(),
        "sum of ones": alive.item(),
        "groups more": len(dist.distributed_c10d._world.pg_map) - groups,
    }
    Path(place, f"{rank}.pickle").write_bytes(pickle.dumps((results, afterwards)))
    dist.destroy_process_group()


def _calibrate(**options):
    from quantkit.calibration.calibrate import calibrate
    from quantkit.calibration.options import CalibrationOptions

    return calibrate(CalibrationOptions(**options)).windows


def _evaluate(**options):
    from quantkit.evaluation.evaluate import evaluate
    from quantkit.evaluation.preflight import EvaluationOptions

    return evaluate(EvaluationOptions(**options)).to_json()


def _sensitivity(**options):
    from quantkit.layer_sensitivity.options import SensitivityOptions
    from quantkit.layer_sensitivity.score import score_sensitivity
    from quantkit.schemes.recipe import Recipe
    from quantkit.schemes.scheme import QuantScheme

    score_sensitivity(
        SensitivityOptions(recipe=Recipe(QuantScheme.parse("fp8-dynamic")), **options)
    )


_CALLS = {"calibrate": _calibrate, "evaluate": _evaluate, "sensitivity": _sensitivity}
