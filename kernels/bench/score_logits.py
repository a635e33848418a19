"""Hidden states of base and candidate to each token's loss, likeliest token and KL: the kernel
compared with torch.

    python kernels/bench/score_logits.py [-o FILE.md] [--rounds 5]

One thread; thread CPU seconds, the programs taking turns, and of each turn's ratio the median.
"torch" is the plain way: two bfloat16 `linear`s, both logits to float32, log_softmax, and the sums,
with all logits of so many positions in memory; "in parts" is the op's reference, 1024 tokens of the
vocabulary at a time in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from quantize_blocks import machine, seconds
from torch import Tensor
from torch.nn.functional import linear

from quantkit.evaluation.report import markdown_table
from quantkit.ops import fallback, native

POSITIONS = 512
# (hidden size, vocabulary): SmolLM2-135M, Llama 2 7B, Qwen 3 1.7B.
MODELS = [(576, 49152), (4096, 32000), (2048, 151936)]


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, own_hidden: Tensor, own_weight: Tensor
) -> tuple[Tensor, ...]:
    ours, theirs = (
        linear(states, rows).float().log_softmax(-1)
        for states, rows in ((hidden, weight), (own_hidden, own_weight))
    )
    nll, own_nll = (-values.gather(1, targets[:, None])[:, 0].double() for values in (ours, theirs))
    return nll, ours.argmax(-1), own_nll, theirs.argmax(-1), (ours.exp() * (ours - theirs)).sum(-1)


def measure(size: int, vocabulary: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(POSITIONS, size).bfloat16(),
        (torch.randn(vocabulary, size) * 2 / size**0.5).bfloat16(),
    )
    own_hidden, targets = (
        (hidden + torch.randn(POSITIONS, size) * 0.1).bfloat16(),
        torch.randint(0, vocabulary, (POSITIONS,)),
    )
    packed = torch.ops.quantkit.pack_weight(weight, "bf16")
    other = packed.clone()
    model = (hidden, packed, None, targets, vocabulary, own_hidden)
    runs = {
        "kernel": lambda: torch.ops.quantkit.score_logits(*model, packed, None),
        "kernel, two weights": lambda: torch.ops.quantkit.score_logits(*model, other, None),
        "torch": lambda: plain(hidden, weight, targets, own_hidden, weight),
        "in parts": lambda: fallback.score_logits(*model, packed, None),
    }
    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    times = [f"{1e3 * median(turn[name] for turn in turns):.0f}" for name in runs]
    rate = median(4e-9 * POSITIONS * size * vocabulary / turn["kernel"] for turn in turns)
    ratios = [
        f"{median(turn[name] / turn['kernel'] for turn in turns):.1f}×"
        for name in ("torch", "in parts")
    ]
    return [f"{size} × {vocabulary}", *times, f"{rate:.0f}", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    columns = [
        "lm_head",
        "kernel, ms",
        "two weights, ms",
        "torch, ms",
        "in parts, ms",
        "GFLOP/s",
        "torch / kernel",
        "in parts / kernel",
    ]
    table = markdown_table(columns, [measure(*model, arguments.rounds) for model in MODELS])
    text = (
        f"# Figures of each token\n\nMachine: {machine()}; instruction set {native.cpu_level()}."
        f" {POSITIONS} positions of two models that share an lm_head.\n\n{table}"
    )
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
