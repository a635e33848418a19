"""Speed of the CPU kernel observe_rows, compared with a copy of its input and with torch doing the
same passes, as a table.

    python kernels/bench/observe_rows.py [-o FILE.md] [--json FILE] [--rounds 25]

One torch thread, thread CPU time. Every round measures each case once, its copy just before it, so
that a slow moment of the machine falls on all alike; the table has medians over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from quantize_blocks import INPUTS, machine, seconds
from torch import Tensor

from quantkit import ops
from quantkit.evaluation.report import markdown_table
from quantkit.ops import native

ABOVE = 8.0
TORCH_ROUNDS = 5
SHAPES = ((4096, 576), (4096, 1536), (4096, 4096))


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    dtype: torch.dtype
    rows: int
    columns: int
    zeros: bool = False

    @property
    def name(self) -> str:
        return (
            f"{INPUTS[self.dtype]} {self.rows} × {self.columns}{', all zero' if self.zeros else ''}"
        )

    @property
    def values(self) -> Tensor:
        """Gaussian, channels of different scales."""
        generator = torch.Generator().manual_seed(0)
        scale = torch.exp(torch.randn(self.columns, generator=generator)) * (not self.zeros)
        return (torch.randn(self.rows, self.columns, generator=generator) * scale).to(self.dtype)


def cases() -> list[Case]:
    return [
        *(
            Case(dtype, *shape)
            for dtype in INPUTS
            for shape in SHAPES[: 3 if dtype == torch.bfloat16 else 2]
        ),
        Case(torch.bfloat16, *SHAPES[0], zeros=True),
    ]


class Statistics:
    """What observe_rows adds to."""

    def __init__(self, columns: int) -> None:
        self.channel_amax, self.channel_sum_of_squares = (
            torch.zeros(columns),
            torch.zeros(columns, dtype=torch.float64),
        )
        self.histogram, self.token_histogram = torch.zeros(2, ops.HISTOGRAM_BINS, dtype=torch.int64)
        self.extremes, self.counts = (
            torch.tensor([torch.inf, -torch.inf]),
            torch.zeros(2, dtype=torch.int64),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.channel_amax,
            self.channel_sum_of_squares,
            self.histogram,
            self.token_histogram,
            self.extremes,
            self.counts,
        )


def torch_passes(values: Tensor, statistics: Statistics) -> None:
    """The same statistics, but for the last bits of the squares' sums, one pass after another."""

    def count_bins(magnitudes: Tensor) -> Tensor:
        keys = magnitudes.float().view(torch.int32) >> ops.HISTOGRAM_SHIFT
        return torch.bincount(
            (keys - ops.HISTOGRAM_OFFSET).clamp_(0, ops.HISTOGRAM_BINS - 1).flatten(),
            minlength=ops.HISTOGRAM_BINS,
        )

    magnitudes = values.abs()
    torch.maximum(statistics.channel_amax, magnitudes.amax(0).float(), out=statistics.channel_amax)
    statistics.channel_sum_of_squares += values.float().square().sum(0)
    statistics.histogram += count_bins(magnitudes)
    statistics.token_histogram += count_bins(magnitudes.amax(1))
    low, high = values.aminmax()
    statistics.extremes.copy_(
        torch.stack(
            [
                torch.minimum(statistics.extremes[0], low),
                torch.maximum(statistics.extremes[1], high),
            ]
        )
    )
    statistics.counts[0] += values.shape[0]
    statistics.counts[1] += (magnitudes > ABOVE).sum()


def kernel_run(library: ctypes.CDLL, case: Case, values: Tensor) -> Callable[[], object]:
    """The kernel alone, on all columns."""
    statistics, row_magnitudes = Statistics(case.columns), torch.empty(case.rows)
    matrix = (
        values.data_ptr(),
        tuple(INPUTS).index(case.dtype),
        case.rows,
        case.columns,
        0,
        case.columns,
    )
    outputs = (
        statistics.channel_amax,
        statistics.channel_sum_of_squares,
        statistics.histogram,
        statistics.extremes,
        statistics.counts[1:],
        row_magnitudes,
    )
    return lambda: library.qk_observe_rows(
        *matrix, ABOVE, *(tensor.data_ptr() for tensor in outputs)
    )


