"""The speed and memory of `quantkit export`, compared with `cp` and, if it is installed,
llm-compressor's `model_free_ptq`.

    python benchmarks/export.py      # 0.5 to 8 GB, about 10 minutes and 25 GB of disk
    python benchmarks/export.py --layers 22 --peer-python /path/to/venv/bin/python

The model is a Llama of 2048 hidden features with random weights in bfloat16; 22 layers are 1.1 B
parameters, 2.2 GB. Each figure is a whole process on files in the page cache, start and imports
included; the programs take turns, and the table has the medians of the turns.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import transformers

from quantkit import __version__
from quantkit.checkpoint.files import write_json
from quantkit.checkpoint.shard_plan import TensorPlan, plan_shards, shard_names
from quantkit.checkpoint.writer import write_tensors
from quantkit.cli.bench import processor
from quantkit.evaluation.report import markdown_table
from quantkit.ops import native

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
SHARD_BYTES = 500_000_000
RESULTS = Path(__file__).parent / "results"
PEER = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(
    model_stub=sys.argv[1],
    save_directory=sys.argv[2],
    scheme=sys.argv[3],
    ignore=["lm_head", "re:.*embed_tokens"],
    max_workers=int(sys.argv[4]),
)
"""


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, CPU seconds (user and system), peak resident bytes, and
    what it printed.
    """

    wall: float
    cpu: float
    peak: int
    printed: str = ""


def make_model(directory: Path, layers: int, vocabulary: int = VOCABULARY) -> None:
    """The model, in shards of SHARD_BYTES with an index, as save_pretrained lays it out."""
    shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    kv = KV_HEADS * HIDDEN // HEADS
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
        }
        shapes |= {
            prefix + f"self_attn.{name}_proj.weight": (rows, HIDDEN)
            for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN))
        }
        shapes |= {
            prefix + f"mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")
        }
        shapes |= {prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}
    shards = plan_shards(
        [[TensorPlan(name, "BF16", shape)] for name, shape in shapes.items()], SHARD_BYTES
    )
    generator, weight_map = torch.Generator().manual_seed(0), {}
    directory.mkdir(parents=True)
    for name, plans in zip(shard_names(len(shards)), shards):
        write_tensors(
            directory / name,
            {
                plan.name: (
                    torch.empty(plan.shape, dtype=torch.bfloat16).normal_(
                        0, 0.02, generator=generator
                    )
                )
                for plan in plans
            },
        )
        weight_map |= dict.fromkeys((plan.name for plan in plans), name)
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    write_json(directory / "config.json", config)


# Runs a command from a small process: a child's peak begins with that of the process that it was
# forked from.
LAUNCHER = """
import json, os, subprocess, sys, time
started = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
seconds, cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
code = os.waitstatus_to_exitcode(status)
print(json.dumps([seconds, cpu, usage.ru_maxrss * 1024, code]))
"""


def measure(command: list[str], output: Path | None = None) -> Run:
    """Run a command to its end; what it wrote to `output` is removed afterwards. Nothing is left to
    be written to disk when it starts.
    """
    os.sync()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody compiles each module at each start
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command],
        capture_output=True,
        text=True,
        env=environment,
    )
    wall, cpu, peak, code = json.loads(done.stdout)
    if code:
        raise click.ClickException(f"{' '.join(command)} ended with {code}: {done.stderr[-2000:]}")
    if output is not None:
        shutil.rmtree(output)
    return Run(wall, cpu, peak, done.stderr)


def machine() -> str:
    """The processor and the versions that the figures depend on."""
    return (
        f"{processor()}, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, quantkit {__version__}"
    )


def median(runs: list[Run]) -> Run:
    return Run(
        *(
            statistics.median(getattr(run, field) for run in runs)
            for field in ("wall", "cpu", "peak")
        )
    )


def compare(
    model: Path, work: Path, schemes: tuple[str, ...], repeats: int, peer_python: str | None
) -> dict[str, Run]:
    """Each program's median, the programs in turn."""
    commands: dict[str, tuple[list[str], Path | None]] = {
        "import torch": ([sys.executable, "-c", "import torch"], None),
        "cp -r": (["cp", "-r", str(model), str(work / "copy")], work / "copy"),
    }
    for scheme in schemes:
        output = work / scheme
        commands[f"quantkit {scheme}"] = (
            [
                sys.executable,
                "-m",
                "quantkit",
                "export",
                str(model),
                "-o",
                str(output),
                "--scheme",
                scheme,
                "-q",
            ],
            output,
        )
    peers = {"fp8-dynamic": "FP8_DYNAMIC", "int8-dynamic": "W8A8"}
    for scheme in schemes if peer_python else ():
        if scheme in peers:
            arguments = [
                str(model),
                str(work / "peer"),
                peers[scheme],
                str(len(os.sched_getaffinity(0))),
            ]
            commands[f"llm-compressor {peers[scheme]}"] = (
                [peer_python, "-c", PEER, *arguments],
                work / "peer",
            )
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, (command, output) in commands.items():
            run = measure(command, output)
            if turn:  # the first turn warms the page cache
                runs[name].append(run)
                click.echo(
                    f"  {name:24} {run.wall:6.2f} s  {run.cpu:6.2f} s CPU "
                    f" {run.peak / 1e6:6.0f} MB",
                    err=True,
                )
    return {name: median(each) for name, each in runs.items()}


