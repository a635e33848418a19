"""Results for people: tables on a terminal, Markdown, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.files import finite
from quantkit.checkpoint.formats import FORMATS
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.schemes.algorithms import Table
from quantkit.schemes.scheme import CATALOGUE
from quantkit.schemes.serving import HARDWARE, RUNTIMES, Support

if TYPE_CHECKING:
    from quantkit.cli.bench import Figure
    from quantkit.exporter.plan import ExportPlan


def print_json(content: Any) -> None:
    """JSON on stdout. NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    right: Sequence[int] = (),
) -> None:
    """A table on stdout; as wide as it needs where stdout is no terminal, so that nothing is cut.
    right: columns of numbers.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 4000, highlight=False)
    if title:
        # a table's own title would be wrapped to its columns
        console.print(_escape(title), style="bold", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_escape, row))
    console.print(table)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


PLAN_COLUMNS = ("parameter", "status", "how, or why not", "scheme", "before", "after")


def plan_rows(plan: ExportPlan) -> list[tuple[str, ...]]:
    """The table of `export --dry-run`: a row for each parameter and their total."""
    rows = [
        (
            row.name,
            row.status,
            row.reason,
            row.scheme.name if row.scheme else "",
            format_bytes(row.bytes_before),
            format_bytes(row.bytes_after),
        )
        for row in plan.parameters
    ]
    return [
        *rows,
        ("total", "", "", "", format_bytes(plan.bytes_before), format_bytes(plan.bytes_after)),
    ]


def schemes_description() -> list[dict[str, Any]]:
    """Schemes × runtimes × hardware, from `runtimes`."""
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


def benchmark_rows(figures: Sequence[Figure]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Headings and rows of `bench`."""
    rivals = list(dict.fromkeys(name for figure in figures for name in figure.times))
    rows = [
        (
            figure.what,
            f"{figure.in_features} × {figure.out_features}",
            str(figure.tokens or ""),
            f"{figure.microseconds:.1f}",
            "" if figure.gops is None else f"{figure.gops:.0f}",
            f"{figure.gb_per_s:.1f}",
            *(f"{figure.times[name]:.2f}×" if name in figure.times else "" for name in rivals),
        )
        for figure in figures
    ]
    return (
        "kernel",
        "in × out",
        "tokens",
        "µs",
        "GOP/s",
        "GB/s",
        *(f"against {name}" for name in rivals),
    ), rows


def schemes_tables() -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """The tables of `quantkit schemes`: (title, columns, rows)."""
    described = schemes_description()
    what = [
        [
            e["scheme"],
            ", ".join(e["aliases"]),
            e["weight"],
            e["input"] or "as they are",
            "needed" if e["needs_calibration"] else "",
        ]
        for e in described
    ]
    where, notes = [], []
    for entry in described:
        loads = ["yes" if support["loads"] else "no" for support in entry["runtimes"].values()]
        modes = [
            {"native": "yes", "weights": "W8A16"}.get(mode, "no")
            for mode in entry["hardware"].values()
        ]
        where.append([entry["scheme"], *loads, *modes])
        for file_format, runtimes in entry["formats"].items():
            name = f"{entry['scheme']}, --format {file_format}"
            where.append(
                [
                    name,
                    *("yes" if support["loads"] else "no" for support in runtimes.values()),
                    *modes,
                ]
            )
            notes += [
                [name, runtime, support["note"]]
                for runtime, support in runtimes.items()
                if support["note"]
            ]
        notes += [
            [entry["scheme"], runtime, support["note"]]
            for runtime, support in entry["runtimes"].items()
            if support["note"]
        ]
        notes += [
            [entry["scheme"], hardware, mode]
            for hardware, mode in entry["hardware"].items()
            if mode not in ("native", "weights")
        ]
    return [
        ("schemes", ("scheme", "alias", "weights", "input activations", "calibration"), what),
        (
            (
                "which runtime loads it; how vLLM serves it on which hardware (W8A16: inputs stay"
                " in bfloat16)"
            ),
            ("scheme", *RUNTIMES, *HARDWARE),
            where,
        ),
        ("conditions and reasons", ("scheme", "where", "note"), notes),
    ]


