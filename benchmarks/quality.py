"""What each recipe costs on SmolLM2-135M: perplexity, KL, size, time and memory of every recipe in
configs/, and of a model with outliers, as a table.

    python benchmarks/quality.py --data wiki.test.raw --calibration-data c4.txt \\
        [--windows 60] [--samples 64] [-o benchmarks/results]
    python benchmarks/quality.py --data wiki.test.raw --calibration-data c4.txt \\
        --only int8-dynamic-best fp8-dynamic-best --vllm-python PYTHON

Each recipe is calibrated, if it needs that, and exported by processes of their own: the table has
their processor time and largest memory. `eval` compares the results on the same windows of 1024
tokens (protocol gptq), as the schemes say. Rows are written to quality.json and quality.md as
they are done, four at a time: a run that is stopped goes on with --only and what is missing. The
rows "… on outliers" are of the same model after some channels of its norms, values and up
projections were made 64 times as large, and what reads them as much smaller: it computes the same
to the last bit. Rows "…, served by ampere or a CPU" are of the same files with their inputs left as
they are. With --vllm-python a server's own perplexities of the first 10 windows are added.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from export import machine, measure
from served import vllm_perplexity

from quantkit.checkpoint.files import finite
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.units import format_bytes
from quantkit.checkpoint.writer import write_tensors
from quantkit.cli.demo import smollm2
from quantkit.data.protocols import evaluation_windows
from quantkit.data.sources import read_source
from quantkit.data.tokenizer import load_tokenizer
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.intervals import Difference
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.report import markdown_table
from quantkit.schemes.recipe import Recipe

LENGTH = 1024
SERVED_WINDOWS = 10
# So many recipes share one run of the unquantized model.
AT_ONCE = 4
CONFIGS = Path(__file__).parent.parent / "configs"
# The recipes that are also tried on the model with outliers, and what their rows are called.
ON_OUTLIERS = {f"{name} on outliers": name for name in ("int8-dynamic", "int8-dynamic-best")}
OUTLIER = 64.0
# The recipes that are also evaluated as hardware without FP8 serves them, and what the names of
# those rows end in.
ALSO_WITHOUT_FP8 = ("fp8-dynamic", "fp8-dynamic-best")
WITHOUT_FP8 = ", served by ampere or a CPU"


def with_outliers(model: Path, output: Path) -> Path:
    """The same function with outliers: channels of each norm, of values and of up made larger, and
    the columns that read them smaller, by a power of two.
    """
    checkpoint = Checkpoint.open(model)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    heads = checkpoint.config["num_attention_heads"] // checkpoint.config["num_key_value_heads"]

    def move(producer: str, consumers: tuple[str, ...], step: int, repeats: int = 1) -> None:
        scale = torch.ones(tensors[f"{producer}.weight"].shape[0])
        scale[3::step] = OUTLIER
        head = checkpoint.config["head_dim"]
        columns = (
            scale.reshape(-1, head).repeat_interleave(repeats, 0).flatten()
            if repeats > 1
            else scale
        )
        weight = tensors[f"{producer}.weight"]
        tensors[f"{producer}.weight"] = (
            weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        ).bfloat16()
        for consumer in consumers:
            tensors[f"{consumer}.weight"] = (tensors[f"{consumer}.weight"] / columns).bfloat16()

    for number in range(checkpoint.config["num_hidden_layers"]):
        block = f"model.layers.{number}"
        move(
            f"{block}.input_layernorm",
            tuple(f"{block}.self_attn.{name}_proj" for name in "qkv"),
            150,
        )
        move(
            f"{block}.post_attention_layernorm",
            (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
            150,
        )
        move(f"{block}.self_attn.v_proj", (f"{block}.self_attn.o_proj",), 100, heads)
        move(f"{block}.mlp.up_proj", (f"{block}.mlp.down_proj",), 400)
    output.mkdir()
    write_tensors(
        output / "model.safetensors",
        {name: tensor.contiguous() for name, tensor in tensors.items()},
    )
    for path in (model / "config.json", *checkpoint.other_files()):
        shutil.copy(path, output / path.name)
    return output


def opened_model(arguments: argparse.Namespace) -> Path:
    """SmolLM2-135M's directory. A wrong path of data is found now, not after a calibration."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = smollm2(print)
    for source in filter(None, (arguments.data, arguments.calibration_data)):
        read_source(source, load_tokenizer(model))
    return model