@click.command()
@click.option(
    "--layers",
    multiple=True,
    type=int,
    default=(3, 9, 22, 44, 88),
    show_default=True,
    help="Of the models to make; 22 is 2.2 GB.",
)
@click.option(
    "--scheme", "schemes", multiple=True, default=("fp8-dynamic", "int8-dynamic"), show_default=True
)
@click.option(
    "--repeats", default=3, show_default=True, help="Turns that count; one more goes before them."
)
@click.option("--peer-python", help="A Python that has llm-compressor.")
@click.option(
    "--peer-layers", default=22, show_default=True, help="The model that the peer is measured on."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where models and outputs go; removed afterwards.  [default: a temporary directory]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=RESULTS / "export.md",
    show_default=True,
)
def main(
    layers: tuple[int, ...],
    schemes: tuple[str, ...],
    repeats: int,
    peer_python: str | None,
    peer_layers: int,
    work: Path | None,
    output: Path,
) -> None:
    """Measure export against cp."""
    rows, results = [], []
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        for count in layers:
            model = Path(temporary) / f"model-{count}"
            make_model(model, count)
            nbytes = sum(path.stat().st_size for path in model.iterdir())
            click.echo(f"{count} layers, {nbytes / 1e9:.2f} GB", err=True)
            medians = compare(
                model,
                Path(temporary),
                schemes,
                repeats,
                peer_python if count == peer_layers else None,
            )
            copy, imports = medians["cp -r"], medians["import torch"]
            for name, run in medians.items():
                if name == "import torch":
                    continue
                times_copy = (
                    (run.wall - imports.wall) / copy.wall
                    if name.startswith("quantkit")
                    else run.wall / copy.wall
                )
                rows.append(
                    (
                        f"{nbytes / 1e9:.1f} GB",
                        name,
                        f"{run.wall:.2f}",
                        f"{times_copy:.1f}" if name != "cp -r" else "1",
                        f"{run.cpu:.1f}",
                        f"{run.peak / 1e6:.0f}",
                    )
                )
                results.append(
                    {
                        "bytes": nbytes,
                        "program": name,
                        "wall_s": run.wall,
                        "cpu_s": run.cpu,
                        "peak_bytes": run.peak,
                        "import_torch_s": imports.wall,
                    }
                )
            for scheme, peer in (("fp8-dynamic", "FP8_DYNAMIC"), ("int8-dynamic", "W8A8")):
                if f"llm-compressor {peer}" in medians:
                    ratio = (
                        medians[f"llm-compressor {peer}"].wall / medians[f"quantkit {scheme}"].wall
                    )
                    click.echo(f"  {scheme}: {ratio:.1f} times as fast as llm-compressor", err=True)
            rows.append(
                (
                    f"{nbytes / 1e9:.1f} GB",
                    "python -c 'import torch'",
                    f"{imports.wall:.2f}",
                    "",
                    f"{imports.cpu:.1f}",
                    f"{imports.peak / 1e6:.0f}",
                )
            )
            shutil.rmtree(model)
    header = (
        "model",
        "program",
        "seconds",
        "times cp, less import torch",
        "CPU seconds",
        "peak MB",
    )
    where = (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, kernels:"
        f" {native.cpu_level()}; medians of {repeats} turns"
    )
    text = (
        f"# Export: whole processes compared with `cp -r`\n\n{where}.\n\n"
        + markdown_table(header, rows)
        + "\n"
    )
    output.parent.mkdir(exist_ok=True)
    output.write_text(text)
    write_json(output.with_suffix(".json"), {"machine": where, "runs": results})
    click.echo(text)


if __name__ == "__main__":
    main()
