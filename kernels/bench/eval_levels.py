"""What the kernels make of `quantkit eval`: tokens per second of quantized models over those of
their bfloat16 base, by instruction set.

    python kernels/bench/eval_levels.py [-o FILE.md] [--tokens 4096] [--turns 3]

SmolLM2-135M and its exports, windows of 1024 tokens of the bundled text. Each turn is a process of
its own that evaluates the base and all exports; kernels and torch (oneDNN) are asked for the same
instruction set. Rates are those that `eval` reports, the loss included; ratios are taken within a
turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from quantkit.cli.bench import processor
from quantkit.cli.demo import smollm2
from quantkit.data.sources import BUNDLED_CALIBRATION, read_source
from quantkit.evaluation.report import markdown_table
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.exporter.write import export
from quantkit.ops.native import LEVELS, cpu_level
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

SCHEMES = ("int8-dynamic", "fp8-dynamic", "int8-weight-only")
ASKED = {
    "amx": {},
    "avx512bf16": {"QUANTKIT_KERNELS": "avx512bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx2": {
        "QUANTKIT_KERNELS": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    base, rows = smollm2(lambda text: print(text, file=sys.stderr)), []
    with tempfile.TemporaryDirectory() as folder:
        quants = [Path(folder) / scheme for scheme in SCHEMES]
        for scheme, path in zip(SCHEMES, quants):
            export(plan_export(ExportOptions(base, path, Recipe(QuantScheme.parse(scheme)))))
        text = Path(folder) / "text.txt"
        text.write_text("\n\n".join(read_source(str(BUNDLED_CALIBRATION), None).documents))
        data = (
            "--data",
            text,
            "--seq-len",
            "1024",
            "--max-tokens",
            str(arguments.tokens),
            "--no-cache",
            "--json",
            "-q",
        )
        command = [sys.executable, "-m", "quantkit", "eval", base, *quants, *data]
        for level, asked in ASKED.items():
            if LEVELS.index(level) > LEVELS.index(cpu_level()):
                continue
            turns = []
            for _ in range(arguments.turns):
                ran = subprocess.run(
                    [str(word) for word in command],
                    env=os.environ | asked,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                result = json.loads(ran.stdout)
                turns.append(
                    [model["tokens_per_second"] for model in (result["base"], *result["quants"])]
                )
                print(level, [round(rate) for rate in turns[-1]], file=sys.stderr, flush=True)
            rates = [statistics.median(column) for column in zip(*turns)]
            ratios = [
                statistics.median(turn[at] / turn[0] for turn in turns)
                for at in range(1, len(rates))
            ]
            rows.append(
                [
                    level,
                    f"{rates[0]:.0f}",
                    *(f"{rate:.0f} ({ratio:.2f}×)" for rate, ratio in zip(rates[1:], ratios)),
                ]
            )
    times = f"medians of {arguments.turns} turns" if arguments.turns > 1 else "one turn"
    table = f"""# Eval by instruction set

Machine: {processor()}. SmolLM2-135M, {arguments.tokens} tokens in windows of 1024;
tokens per second as `quantkit eval` reports them, {times}; in brackets next to the bfloat16 base,
the median of the ratios within a turn. Kernels and torch are asked for the same instruction set.

{markdown_table(["instruction set", "bfloat16 base", *SCHEMES], rows)}"""
    if arguments.output:
        arguments.output.write_text(table)
    else:
        print(table)


if __name__ == "__main__":
    main()
