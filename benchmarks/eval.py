"""The speed and memory of `quantkit eval`, compared with the naive loop over transformers, and how
both grow with the text.

    python benchmarks/eval.py                     # about 10 minutes

SmolLM2-135M and its int8-dynamic export, windows of 2048 tokens of the bundled text. The naive loop
is that of most perplexity scripts: the whole model in bfloat16, one window after the other,
`model(input_ids=window, labels=window).loss`, and it evaluates one model. `quantkit eval` evaluates
two and compares their distributions at every token: its seconds are those of the whole of
`evaluate`, so "per model" is half of them. The programs take turns, and the table has the median of
each turn's ratio, so that other work on the machine counts as little as possible.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from calibrate import make_tokenizer, printed
from export import RESULTS, Run, machine, make_model, measure

from quantkit.checkpoint.files import write_json
from quantkit.cli.demo import smollm2
from quantkit.data.sources import BUNDLED_CALIBRATION, read_source
from quantkit.data.tokenizer import load_tokenizer
from quantkit.evaluation.report import markdown_table
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

# Prints the seconds, wall and CPU, of the windows alone; the model is loaded and warm.
NAIVE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
length, count = int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = tokenizer(open(sys.argv[2]).read(), verbose=False).input_ids
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
loss = 0.0
with torch.inference_mode():
    model(input_ids=torch.tensor([tokens[:64]]))
    started, used = time.perf_counter(), time.process_time()
    for start in range(0, length * count, length):
        window = torch.tensor([tokens[start : start + length]])
        loss += model(input_ids=window, labels=window).loss.item()
seconds, cpu = time.perf_counter() - started, time.process_time() - used
print(json.dumps({"seconds": seconds, "cpu": cpu, "loss": loss / count}), file=sys.stderr)
"""
# Prints the seconds of `evaluate` alone, after the imports; the process's peak is measured from
# outside.
EVAL = """
import json, sys, time
from pathlib import Path
import torch, transformers
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.evaluate import evaluate
transformers.utils.logging.disable_progress_bar()
base, quant, data, length, count = sys.argv[1:]
length, count = int(length), int(count)
options = EvaluationOptions(
    Path(base), (Path(quant),), (data,), length, length * count, cache=False
)
started, used = time.perf_counter(), time.process_time()
result = evaluate(options).to_json()
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "cpu": time.process_time() - used,
    "perplexity": result["base"]["perplexity"],
    "rates": [model["tokens_per_second"] for model in (result["base"], *result["quants"])],
}), file=sys.stderr)
"""


