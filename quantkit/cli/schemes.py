"""`quantkit schemes`: the schemes, and the runtimes and hardware that support each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.checkpoint.formats import FORMATS
from quantkit.cli.console import Output, command
from quantkit.cli.tables import print_json, print_table
from quantkit.schemes.algorithms import Table
from quantkit.schemes.scheme import CATALOGUE
from quantkit.schemes.serving import HARDWARE, RUNTIMES, Support


@command("schemes")
def schemes_command(out: Output) -> None:
    """List the schemes, and the runtimes and hardware that support each."""
    if out.as_json:
        print_json(describe_schemes())
        return
    for title, columns, rows, right in schemes_tables():
        print_table(columns, rows, title, right, verbose=out.verbose)


def describe_schemes() -> list[dict[str, Any]]:
    """The catalogue as JSON: a row for each scheme."""
    described = []
    for name, row in CATALOGUE.items():
        scheme = row.scheme
        described.append(
            {
                "scheme": name,
                "aliases": list(row.aliases),
                "weight": str(scheme.weight),
                "input": str(scheme.input) if scheme.input else None,
                "needs_calibration": scheme.needs_calibration,
                "runtimes": _support(row.runtimes),
                "formats": {
                    file_format.name: _support(file_format.runtimes)
                    for file_format in FORMATS.values()
                    if file_format.runtimes is not None
                    and file_format.only_scheme in (None, scheme)
                },
                "hardware": {hardware: row.hardware[hardware] for hardware in HARDWARE},
            }
        )
    return described


def _support(by_runtime: Mapping[str, Support]) -> dict[str, dict[str, Any]]:
    return {
        runtime: {"loads": by_runtime[runtime].loads, "note": by_runtime[runtime].note}
        for runtime in RUNTIMES
    }


def schemes_tables() -> list[Table]:
    """The tables of `quantkit schemes`."""
    described = describe_schemes()
    return [_schemes_table(described), _support_table(described), _notes_table(described)]


def _schemes_table(described: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            row["scheme"],
            ", ".join(row["aliases"]),
            row["weight"],
            row["input"] or "not quantized",
            "needed" if row["needs_calibration"] else "",
        ]
        for row in described
    ]
    return "schemes", ("scheme", "alias", "weights", "input activations", "calibration"), rows, ()


def _support_table(described: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in described:
        modes = [
            {"native": "yes", "weights": "W8A16"}.get(mode, "no")
            for mode in row["hardware"].values()
        ]
        for name, runtimes in _stored_forms(row).items():
            loads = ["yes" if support["loads"] else "no" for support in runtimes.values()]
            rows.append([name, *loads, *modes])
    title = (
        "runtimes that load each scheme, and hardware on which vLLM runs it (W8A16: with inputs in"
        " bfloat16)"
    )
    return title, ("scheme", *RUNTIMES, *HARDWARE), rows, ()


def _notes_table(described: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in described:
        for name, runtimes in _stored_forms(row).items():
            rows += [
                [name, runtime, support["note"]]
                for runtime, support in runtimes.items()
                if support["note"]
            ]
        rows += [
            [row["scheme"], hardware, mode]
            for hardware, mode in row["hardware"].items()
            if mode not in ("native", "weights")
        ]
    return "conditions and reasons", ("scheme", "runtime or hardware", "note"), rows, ()


def _stored_forms(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A scheme in the default checkpoint format and in others, each with its runtimes."""
    others = {
        f"{row['scheme']}, --format {name}": runtimes for name, runtimes in row["formats"].items()
    }
    return {row["scheme"]: row["runtimes"], **others}
