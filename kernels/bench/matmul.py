"""Speed of the multiplications and conversions beside torch's own ops, as tables.

    python kernels/bench/matmul.py [-o FILE.md] [--json FILE] [--turns 5]

What `quantkit bench` measures, over the shapes of models that people serve: input and output features of 576, 1536, 2048, 4096 and 11008. One thread,
thread CPU time, ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from quantkit.benchmark import KINDS, benchmark, describe, read_bandwidth
from quantkit.report import benchmark_rows, markdown_table

SHAPES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 11008), (4096, 4096), (4096, 11008), (11008, 4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    bandwidth, figures = read_bandwidth(), []
    for figure in benchmark(shapes=SHAPES, turns=arguments.turns):
        figures.append(figure)
        print(f"{figure.what} {figure.in_features}x{figure.out_features} {figure.tokens}: {figure.gb_per_s:.1f} GB/s {figure.times}", flush=True)
    machine = describe() | {"read_gb_per_s": bandwidth}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "figures": [asdict(figure) for figure in figures]}, indent=1) + "\n")
    text = f"""# Multiplications and conversions

Machine: {machine["processor"]}; instruction set {machine["kernels"]}; torch {machine["torch"]} ({machine["torch_capability"]}). One thread reads memory at
{bandwidth:.1f} GB/s.

Thread CPU time, medians of {arguments.turns} turns; "against" is how many times as fast as that op the kernel is, the median of the ratios within a turn.
matmul_int8 and matmul_fp8 include the quantization of the bfloat16 activations per token, onednn.qlinear that of its own (per tensor, to unsigned bytes);
torch._scaled_mm is given codes. Outputs are bfloat16, of matmul_bf16 float32. GB/s: bytes of weights read; of conversions, bytes read and
written. For one token the weight is one of many in turn, on all sides, so that it comes from memory (or from a last cache as large as theirs).

"""
    for kind in KINDS:
        headings, rows = benchmark_rows([figure for figure in figures if figure.kind == kind])
        text += f"## {kind}\n\n{markdown_table(headings, rows)}\n"
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
