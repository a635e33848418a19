"""The command line: the group of all commands.

Commands import torch and transformers when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import click

from quantkit import __version__
from quantkit.cli.bench import bench_command
from quantkit.cli.calibrate import calibrate_command
from quantkit.cli.compare import compare_command
from quantkit.cli.console import CONTEXT, ErrorGroup
from quantkit.cli.demo import demo_command
from quantkit.cli.doctor import doctor_command
from quantkit.cli.evaluate import eval_command
from quantkit.cli.export import export_command
from quantkit.cli.inspect import inspect_command
from quantkit.cli.quantize import quantize_command
from quantkit.cli.schemes import schemes_command
from quantkit.cli.sensitivity import sensitivity_command
from quantkit.cli.verify import verify_command


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
@click.version_option(__version__, "--version", prog_name="quantkit")
def main() -> None:
    """Quantize Hugging Face checkpoints to FP8 or INT8, and measure the loss.

    MODEL is a directory with safetensors files, a hub id or a .gguf file. To start:

    \b
      quantkit quantize MODEL -o OUT --scheme fp8-dynamic
      quantkit eval MODEL OUT --data text.txt

    Exit codes: 0 success, 1 failure, 2 bad usage, 3 a gate, verify or the sanity check failed,
    4 inconclusive (eval --strict), 5 not comparable, 75 interrupted (continue with --resume).
    """


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
