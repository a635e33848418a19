"""The speed and memory of `quantkit calibrate`, compared with the bare forward of the same tokens
and with llm-compressor.

    python benchmarks/calibrate.py                                              # about 15 minutes
    python benchmarks/calibrate.py --peer-python /path/to/venv/bin/python

Speed: SmolLM2-135M, the same windows for each. The bare forward is transformers' own, the whole
model in memory, one window after the other, without `lm_head` and without any statistics. The
programs take turns; the table has medians, also of each turn's ratio to its bare forward, so
that a machine whose speed changes with its neighbours' work doesn't decide. Memory: Llamas of 2048
hidden features with random weights, of 11, 22 (1.1 B parameters) and 44 layers.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import click
import torch
from export import RESULTS, Run, make_model, measure

from quantkit.checkpoint.files import write_json
from quantkit.cli.bench import processor
from quantkit.cli.demo import smollm2
from quantkit.data.sampling import calibration_windows
from quantkit.data.sources import BUNDLED_CALIBRATION
from quantkit.data.tokenizer import load_tokenizer
from quantkit.evaluation.report import markdown_table
from quantkit.ops import native

# Prints the seconds that the forward alone took.
BARE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
windows = torch.tensor(json.load(open(sys.argv[2])))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.inference_mode():
    model.model(input_ids=windows[:1], use_cache=False)
    started = time.perf_counter()
    for window in windows:
        model.model(input_ids=window[None], use_cache=False)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""
PEER = """
import json, sys, time
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
windows = json.load(open(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
masks = [[1] * len(window) for window in windows]
dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": masks})
started = time.perf_counter()
oneshot(
    model=model,
    dataset=dataset,
    recipe=QuantizationModifier(targets="Linear", scheme="FP8", ignore=["lm_head"]),
    max_seq_length=len(windows[0]),
    num_calibration_samples=len(windows),
)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def printed(run: Run) -> dict:
    """The JSON object that a program printed last."""
    text = run.printed
    decoder = json.JSONDecoder()
    starts = [
        position
        for position, character in enumerate(text)
        if character == "{" and (position == 0 or text[position - 1] == "\n")
    ]
    return decoder.raw_decode(text[starts[-1] :])[0]


def calibrate_command(
    model: Path, output: Path, windows: int, seq_len: int, *more: str
) -> list[str]:
    arguments = [
        "quantkit",
        "calibrate",
        str(model),
        "-o",
        str(output),
        "--num-samples",
        str(windows),
        "--seq-len",
        str(seq_len),
        "--json",
        "-q",
        *more,
    ]
    return [sys.executable, "-m", *arguments]


def compare_speed(
    model: Path, work: Path, windows: int, seq_len: int, repeats: int, peer_python: str | None
) -> list[dict]:
    """Each program's median tokens per second over its own work, and of its whole process."""
    tokens = work / "windows.json"
    chosen = calibration_windows(
        [str(BUNDLED_CALIBRATION)], load_tokenizer(model), windows, seq_len, 0
    ).windows
    tokens.write_text(json.dumps([window.tokens for window in chosen]))
    output = work / "calibration"
    commands = {
        "bare forward, bfloat16": ([sys.executable, "-c", BARE, str(model), str(tokens)], None),
        "quantkit calibrate": (calibrate_command(model, output, windows, seq_len), output),
        "quantkit calibrate, 2 processes": (
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                *calibrate_command(model, output, windows, seq_len)[1:],
            ],
            output,
        ),
    }
    if peer_python:
        commands["llm-compressor FP8 static"] = (
            [peer_python, "-c", PEER, str(model), str(tokens)],
            None,
        )
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, (command, written) in commands.items():
            run = measure(command, written)
            if turn:  # the first turn warms the page cache
                runs[name].append(run)
                click.echo(
                    f"  {name:32} {printed(run)['seconds']:6.1f} s of {run.wall:6.1f} s,"
                    f" {run.peak / 1e6:6.0f} MB",
                    err=True,
                )
    count = len(chosen) * seq_len
    return [
        {
            "program": name,
            "tokens": count,
            "seconds": statistics.median(printed(run)["seconds"] for run in each),
            "of_bare": statistics.median(
                printed(bare)["seconds"] / printed(run)["seconds"]
                for bare, run in zip(next(iter(runs.values())), each)
            ),
            "wall_s": statistics.median(run.wall for run in each),
            "cpu_s": statistics.median(run.cpu for run in each),
            "peak_bytes": statistics.median(run.peak for run in each),
        }
        for name, each in runs.items()
    ]


def make_tokenizer(directory: Path, vocabulary: int = 32000) -> int:
    """A byte-level BPE tokenizer trained on the bundled text, since random models have none;
    returns its size.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(BUNDLED_CALIBRATION.read_text().splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.save_pretrained(directory)
    return len(fast)


def compare_memory(
    work: Path, layers: tuple[int, ...], windows: tuple[int, ...], seq_len: int
) -> list[dict]:
    """Peak memory by depth with the fewest windows, and by windows with the least depth."""
    found = []
    for count in layers:
        model = work / f"model-{count}"
        make_model(model, count)
        make_tokenizer(model)
        nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for number in windows if count == min(layers) else windows[:1]:
            run = measure(
                calibrate_command(model, work / "calibration", number, seq_len),
                work / "calibration",
            )
            found.append(
                {
                    "layers": count,
                    "model_bytes": nbytes,
                    "windows": number,
                    "seq_len": seq_len,
                    "wall_s": run.wall,
                    "peak_bytes": run.peak,
                }
            )
            click.echo(
                f"  {count} layers, {nbytes / 1e9:.2f} GB, {number} x {seq_len}: {run.wall:.0f} s,"
                f" {run.peak / 1e6:.0f} MB",
                err=True,
            )
    return found


@click.command()
@click.option("--windows", default=64, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option(
    "--repeats", default=3, show_default=True, help="Turns that count; one more goes before them."
)
@click.option(
    "--layers",
    multiple=True,
    type=int,
    default=(11, 22, 44),
    show_default=True,
    help="Of the models whose calibration's memory is measured.",
)
@click.option(
    "--memory-windows",
    multiple=True,
    type=int,
    default=(8, 64),
    show_default=True,
    help="Windows of 512 tokens there; the first for every depth.",
)
@click.option("--peer-python", help="A Python that has llm-compressor.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where models and outputs go; removed afterwards.  [default: a temporary directory]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=RESULTS / "calibrate.md",
    show_default=True,
)
def main(
    windows: int,
    seq_len: int,
    repeats: int,
    layers: tuple[int, ...],
    memory_windows: tuple[int, ...],
    peer_python: str | None,
    work: Path | None,
    output: Path,
) -> None:
    """Measure calibrate against the bare forward."""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        speeds = compare_speed(
            smollm2(lambda text: click.echo(text, err=True)),
            Path(temporary),
            windows,
            seq_len,
            repeats,
            peer_python,
        )
        memory = compare_memory(Path(temporary), layers, memory_windows, 512)
    rows = [
        (
            entry["program"],
            f"{entry['tokens'] / entry['seconds']:.0f}",
            f"{entry['of_bare']:.2f}",
            f"{entry['seconds']:.1f}",
            f"{entry['wall_s']:.1f}",
            f"{entry['cpu_s']:.1f}",
            f"{entry['peak_bytes'] / 1e6:.0f}",
        )
        for entry in speeds
    ]
    where = (
        f"{processor()}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, kernels:"
        f" {native.cpu_level()}; medians of {repeats} turns"
    )
    text = f"# Calibrate: compared with the bare forward of the same tokens\n\n{where}.\n\n"
    text += (
        f"SmolLM2-135M, {windows} windows of {seq_len} tokens, all statistics. Seconds: of the"
        " work; the whole process also imports and loads.\n\n"
    )
    text += markdown_table(
        (
            "program",
            "tokens/s",
            "of the bare forward's speed",
            "seconds",
            "whole process",
            "CPU seconds",
            "peak MB",
        ),
        rows,
    )
    text += (
        "\nLlamas of 2048 hidden features (22 layers are 1.1 B parameters); peak memory of the"
        " whole process:\n\n"
    )
    rows = [
        (
            str(e["layers"]),
            f"{e['model_bytes'] / 1e9:.2f}",
            f"{e['windows']} × {e['seq_len']}",
            f"{e['peak_bytes'] / 1e6:.0f}",
            f"{e['wall_s']:.0f}",
        )
        for e in memory
    ]
    text += markdown_table(("layers", "model GB", "windows", "peak MB", "seconds"), rows)
    output.parent.mkdir(exist_ok=True)
    output.write_text(text)
    write_json(output.with_suffix(".json"), {"machine": where, "speed": speeds, "memory": memory})
    click.echo(text)


if __name__ == "__main__":
    main()