def text_of(work: Path, tokenizer: Any, tokens: int) -> Path:
    """The bundled text, repeated until it holds so many tokens."""
    text = "\n\n".join(read_source(str(BUNDLED_CALIBRATION), tokenizer).documents)
    once = len(tokenizer(text, verbose=False).input_ids)
    path = work / "text.txt"
    path.write_text("\n\n".join([text] * (tokens // once + 1)))
    return path


def compare_speed(
    work: Path, length: int, counts: tuple[int, ...], repeats: int
) -> list[dict[str, Any]]:
    """For each number of windows: medians of both programs, and of their ratios within a turn."""
    base = smollm2(lambda text: click.echo(text, err=True))
    quant = work / "int8-dynamic"
    export(plan_export(ExportOptions(base, quant, Recipe(QuantScheme.parse("int8-dynamic")))))
    text = text_of(work, load_tokenizer(base), length * max(counts))
    found = []
    for count in counts:
        turns: list[tuple[Run, Run]] = []
        for turn in range(repeats + 1):
            naive = measure(
                [sys.executable, "-c", NAIVE, str(base), str(text), str(length), str(count)]
            )
            ours = measure(
                [
                    sys.executable,
                    "-c",
                    EVAL,
                    str(base),
                    str(quant),
                    str(text),
                    str(length),
                    str(count),
                ]
            )
            if turn or repeats == 0:  # the first turn warms the page cache
                turns.append((naive, ours))
            told = [printed(run) for run in (naive, ours)]
            click.echo(
                f"  {count} windows: naive {told[0]['seconds']:.1f} s ({told[0]['cpu']:.1f} CPU),"
                f" eval {told[1]['seconds']:.1f} s ({told[1]['cpu']:.1f} CPU),"
                f" {ours.peak / 1e6:.0f} MB",
                err=True,
            )
        each = [(printed(naive), printed(ours)) for naive, ours in turns]
        tokens = length * count

        def middle(values: Any) -> float:
            return statistics.median(values)

        found.append(
            {
                "windows": count,
                "tokens": tokens,
                "naive": (
                    {key: middle(naive[key] for naive, _ in each) for key in ("seconds", "cpu")}
                    | {"peak_bytes": middle(run.peak for run, _ in turns)}
                ),
                "eval": (
                    {key: middle(ours[key] for _, ours in each) for key in ("seconds", "cpu")}
                    | {"peak_bytes": middle(run.peak for _, run in turns)}
                ),
                "rates": [middle(ours["rates"][number] for _, ours in each) for number in range(2)],
                "of_naive": {
                    key: middle(2 * naive[key] / ours[key] for naive, ours in each)
                    for key in ("seconds", "cpu")
                },
            }
        )
    return found


def compare_memory(
    work: Path, layers: tuple[int, ...], windows: int, length: int
) -> list[dict[str, Any]]:
    """Peak memory of evaluating a Llama of random weights and its int8-dynamic export, by depth."""
    found = []
    for count in layers:
        model, quant = work / f"model-{count}", work / f"quant-{count}"
        make_model(model, count)
        make_tokenizer(model)
        export(plan_export(ExportOptions(model, quant, Recipe(QuantScheme.parse("int8-dynamic")))))
        text = text_of(work, load_tokenizer(model), length * windows)
        run = measure(
            [
                sys.executable,
                "-c",
                EVAL,
                str(model),
                str(quant),
                str(text),
                str(length),
                str(windows),
            ]
        )
        nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        found.append(
            {
                "layers": count,
                "model_bytes": nbytes,
                "windows": windows,
                "seq_len": length,
                "seconds": printed(run)["seconds"],
                "peak_bytes": run.peak,
            }
        )
        click.echo(
            f"  {count} layers, {nbytes / 1e9:.2f} GB: {found[-1]['seconds']:.0f} s,"
            f" {run.peak / 1e6:.0f} MB",
            err=True,
        )
    return found


@click.command()
@click.option("--seq-len", default=2048, show_default=True)
@click.option("--windows", multiple=True, type=int, default=(4, 8, 16), show_default=True)
@click.option(
    "--repeats", default=3, show_default=True, help="Turns that count; one more goes before them."
)
@click.option(
    "--layers",
    multiple=True,
    type=int,
    default=(11, 22, 44),
    show_default=True,
    help="Of the models whose memory is measured; 22 are 1.1 B parameters.",
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
    default=RESULTS / "eval.md",
    show_default=True,
)
def main(
    seq_len: int,
    windows: tuple[int, ...],
    repeats: int,
    layers: tuple[int, ...],
    work: Path | None,
    output: Path,
) -> None:
    """Measure eval against the naive loop."""
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        speeds = compare_speed(Path(temporary), seq_len, windows, repeats)
        memory = compare_memory(Path(temporary), layers, 4, 512) if layers else []
    rows = [
        (
            str(entry["tokens"]),
            f"{entry['tokens'] / entry['naive']['seconds']:.0f}",
            " · ".join(f"{rate:.0f}" for rate in entry["rates"]),
            f"{2 * entry['tokens'] / entry['eval']['seconds']:.0f}",
            f"{entry['of_naive']['seconds']:.2f} · {entry['of_naive']['cpu']:.2f}",
            f"{1e6 * entry['eval']['cpu'] / entry['tokens'] / 2:.0f}",
            f"{entry['naive']['peak_bytes'] / 1e6:.0f}",
            f"{entry['eval']['peak_bytes'] / 1e6:.0f}",
        )
        for entry in speeds
    ]
    text = (
        f"# Eval: compared with the naive loop over transformers\n\nMachine: {machine()};"
        f" {f'medians of {repeats} turns' if repeats > 1 else 'one turn'}.\n\n"
    )
    text += (
        f"SmolLM2-135M and its int8-dynamic export, windows of {seq_len} tokens. Per model: the"
        " whole of `evaluate`, checks and comparison included, in two.\n\n"
    )
    columns = (
        "tokens",
        "naive, tokens/s",
        "eval says: base · quant",
        "eval per model, tokens/s",
        "of the naive loop's speed: wall · CPU",
        "CPU µs per token and model",
        "naive peak MB",
        "eval peak MB",
    )
    text += markdown_table(columns, rows)
    if memory:
        text += (
            "\nLlamas of 2048 hidden features with random weights and their int8-dynamic exports;"
            " peak memory of the whole process:\n\n"
        )
        shown = [
            (
                str(e["layers"]),
                f"{e['model_bytes'] / 1e9:.2f}",
                f"{e['windows']} × {e['seq_len']}",
                f"{e['peak_bytes'] / 1e6:.0f}",
                f"{e['seconds']:.0f}",
            )
            for e in memory
        ]
        text += markdown_table(("layers", "base GB", "windows", "peak MB", "seconds"), shown)
    output.parent.mkdir(exist_ok=True)
    output.write_text(text)
    write_json(
        output.with_suffix(".json"), {"machine": machine(), "speed": speeds, "memory": memory}
    )
    click.echo(text)


if __name__ == "__main__":
    main()
