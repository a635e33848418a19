"""Speed of the multiplications and conversions compared with torch's own ops, as tables.

    python kernels/bench/matmul.py [-o FILE.md] [--json FILE] [--turns 5] [--shape KxN]...

What `quantkit bench` measures, over the shapes of models that people serve: all pairs of 576, 1536,
2048, 4096 and 11008 input and output features. One thread, thread CPU time, ratios within a turn.
For another instruction set than the best one, ask both sides for it:

    QUANTKIT_KERNELS=avx512bf16 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python kernels/bench/matmul.py
    QUANTKIT_KERNELS=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python
    kernels/bench/matmul.py
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from itertools import product
from pathlib import Path

from quantkit.cli.bench import (
    BENCHMARK_KINDS,
    TOKENS,
    Figure,
    benchmark,
    benchmark_rows,
    describe,
    read_bandwidth,
)
from quantkit.evaluation.report import markdown_table

FEATURES = (576, 1536, 2048, 4096, 11008)
ASKED_FOR = ("QUANTKIT_KERNELS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--shape", action="append", help="KxN; again for more")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shape or ()] or list(
        product(FEATURES, FEATURES)
    )
    bandwidth, figures = read_bandwidth(), []
    for figure in benchmark(shapes=shapes, turns=arguments.turns):
        figures.append(figure)
        print(
            f"{figure.what} {figure.in_features}x{figure.out_features} {figure.tokens}:"
            f" {figure.gb_per_s:.1f} GB/s {figure.times}",
            flush=True,
        )
    asked = " ".join(f"{name}={os.environ[name]}" for name in ASKED_FOR if name in os.environ)
    machine = describe() | {"read_gb_per_s": bandwidth, "asked_for": asked}
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"machine": machine, "figures": [asdict(figure) for figure in figures]}, indent=1
            )
            + "\n"
        )
    text = f"""# Multiplications and conversions

Machine: {machine["processor"]}; instruction set
{machine["kernels"]}{f" ({asked})" if asked else ""}; torch {machine["torch"]}
({machine["torch_capability"]}). One thread reads memory at {bandwidth:.1f} GB/s.

Thread CPU time, medians of {arguments.turns} turns; "against" is how many times as fast as that op
the kernel is, the median of the ratios within a turn, for {", ".join(map(str, TOKENS))} tokens.
matmul_int8 and matmul_fp8 include the quantization of the bfloat16 activations per token,
onednn.qlinear that of its own (per tensor, to unsigned bytes); torch._scaled_mm is given codes.
Outputs are bfloat16, of matmul_bf16 float32. GB/s: bytes of weights read; of conversions, bytes
read and written. For one token the weight is one of many in turn, on all sides, so that it comes
from memory (or from a last cache as large as theirs).

"""
    for kind in BENCHMARK_KINDS:
        of_kind = [figure for figure in figures if figure.kind == kind]
        headings, rows = benchmark_rows(of_kind) if kind == "convert" else by_shape(of_kind)
        text += f"## {kind}\n\n{markdown_table(headings, rows)}\n"
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


def by_shape(figures: list[Figure]) -> tuple[list[str], list[list[str]]]:
    """One row a shape; in each cell the figures of 1, 16, 128 and 512 tokens."""
    rivals = list(dict.fromkeys(rival for figure in figures for rival in figure.times))
    headings = [
        "in × out",
        "µs",
        "GOP/s",
        "GB/s, 1 token",
        *(f"against {rival}" for rival in rivals),
    ]
    rows = []
    for shape in dict.fromkeys((figure.in_features, figure.out_features) for figure in figures):
        cells = [figure for figure in figures if (figure.in_features, figure.out_features) == shape]
        row = [
            f"{shape[0]} × {shape[1]}",
            " · ".join(f"{cell.microseconds:.0f}" for cell in cells),
            " · ".join(f"{cell.gops:.0f}" for cell in cells),
        ]
        row.append(f"{cells[0].gb_per_s:.1f}")
        row += [
            " · ".join(f"{cell.times[rival]:.3g}" if rival in cell.times else "–" for cell in cells)
            for rival in rivals
        ]
        rows.append(row)
    return headings, rows


if __name__ == "__main__":
    main()
