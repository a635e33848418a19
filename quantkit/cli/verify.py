"""`quantkit verify`."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import Output, command
from quantkit.cli.option_names import as_command_line
from quantkit.errors import FaultsFound
from quantkit.schemes.serving import RUNTIMES

if TYPE_CHECKING:
    from quantkit.exporter.verification import Verification

WORST_SHOWN = 5  # Linears in the table of `verify --base`; all of them with -v


@command("verify")
@click.argument("checkpoint")
@click.option("--base", help="The original model; every weight is compared with it.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="Report as a fault whatever this runtime can't load.",
)
def verify_command(out: Output, checkpoint: str, base: str | None, runtime: str | None) -> None:
    """Check that CHECKPOINT is complete, finite and consistent, and that runtimes can load it.

    If it has a fault, the exit code is 3.
    """
    from quantkit.checkpoint.hub import resolve_model
    from quantkit.cli.tables import print_json

    path, base_path = resolve_model(checkpoint), resolve_model(base) if base else None
    found = run_verify(out, path, base_path, runtime)
    if out.as_json:
        print_json(found.to_json())
    else:
        _print_verification(out, found)
    raise_faults(found)


def run_verify(out: Output, path: Path, base: Path | None, runtime: str | None) -> Verification:
    """Verify a checkpoint, and print a line about one without faults."""
    from quantkit.checkpoint.units import counted
    from quantkit.cli.tables import Progress
    from quantkit.exporter.verify import verify

    started = time.monotonic()
    with Progress("verify", out.quiet) as progress:
        found = verify(path, base, runtime, progress)
    if not out.as_json:
        for warning in found.warnings:
            out.warn(warning)
    if not found.faults:
        out.note(
            f"{path}: no faults; {counted(found.tensors, 'tensor')},"
            f" {counted(found.quantized, 'Linear')} quantized, {len(found.skipped)}"
            f" skipped{_compared(found, base)}, {time.monotonic() - started:.1f} s"
        )
    return found


def _compared(found: Verification, base: Path | None) -> str:
    """What the comparison with the base found, as the middle of a sentence."""
    lowest = min(found.sqnr_db.values()) if found.sqnr_db else math.inf
    text = f", lowest weight SQNR {lowest:.1f} dB" if math.isfinite(lowest) else ""
    if base and found.changed:
        text += f", {len(found.changed)} tensors differ from the base because algorithms changed"
        text += " them"
    return text


def _print_verification(out: Output, found: Verification) -> None:
    """Tables: the faults; the SQNR of Linears, worst first; with -v the skipped Linears."""
    from quantkit.cli.tables import print_table

    if found.faults:
        faults = [(tensor, as_command_line(message)) for tensor, message in found.faults]
        print_table(("tensor", "fault"), faults)
    if found.sqnr_db:
        shown = found.worst_first if out.verbose else found.worst_first[:WORST_SHOWN]
        total = len(found.sqnr_db)
        part = "" if len(shown) == total else f", {len(shown)} of {total} (all with -v)"
        rows = [
            (name, f"{value:.1f}" if math.isfinite(value) else "exact") for name, value in shown
        ]
        print_table(("Linear", "weight SQNR, dB"), rows, f"lowest SQNR first{part}", right=(1,))
    if out.verbose and found.skipped:
        print_table(("skipped Linear", "reason"), list(found.skipped.items()))


def raise_faults(found: Verification) -> None:
    """Raises FaultsFound with the first fault, if there is one."""
    if found.faults:
        tensor, message = found.faults[0]
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise FaultsFound(
            f"{found.path} has faults: {f'{tensor} ' if tensor else ''}{message}{more}"
        )
