"""`quantkit verify`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import Output, command
from quantkit.cli.option_names import as_command_line
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
    from quantkit.api.verify import verify

    with out.run("verify", uses_transformers=False, stops=False) as run:
        found = verify(checkpoint, base=base, runtime=runtime, **run)
    out.json(found)
    if not out.as_json:
        _print_verification(out, found)
    found.require_ok()


def _print_verification(out: Output, found: Verification) -> None:
    """Tables: the faults; the SQNR of Linears, worst first; with -v the skipped Linears."""
    from quantkit.cli.tables import print_table

    if found.faults:
        faults = [(fault.tensor, as_command_line(fault.message)) for fault in found.faults]
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
