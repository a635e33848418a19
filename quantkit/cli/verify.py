"""`quantkit verify`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import Output, command
from quantkit.errors import FaultsFound
from quantkit.schemes.serving import RUNTIMES

WORST_SHOWN = 5  # of the layers that `verify --base` compares


@command("verify")
@click.argument("checkpoint")
@click.option("--base", help="The original model, to compare every weight with.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="Report as a fault whatever this runtime can't load.",
)
def verify_command(out: Output, checkpoint: str, base: str | None, runtime: str | None) -> None:
    """Check that CHECKPOINT is complete, finite and consistent, and that runtimes can load it.

    The exit code is 3 where it has a fault.
    """
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.cli.tables import print_json, print_table

    found = verified(out, resolve_model(checkpoint), resolve_model(base) if base else None, runtime)
    if out.as_json:
        print_json(found.to_json())
    elif found.faults:
        print_table(("tensor", "fault"), found.faults)
    if not out.as_json and found.sqnr_db:
        shown = found.worst_first if out.verbose else found.worst_first[:WORST_SHOWN]
        title = "worst first" + (
            ""
            if len(shown) == len(found.sqnr_db)
            else f", {len(shown)} of {len(found.sqnr_db)} (all with -v)"
        )
        print_table(
            ("Linear", "weight SQNR dB"),
            [(name, f"{value:.1f}" if math.isfinite(value) else "exact") for name, value in shown],
            title,
            right=(1,),
        )
    if not out.as_json and out.verbose and found.skipped:
        print_table(("left unquantized", "why"), list(found.skipped.items()))
    raise_faults(found)


def verified(out: Output, path: Path, base: Path | None, runtime: str | None) -> Any:
    from quantkit.checkpoint.units import counted
    from quantkit.cli.tables import Progress
    from quantkit.exporter.verify import verify

    started = time.monotonic()
    with Progress("verify", out.quiet) as progress:
        found = verify(path, base, runtime, progress.update)
    if not out.as_json:
        for warning in found.warnings:
            out.warn(warning)
    if not found.faults:
        worst = (
            f", least weight SQNR {min(found.sqnr_db.values()):.1f} dB"
            if found.sqnr_db and math.isfinite(min(found.sqnr_db.values()))
            else ""
        )
        worst += (
            f", {len(found.changed)} tensors not the base's because algorithms changed them"
            if base and found.changed
            else ""
        )
        out.note(
            f"{path}: sound; {counted(found.tensors, 'tensor')},"
            f" {counted(found.quantized, 'Linear')} quantized, {len(found.skipped)} left{worst},"
            f" {time.monotonic() - started:.1f} s"
        )
    return found


def raise_faults(found: Any) -> None:
    if found.faults:
        tensor, message = found.faults[0]
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise FaultsFound(
            f"{found.path} has faults: {f'{tensor} ' if tensor else ''}{message}{more}"
        )
