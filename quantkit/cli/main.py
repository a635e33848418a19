"""The command line: the group of all commands, and those commands that are only a few lines.

torch and transformers are imported inside commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path

import click

from quantkit import __version__
from quantkit.cli.calibrate import calibrate_command
from quantkit.cli.compare import compare_command
from quantkit.cli.console import CONTEXT, ErrorGroup, Output, command
from quantkit.cli.evaluate import eval_command
from quantkit.cli.export import export_command
from quantkit.cli.options import BENCHMARK_KINDS, Shape, UserPath
from quantkit.cli.quantize import quantize_command
from quantkit.cli.sensitivity import sensitivity_command
from quantkit.cli.verify import verify_command
from quantkit.errors import QuantkitError


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
@click.version_option(__version__, "--version", prog_name="quantkit")
def main() -> None:
    """Quantize Hugging Face checkpoints to FP8 or INT8, and measure the loss.

    MODEL is a directory with safetensors files, a hub id or a .gguf file. To start:

    \b
      quantkit quantize MODEL -o OUT --scheme fp8-dynamic
      quantkit eval MODEL OUT --data text.txt

    Exit codes: 0 success, 1 failure, 2 bad usage, 3 a gate, verify or the sanity check failed,
    4 inconclusive (eval --strict), 5 not comparable, 75 interrupted (--resume continues).
    """


@command("inspect")
@click.argument("path")
def inspect_command(out: Output, path: str) -> None:
    """Show what a checkpoint or a calibration contains."""
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.cli.inspect import inspect_path, inspection_tables
    from quantkit.cli.tables import print_json, print_table

    description = inspect_path(resolve_model(path))
    if out.as_json:
        print_json(description)
        return
    for title, columns, rows, right in inspection_tables(description):
        print_table(columns, rows, title, right)


@command("schemes")
def schemes_command(out: Output) -> None:
    """List the schemes, and the runtimes and hardware that support each."""
    from quantkit.cli.schemes import describe_schemes, schemes_tables
    from quantkit.cli.tables import print_json, print_table

    if out.as_json:
        print_json(describe_schemes())
        return
    for title, columns, rows, right in schemes_tables():
        print_table(columns, rows, title, right)


@command("doctor")
def doctor_command(out: Output) -> None:
    """Check versions, kernels and devices; exit code 1 if something is broken."""
    from quantkit.cli.doctor import examine
    from quantkit.cli.tables import print_json, print_table

    examination = examine()
    if out.as_json:
        print_json(examination)
    else:
        print_table(
            ("check", "found", "status"),
            [(check["name"], check["found"], check["status"]) for check in examination["checks"]],
        )
    if not examination["ok"]:
        broken = [check for check in examination["checks"] if check["status"] == "broken"]
        raise QuantkitError(f"{broken[0]['name']} is broken: {broken[0]['found']}")


@command("bench")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(BENCHMARK_KINDS),
    help="Kernels to measure; repeatable.  [default: all]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    type=Shape(),
    help="Input × output features, e.g. 4096x4096; repeatable.  [default: three of small models]",
)
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(1),
    help="Tokens per call; repeatable.  [default: 1, 16, 128, 512]",
)
def bench_command(
    out: Output,
    kinds: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...],
    tokens: tuple[int, ...],
) -> None:
    """Compare the speed of the compiled kernels with torch's own ops, on one thread."""
    from dataclasses import asdict

    from quantkit.cli.bench import (
        SHAPES,
        TOKENS,
        benchmark,
        benchmark_rows,
        describe,
        read_bandwidth,
    )
    from quantkit.cli.tables import Progress, print_json, print_table

    cases = (kinds or BENCHMARK_KINDS, shapes or SHAPES, tokens or TOKENS)
    total = len(cases[1]) * sum(3 if kind == "convert" else len(cases[2]) for kind in cases[0])
    with Progress("bench", out.quiet) as progress:
        figures, bandwidth = [], read_bandwidth()
        for figure in benchmark(*cases):
            figures.append(figure)
            progress.update(len(figures), total)
    machine = describe() | {"read_gb_per_s": bandwidth}
    if out.as_json:
        print_json({"machine": machine, "figures": [asdict(figure) for figure in figures]})
        return
    out.note(
        f"{machine['processor']}, kernels {machine['kernels']}, torch {machine['torch']}, one"
        f" thread; memory bandwidth {bandwidth:.1f} GB/s"
    )
    headings, rows = benchmark_rows(figures)
    print_table(headings, rows, right=range(1, len(headings)))


@command("demo")
@click.option(
    "-o",
    "--output",
    type=UserPath(),
    default=Path("quantkit-demo"),
    show_default=True,
    help="Directory for the results.",
)
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier demo.")
def demo_command(out: Output, output: Path, overwrite: bool) -> None:
    """Quantize and evaluate a small real model (SmolLM2-135M) in a few minutes."""
    from quantkit.cli.demo import run_demo
    from quantkit.cli.tables import print_json, print_table

    out.quiet_libraries()
    story = run_demo(output, overwrite, out.note, out.quiet)
    if out.as_json:
        print_json(story.result)
        return
    print_table(story.columns, story.rows, story.title, right=story.right)
    out.note(story.epilogue)


for _command in (
    calibrate_command,
    export_command,
    eval_command,
    compare_command,
    quantize_command,
    verify_command,
    sensitivity_command,
    inspect_command,
    schemes_command,
    doctor_command,
    bench_command,
    demo_command,
):
    main.add_command(_command)