def measure(rounds: int) -> list[dict]:
    """One record for each case and level: ns per value, and for the best level those of the copy,
    the op and torch's passes.
    """
    library = native.cpu_kernels()
    if library is None:
        raise SystemExit("the CPU kernels aren't built here; see kernels/README.md")
    chosen = library.qk_cpu_level()
    levels = [
        level
        for level in map(native.LEVELS.index, native.ELEMENTWISE_LEVELS)
        if library.qk_select_cpu_level(level) == 0
    ]
    inputs = {case: case.values for case in cases()}
    targets = {case: torch.empty_like(values) for case, values in inputs.items()}
    statistics = {case: Statistics(case.columns) for case in inputs}
    kernel = {(case, level): [] for case in inputs for level in levels}
    copied, through_torch, by_torch = ({case: [] for case in inputs} for _ in range(3))
    for number in range(rounds + 1):
        for case, values in inputs.items():
            times = [
                (
                    copied[case],
                    seconds(lambda case=case, values=values: targets[case].copy_(values)),
                )
            ]
            run = kernel_run(library, case, values)
            for level in reversed(levels):  # the best one next to the copy
                library.qk_select_cpu_level(level)
                times.append((kernel[case, level], seconds(run)))
            library.qk_select_cpu_level(chosen)
            tensors = statistics[case].tensors()
            times.append(
                (
                    through_torch[case],
                    seconds(
                        lambda values=values, tensors=tensors: torch.ops.quantkit.observe_rows(
                            values, ABOVE, *tensors
                        )
                    ),
                )
            )
            if number <= TORCH_ROUNDS:
                times.append(
                    (
                        by_torch[case],
                        seconds(
                            lambda case=case, values=values: torch_passes(values, statistics[case])
                        ),
                    )
                )
            if number:  # the first round warms up
                for measured, took in times:
                    measured.append(took * 1e9 / values.numel())
    records = []
    for case, level in kernel:
        record = {
            "case": case.name,
            "level": native.LEVELS[level],
            "ns": median(kernel[case, level]),
            "least_ns": min(kernel[case, level]),
        }
        record["copy_ns"] = median(copied[case])
        record["times_the_copy"] = median(
            took / copy for copy, took in zip(copied[case], kernel[case, level])
        )
        if level == levels[-1]:
            record["op_ns"], record["torch_ns"] = (
                median(through_torch[case]),
                median(by_torch[case]),
            )
        records.append(record)
    return records


def markdown(records: list[dict], level: str, rounds: int) -> str:
    best = [record for record in records if record["level"] == level]
    rows = []
    for record in best:
        figures = (
            f"{record['ns']:.2f}",
            f"{record['least_ns']:.2f}",
            f"{record['copy_ns']:.2f}",
            f"{record['times_the_copy']:.1f}×",
            f"{record['op_ns']:.2f}",
        )
        rows.append(
            (
                record["case"],
                *figures,
                f"{record['torch_ns']:.1f}",
                f"{record['torch_ns'] / record['op_ns']:.0f}×",
            )
        )
    table = markdown_table(
        (
            "case",
            f"{level}, ns",
            "least",
            "copy, ns",
            "against copy",
            "torch op, ns",
            "torch's passes, ns",
            "passes against op",
        ),
        rows,
    )
    others = [
        name
        for name in native.ELEMENTWISE_LEVELS
        if name != level and any(record["level"] == name for record in records)
    ]
    by_level = {(record["case"], record["level"]): record for record in records}
    rows = [
        (record["case"], *(f"{by_level[record['case'], name]['ns']:.2f}" for name in others))
        for record in best
    ]
    other_table = (
        f"\n## The other levels: ns\n\n{markdown_table(('case', *others), rows)}" if others else ""
    )
    return f"""# observe_rows: nanoseconds a value

Machine: {machine()}; instruction set {level}.

Thread CPU time, medians of {rounds} interleaved rounds ({min(rounds, TORCH_ROUNDS)} for torch's
passes) and the least. Values are Gaussian, channels of different scales. Copy: torch `copy_` of the
input, read and written; against copy: median of the ratios within a round. Torch op:
`torch.ops.quantkit.observe_rows` with one thread. Torch's passes: the same statistics with torch's
own functions. All matrices fit in a last cache as large as this one.

{table}{other_table}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.md", help="write the table here too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(arguments.rounds)
    table = markdown(records, records[-1]["level"], arguments.rounds)
    if arguments.output:
        arguments.output.write_text(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "records": records}, indent=1) + "\n"
        )
    print(table)


if __name__ == "__main__":
    main()