def make(
    model: Path, recipe: Path, work: Path, arguments: argparse.Namespace
) -> tuple[Path, dict[str, float]]:
    """The quantized checkpoint, and what making it took: seconds, those of the processor, and the
    largest memory of the processes.
    """
    output, calibration = work / "quantized", work / "calibration"
    command, runs = [sys.executable, "-m", "quantkit"], []
    needs = Recipe.load(recipe).needs_calibration
    if needs:
        data = ["--data", arguments.calibration_data] if arguments.calibration_data else []
        windows = ["--num-samples", str(arguments.samples), "--seq-len", "512"]
        runs.append(
            measure(
                [
                    *command,
                    "calibrate",
                    str(model),
                    "-o",
                    str(calibration),
                    "--recipe",
                    str(recipe),
                    *windows,
                    *data,
                    "--overwrite",
                    "-q",
                ]
            )
        )
    calibrated = ["--calibration", str(calibration)] if needs else []
    runs.append(
        measure(
            [
                *command,
                "export",
                str(model),
                "-o",
                str(output),
                "--recipe",
                str(recipe),
                *calibrated,
                "--overwrite",
                "-q",
            ]
        )
    )
    return output, {
        "seconds": sum(run.wall for run in runs),
        "cpu_seconds": sum(run.cpu for run in runs),
        "peak_bytes": max(run.peak for run in runs),
    }


