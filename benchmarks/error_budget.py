"""Where a quantized model's loss comes from: KL and perplexity with the inputs of some Linears left
as they are, from the same codes.

    python benchmarks/error_budget.py --data wiki.test.raw --calibration-data c4.txt [--recipe
    configs/int8-dynamic-best.yaml] [--windows 20]

SmolLM2-135M is calibrated and exported by the recipe, or was: --checkpoint takes what `export` made
by it. Of the result copies are made that hold the same codes and scales, and a configuration by
which the inputs of some kind of Linear, in all blocks or in a few, aren't quantized: what is lost
less then is what these inputs cost. What is lost with no input quantized is the weights' part, and
that of bfloat16, in which two orders of a sum differ. Shares don't add up exactly, because errors
meet.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from export import machine
from quality import CONFIGS, LENGTH, make, opened_model

from quantkit.checkpoint.files import write_json
from quantkit.checkpoint.formats import QuantizedLayers, read_quantization_config, stored_linears
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import write_tensors
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.intervals import Difference
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.evaluation.report import markdown_table
from quantkit.schemes.scheme import QuantScheme

KINDS = {"q, k, v": "[qkv]_proj", "o": "o_proj", "gate, up": "(gate|up)_proj", "down": "down_proj"}
BLOCKS = 3  # at a time, of the kind that costs most


def without_inputs(checkpoint: Path, output: Path, pattern: str) -> Path:
    """The same codes and scales, with the inputs of the Linears that a pattern matches left
    unquantized.
    """
    source = Checkpoint.open(checkpoint)
    quantization = read_quantization_config(source.config)
    assert quantization is not None, f"{checkpoint} is not quantized"
    file_format = quantization.file_format
    tensors: dict[str, Any] = {}
    schemes: dict[str, QuantScheme] = {}
    stored = stored_linears(source.tensors)
    of_linears = {
        f"{module}.{suffix}" for module, suffixes in stored.items() for suffix in suffixes
    }
    for module, suffixes in stored.items():
        scheme = quantization.scheme_of(module)
        assert scheme is not None, f"{module} has codes, but no scheme"
        weight, _ = file_format.decode(
            {suffix: source.read(f"{module}.{suffix}") for suffix in suffixes}, scheme, module
        )
        if re.search(pattern, module):
            scheme = replace(scheme, input=None)
        schemes[module] = scheme
        parts = file_format.encode_rows(weight, scheme)
        parts |= file_format.encode_constants(scheme, tuple(weight.qdata.shape))
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    tensors |= {name: source.read(name) for name in source.tensors if name not in of_linears}
    output.mkdir()
    write_tensors(
        output / "model.safetensors",
        {name: tensor.contiguous() for name, tensor in tensors.items()},
    )
    for path in source.other_files():
        shutil.copy(path, output / path.name)
    layers = QuantizedLayers(schemes, quantization.ignore, next(iter(schemes.values())))
    config = source.config | {"quantization_config": file_format.config(layers)}
    (output / "config.json").write_text(json.dumps(config))
    return output


def judged(
    model: Path, checkpoint: Path, patterns: dict[str, str], data: str, windows: int
) -> list[dict[str, Any]]:
    """The checkpoint's figures, then those without some inputs' quantization."""
    with tempfile.TemporaryDirectory() as temporary:
        copies = [
            without_inputs(checkpoint, Path(temporary) / str(number), pattern)
            for number, pattern in enumerate(patterns.values())
        ]
        result = evaluate(
            EvaluationOptions(model, (checkpoint, *copies), (data,), LENGTH, LENGTH * windows)
        ).to_json()
    names = ["none", *patterns]
    return [
        {"unquantized": name, "kld": quant["kld"]["mean"], "ppl_delta_pct": quant["ppl_delta_pct"]}
        for name, quant in zip(names, result["quants"], strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    whole = rows[0]["kld"]
    shown = [
        (
            row["unquantized"],
            f"{row['kld']:.5f}",
            f"{whole - row['kld']:+.5f}",
            Difference(**row["ppl_delta_pct"]).text(),
        )
        for row in rows
    ]
    return markdown_table(
        ("inputs left as they are", "KL mean", "what they cost", "ΔPPL [95 %]"), shown
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--calibration-data",
        help="text to calibrate on; without it the text that comes with quantkit",
    )
    parser.add_argument("--recipe", type=Path, default=CONFIGS / "int8-dynamic-best.yaml")
    parser.add_argument(
        "--checkpoint", type=Path, help="an export by that recipe; without it one is made"
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument(
        "--samples", type=int, default=64, help="windows of 512 tokens to calibrate on"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    model = opened_model(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = (
            arguments.checkpoint or make(model, arguments.recipe, Path(temporary), arguments)[0]
        )
        kinds = judged(
            model, checkpoint, {**KINDS, "all": "_proj"}, arguments.data, arguments.windows
        )
        costly = min(
            KINDS, key=lambda kind: next(row["kld"] for row in kinds if row["unquantized"] == kind)
        )
        count = Checkpoint.open(model).config["num_hidden_layers"]
        parts = {
            f"{costly} in blocks {first} to {first + BLOCKS - 1}": (
                rf"layers\.({'|'.join(map(str, range(first, first + BLOCKS)))})\..*{KINDS[costly]}"
            )
            for first in range(0, count, BLOCKS)
        }
        blocks = judged(model, checkpoint, parts, arguments.data, arguments.windows)
    title = (
        f"SmolLM2-135M-Instruct by {arguments.recipe.stem}, {Path(arguments.data).name},"
        f" {arguments.windows} windows of {LENGTH} tokens, protocol gptq"
    )
    text = (
        f"# Where the loss comes from\n\n{title}.\nMachine:"
        f" {machine()}.\n\n{table(kinds)}\n\n{table(blocks)}"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"error_budget_{arguments.recipe.stem}"
    (arguments.output / f"{name}.md").write_text(text)
    write_json(
        arguments.output / f"{name}.json",
        {"machine": machine(), "recipe": arguments.recipe.stem, "kinds": kinds, "blocks": blocks},
    )
    print(text)


if __name__ == "__main__":
    main()