def _algorithm_tables(description: Mapping[str, Any]) -> list[Table]:
    """What algorithms did to the weights: a table of each, and one of all Linears."""
    from quantkit.calibration.describe import algorithm_descriptions

    chosen = description.get("chosen")
    if not chosen:
        return []
    tables = [table for each in algorithm_descriptions(description) for table in each.tables]
    rows = [
        [
            entry["name"],
            entry["algorithm"],
            f"{entry['error'] / entry['plain_error']:.3f}" if entry.get("plain_error") else "",
            entry.get("reason", ""),
        ]
        for entry in chosen["linears"]
    ]
    columns = ("Linear", "chosen by", "squared error beside rounding's", "why rounded")
    return [*tables, ("codes", columns, rows, (2,))]


def inspection_tables(description: dict[str, Any]) -> list[Table]:
    """Tables of `quantkit inspect`: (title, columns, rows, columns of numbers)."""
    if description["kind"] == "calibration":
        title = (
            f"{description['path']}: {description['tokens']} tokens in"
            f" {counted(description['windows'], 'window')} of {description['seq_len']}, from"
            f" {', '.join(description['data']['sources'])}"
        )
        rows = [
            [
                entry["name"],
                str(len(entry["linears"])),
                str(entry["in_features"]),
                str(entry["tokens"]),
                f"{entry['amax']:.4g}" + (" (estimated)" if entry["estimated"] else ""),
                " ".join(f"{amax:.4g}" for amax in entry["amax_quarters"]),
                (
                    f"{1e6 * entry['held_out_above'] / entry['held_out_values']:.3g}"
                    if entry["held_out_values"]
                    else ""
                ),
                "no" if entry["unsettled"] else "yes" if entry["held_out_values"] else "",
                f"{entry['first_position_amax']:.4g}",
            ]
            for entry in description["inputs"]
        ]
        columns = (
            "input of",
            "Linears",
            "features",
            "tokens",
            "amax",
            "after each quarter",
            "held out above, ppm",
            "settled",
            "amax, first position",
        )
        tables: list[Table] = [(title, columns, rows, (1, 2, 3, 4, 5, 6, 8))]
        if description["experts"]:
            rows = [
                [
                    entry["module"],
                    *(
                        [str(len(entry["tokens"])), *map(str, _spread(entry["tokens"]))]
                        if entry.get("tokens")
                        else [""] * 4
                    ),
                    " ".join(map(str, entry["starved"])),
                ]
                for entry in description["experts"]
            ]
            tables.append(
                (
                    "tokens per expert",
                    ("experts", "count", "least", "median", "most", "too few tokens"),
                    rows,
                    (1, 2, 3, 4),
                )
            )
        if description["kv"]:
            rows = [
                [entry["module"], f"{entry['k_amax']:.4g}", f"{entry['v_amax']:.4g}"]
                for entry in description["kv"]
            ]
            tables.append(
                (
                    "keys and values, after rotary embedding",
                    ("attention", "key amax", "value amax"),
                    rows,
                    (1, 2),
                )
            )
        return tables + _algorithm_tables(description)
    quantization = description["quantization"]
    method = (
        f"{quantization['method']}, KV cache {quantization['kv_cache'] or 'as it is'}"
        if quantization
        else "not quantized"
    )
    title = (
        f"{description['path']}: {description['architecture']}, {method},"
        f" {format_bytes(description['bytes'])} in {description['shards']} shards"
    )
    rows = [
        [dtype, str(entry["tensors"]), format_bytes(entry["bytes"])]
        for dtype, entry in sorted(description["dtypes"].items())
    ]
    tables = [(title, ("dtype", "tensors", "size"), rows, (1, 2))]
    counts = [[scheme, str(count)] for scheme, count in description["schemes"].items()] + (
        [["left as they are", str(len(description["linears_left"]))]]
        if description["linears_left"]
        else []
    )
    if counts:
        tables.append(("Linears in the decoder blocks", ("scheme", "Linears"), counts, (1,)))
    return tables


def _spread(counts: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(counts)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


class Progress:
    """A progress bar on stderr where that is a terminal, else nothing. `update(done, total)` may be
    handed to any engine.
    """

    def __init__(self, description: str, quiet: bool = False) -> None:
        self._bar: Any = None
        if quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(description, total=None)

    def update(self, done: float, total: float, description: str | None = None) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=done,
                total=total,
                **({"description": description} if description else {}),
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