class Server:
    """vLLM's own perplexities of the first windows; the unquantized model's is asked for once."""

    def __init__(self, python: str, model: Path, data: str, work: Path, base: float | None) -> None:
        self._python, self._model, self._base, self._windows = (
            python,
            model,
            base,
            work / "windows.json",
        )
        cut = evaluation_windows(
            [data], load_tokenizer(model), "gptq", LENGTH, SERVED_WINDOWS * LENGTH
        ).windows
        self._windows.write_text(json.dumps([list(window.tokens) for window in cut]))

    def judge(self, checkpoint: Path) -> dict[str, Any]:
        if self._base is None:
            self._base = vllm_perplexity(self._python, self._model, self._windows)["perplexity"]
        try:
            found = vllm_perplexity(self._python, checkpoint, self._windows)
        except click.ClickException as error:
            return {"base": self._base, "refused": str(error)[-300:]}
        return {
            "base": self._base,
            "perplexity": found["perplexity"],
            "delta_pct": 100 * (found["perplexity"] / self._base - 1),
            "answered": found["answered"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--calibration-data",
        help="text to calibrate on; without it the text that comes with quantkit",
    )
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument(
        "--samples", type=int, default=64, help="windows of 512 tokens to calibrate on"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="RECIPE",
        help="measure these and keep the other rows, made on the same machine and text",
    )
    parser.add_argument(
        "--vllm-python", help="a Python that has vLLM, to ask for served perplexities"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    model = opened_model(arguments)
    recipes = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    recipes |= {row: recipes[name] for row, name in ON_OUTLIERS.items()}
    unknown = set(arguments.only or ()) - set(recipes)
    if unknown:
        raise SystemExit(
            f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(recipes)}"
        )
    report: dict[str, Any] = {}
    if arguments.only and (arguments.output / "quality.json").is_file():
        report = json.loads((arguments.output / "quality.json").read_text())
    names = [name for name in arguments.only or recipes if _fits(name, Recipe.load(recipes[name]))]
    for first in range(0, len(names), AT_ONCE):
        report = _measured(
            report,
            {name: recipes[name] for name in names[first : first + AT_ONCE]},
            model,
            arguments,
        )
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
        (arguments.output / "quality.md").write_text(_markdown(report))
    print(_markdown(report))


def _fits(name: str, recipe: Recipe) -> bool:
    if any(
        scheme.weight.granularity.name == "group" and 576 % scheme.weight.granularity.columns
        for scheme in recipe.schemes
    ):
        print(f"{name}: its groups don't divide 576; not measured")
        return False
    return True


def _measured(
    report: dict[str, Any], recipes: dict[str, Path], model: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The report with the rows of these recipes: made one after the other, and
    evaluated with one run of the unquantized model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        made: dict[str, tuple[Path, dict[str, float]]] = {}
        for number, (name, recipe) in enumerate(recipes.items()):
            work = Path(temporary) / str(number)
            work.mkdir()
            source = with_outliers(model, work / "outliers") if name in ON_OUTLIERS else model
            made[name] = make(source, recipe, work, arguments)
        result = evaluate(
            EvaluationOptions(
                model,
                tuple(output for output, _ in made.values()),
                (arguments.data,),
                LENGTH,
                LENGTH * arguments.windows,
            )
        ).to_json()
        for (name, (output, cost)), judged in zip(made.items(), result["quants"], strict=True):
            cost = {
                "samples": arguments.samples if Recipe.load(recipes[name]).needs_calibration else 0
            } | cost
            row = {"recipe": name} | cost | judged
            if arguments.vllm_python:
                base = next(
                    (
                        earlier["served"]["base"]
                        for earlier in report.get("recipes", ())
                        if "served" in earlier
                    ),
                    None,
                )
                row["served"] = Server(
                    arguments.vllm_python, model, arguments.data, Path(temporary), base
                ).judge(output)
            report = _with_row(report, row, result, arguments)
            costs = f"{row['seconds']:.0f} s ({row['cpu_seconds']:.0f} s of the processor)"
            print(
                f"{name}: {Difference(**row['ppl_delta_pct']).text()}, KL {row['kld']['mean']:.4f},"
                f" {costs}",
                flush=True,
            )
            if name in ALSO_WITHOUT_FP8:
                options = EvaluationOptions(
                    model,
                    (output,),
                    (arguments.data,),
                    LENGTH,
                    LENGTH * arguments.windows,
                    hardware="cpu",
                )
                report = _with_row(
                    report,
                    {"recipe": name + WITHOUT_FP8}
                    | cost
                    | evaluate(options).to_json()["quants"][0],
                    result,
                    arguments,
                )
    return report


def _with_row(
    report: dict[str, Any],
    row: dict[str, Any],
    result: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The report with a row more, in place of the same recipe's; rows of another machine or text
    aren't mixed with it.
    """
    made = {
        "machine": machine(),
        "calibration_data": Path(arguments.calibration_data or "bundled").name,
    }
    made |= {key: result[key] for key in ("protocol", "data", "tokens_scored", "windows", "base")}
    made["data"]["sources"] = [Path(source).name for source in made["data"]["sources"]]
    made = _without_windows(finite(made))
    for key in ("machine", "calibration_data", "protocol", "data", "windows"):
        if report and report.get(key) != made[key]:
            raise SystemExit(f"--only: the earlier results have another {key}; measure all again")
    rows = {
        entry["recipe"]: entry
        for entry in (*report.get("recipes", ()), _without_windows(finite(row)))
    }
    return made | {"recipes": [rows[name] for name in sorted(rows)]}


def _markdown(report: dict[str, Any]) -> str:
    base = report["base"]
    rows = [
        (
            "bfloat16",
            f"{base['perplexity']:.3f}",
            "",
            "",
            "",
            "",
            format_bytes(base["bytes"]),
            "",
            "",
        )
    ]
    for row in report["recipes"]:
        served = row.get("served", {})
        shown = (
            f"{served['delta_pct']:+.2f} %{' ¹' if served['answered'] else ''}"
            if "delta_pct" in served
            else "refused"
            if served
            else ""
        )
        figures = (
            f"{row['perplexity']:.3f}",
            Difference(**row["ppl_delta_pct"]).text(),
            f"{row['kld']['mean']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
        )
        rows.append(
            (
                row["recipe"],
                *figures,
                shown,
                format_bytes(row["bytes"]),
                f"{row['cpu_seconds'] / 60:.2f}",
                format_bytes(row["peak_bytes"]),
            )
        )
    columns = (
        "recipe",
        "perplexity",
        "ΔPPL [95 %]",
        "KL mean",
        "same top-1",
        "served ΔPPL",
        "size",
        "CPU minutes",
        "peak memory",
    )
    title = (
        f"SmolLM2-135M-Instruct, {report['data']['sources'][0]}, {report['tokens_scored']} tokens"
        f" in {report['windows']} windows of {LENGTH}, protocol gptq"
    )
    samples = {row["samples"] for row in report["recipes"] if row["samples"]}
    calibrated = (
        f"Calibrated on {' or '.join(map(str, sorted(samples)))} windows of 512 tokens of"
        f" {report['calibration_data']}, where that is needed. "
        if samples
        else ""
    )
    notes = (
        "\n¹ Asked of vLLM's CPU build with `torch._scaled_mm` answered in float32"
        " (`benchmarks/served.py`)."
        if any("¹" in row[5] for row in rows)
        else ""
    )
    return (
        f"# What each recipe costs\n\n{title}. {calibrated}CPU minutes and memory are those of"
        " calibrate and export.\nMachine:"
        f" {report['machine']}.\n\n{markdown_table(columns, rows)}{notes}"
    )


def _without_windows(report: Any) -> Any:
    """Without the per-window sums, paths and layers: they are large, and `quantkit eval -o` gives
    them to who needs them.
    """
    dropped = ("window_nll", "window_kld", "window_same_top1", "path", "layers", "max_at")
    if isinstance(report, dict):
        return {key: _without_windows(value) for key, value in report.items() if key not in dropped}
    return [_without_windows(value) for value in report] if isinstance(report, list) else report


if __name__ == "__main__":
    main()
