"""Speed of the CPU kernel quantize_blocks, compared with a copy of as many bytes and with the
reference arithmetic, as a table.

    python kernels/bench/quantize_blocks.py [-o FILE.md] [--json FILE] [--rounds 15]

One torch thread, thread CPU time. Every round measures each case once, its copy just before it, so
that a slow moment of the machine falls on all alike; the table has medians over the rounds. GB/s
counts the bytes of the input once and those of the codes and scales.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from quantkit import ops
from quantkit.cli.bench import processor
from quantkit.evaluation.report import markdown_table
from quantkit.ops import native, reference
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8, NumberFormat
from quantkit.schemes.quant_spec import CHANNEL, TENSOR, QuantSpec, block, group

ROWS, COLUMNS = 8192, 4096
REFERENCE_ROUNDS = 3
INPUTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# In the order of native.cpu_kernels()'s enums.
FLOAT_NUMBERS, FORMAT_NUMBERS, RULE_NUMBERS = (
    tuple(INPUTS),
    (INT8, FP8_E4M3),
    ("stored", "power_of_two", "dynamic"),
)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    dtype: torch.dtype
    spec: QuantSpec

    @property
    def name(self) -> str:
        scales = ", E8M0" if self.spec.scale_format is E8M0 else ""
        return (
            f"{INPUTS[self.dtype]} → {self.spec.format.name.removeprefix('FP8_')}"
            f" {self.spec.granularity}{scales}"
        )

    @property
    def bytes_moved(self) -> int:
        down, across = self.spec.granularity.scale_shape(ROWS, COLUMNS)
        return ROWS * COLUMNS * (self.dtype.itemsize + 1) + down * across * 4


def cases() -> list[Case]:
    def specs(number_format: NumberFormat) -> list[QuantSpec]:
        plain = [
            QuantSpec(number_format, granularity)
            for granularity in (CHANNEL, TENSOR, group(128), block(128, 128))
        ]
        return [*plain[:2], QuantSpec(number_format, group(32), scale_format=E8M0), *plain[2:]]

    from_bfloat16 = [
        Case(torch.bfloat16, spec)
        for number_format in (FP8_E4M3, INT8)
        for spec in specs(number_format)
    ]
    return from_bfloat16 + [
        Case(dtype, QuantSpec(number_format, CHANNEL))
        for dtype in (torch.float32, torch.float16)
        for number_format in (FP8_E4M3, INT8)
    ]


def seconds(run: Callable[[], object]) -> float:
    """Thread CPU time of one run."""
    started = time.thread_time()
    run()
    return time.thread_time() - started


def kernel_run(
    library: ctypes.CDLL, case: Case, values: Tensor, codes: Tensor, scale: Tensor
) -> Callable[[], object]:
    """The kernel alone, writing to buffers that exist already, as the copy does."""
    matrix = (ROWS, COLUMNS, COLUMNS, *case.spec.granularity.block_shape(ROWS, COLUMNS))
    numbers = (
        FORMAT_NUMBERS.index(case.spec.format),
        RULE_NUMBERS.index(ops.scale_rule(case.spec)),
    )
    arguments = (
        values.data_ptr(),
        FLOAT_NUMBERS.index(case.dtype),
        *matrix,
        *numbers,
        scale.data_ptr(),
        codes.data_ptr(),
    )
    return lambda: library.qk_quantize_blocks(*arguments)


def measure(rounds: int) -> list[dict]:
    """One record for each case and level: GB/s, share of the copy's bandwidth; for the best level
    also through torch.ops and times the reference.
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
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    inputs = {dtype: matrix.to(dtype) for dtype in INPUTS}
    codes, scale = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8), torch.zeros(ROWS * COLUMNS // 32)
    source, target = (
        torch.ones(max(case.bytes_moved for case in cases()) // 2, dtype=torch.uint8)
        for _ in range(2)
    )
    kernel = {(case, level): [] for case in cases() for level in levels}
    copied, through_torch, by_reference = ({case: [] for case in cases()} for _ in range(3))
    for number in range(rounds + 1):
        for case in cases():
            half = case.bytes_moved // 2
            values = inputs[case.dtype]
            times = [(copied[case], seconds(lambda half=half: target[:half].copy_(source[:half])))]
            run = kernel_run(library, case, values, codes, scale)
            for level in levels:
                library.qk_select_cpu_level(level)
                times.append((kernel[case, level], seconds(run)))
            library.qk_select_cpu_level(chosen)
            times.append(
                (
                    through_torch[case],
                    seconds(lambda case=case, values=values: ops.quantize(values, case.spec)),
                )
            )
            if number <= REFERENCE_ROUNDS:
                times.append(
                    (
                        by_reference[case],
                        seconds(
                            lambda case=case, values=values: reference.quantize(values, case.spec)
                        ),
                    )
                )
            if number:  # the first round warms up
                for measured, took in times:
                    measured.append(took)
    records = []
    for case, level in kernel:
        gigabytes = case.bytes_moved / 1e9
        record = {
            "case": case.name,
            "level": native.LEVELS[level],
            "gb_per_s": gigabytes / median(kernel[case, level]),
        }
        record["best_gb_per_s"] = gigabytes / min(kernel[case, level])
        record["copy_gb_per_s"] = gigabytes / median(copied[case])
        record["share_of_copy"] = median(
            copy / took for copy, took in zip(copied[case], kernel[case, level])
        )
        if level == levels[-1]:
            record["torch_op_gb_per_s"] = gigabytes / median(through_torch[case])
            record["reference_seconds"] = median(by_reference[case])
            record["times_the_reference"] = median(by_reference[case]) / median(through_torch[case])
        records.append(record)
    return records


def machine() -> str:
    """The processor, its last cache and the versions that the figures depend on."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    last_cache = f", L3 {cache.read_text().strip()}" if cache.is_file() else ""
    return (
        f"{processor()}{last_cache}, one thread, torch {torch.__version__}"
        f" ({torch.backends.cpu.get_cpu_capability()})"
    )


def markdown(records: list[dict], level: str, rounds: int) -> str:
    best = [record for record in records if record["level"] == level]
    rows = []
    for record in best:
        figures = (
            f"{record['gb_per_s']:.1f}",
            f"{record['copy_gb_per_s']:.1f}",
            f"{100 * record['share_of_copy']:.0f} %",
        )
        rows.append(
            (
                record["case"],
                *figures,
                f"{record['torch_op_gb_per_s']:.1f}",
                f"{record['times_the_reference']:.0f}×",
            )
        )
    table = markdown_table(
        (
            "case",
            f"{level}, GB/s",
            "copy, GB/s",
            "share of copy",
            "torch op, GB/s",
            "op against reference",
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
        (
            record["case"],
            *(
                f"{by_level[record['case'], name]['gb_per_s']:.1f}"
                f" ({100 * by_level[record['case'], name]['share_of_copy']:.0f} %)"
                for name in others
            ),
        )
        for record in best
    ]
    other_table = (
        f"\n## The other levels: GB/s (share of copy)\n\n{markdown_table(('case', *others), rows)}"
        if others
        else ""
    )
    return f"""# quantize_blocks on a {ROWS} × {COLUMNS} matrix

Machine: {machine()}; instruction set {level}.

Thread CPU time, medians of {rounds} interleaved rounds ({min(rounds, REFERENCE_ROUNDS)} for the
reference). GB/s: the input's bytes once, the codes' and the scales'. Per tensor reads the matrix
twice, and counts it once. Copy: torch `copy_` of half as many bytes, read and written; kernel and
copy write to buffers that exist already. Share of copy: median of the ratios within a round. Torch
op: `torch.ops.quantkit.quantize_blocks`, which allocates its outputs, as the reference does. A
matrix and its codes may stay in a last cache as large as this one between runs.

{table}{other_table}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.md", help="write the table here too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(arguments.rounds)
    table = markdown(records, records[-1]["level"], arguments.rounds)
    if arguments.output:
        arguments.output.write_text(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"machine": machine(), "rows": ROWS, "columns": COLUMNS, "records": records},
                indent=1,
            )
            + "\n"
        )
    print(table)


if __name__ == "__main__":
    main()
