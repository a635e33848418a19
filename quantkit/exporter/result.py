"""The result of `export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.notebook import html_table
from quantkit.checkpoint.units import counted, format_bytes
from quantkit.exporter.plan import ExportPlan, ParameterPlan


@dataclass(frozen=True)
class ExportResult:
    """A checkpoint that `export` wrote, or with `dry_run` the plan of one.

    path: output directory.
    scheme: name of the scheme; "mixed" with several, or "none" if nothing is quantized.
    parameters: what happens to each parameter of the model.
    quantized: number of quantized Linears.
    skipped: number of entries in the config's `ignore`: skipped Linears, and patterns for experts.
    bytes_before: size of the model's tensors.
    bytes_after: size of the output's tensors.
    warnings: one sentence each.
    seconds: wall time of the writing.
    is_dry_run: whether this is a plan, and nothing was written.
    was_finished: whether an earlier run had finished the output, so that nothing was written.
    """

    path: Path
    scheme: str
    parameters: tuple[ParameterPlan, ...]
    quantized: int
    skipped: int
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...]
    seconds: float = 0.0
    is_dry_run: bool = False
    was_finished: bool = False

    @classmethod
    def of(cls, plan: ExportPlan) -> ExportResult:
        """The result of a plan that is not carried out yet."""
        schemes = {linear.scheme.name for linear in plan.linears.values()}
        return cls(
            plan.options.output,
            schemes.pop() if len(schemes) == 1 else "mixed" if schemes else "none",
            plan.parameters,
            sum(row.status == "quantized" for row in plan.parameters),
            len(plan.skipped),
            plan.bytes_before,
            plan.bytes_after,
            plan.warnings,
            is_dry_run=True,
        )

    def __fspath__(self) -> str:
        return str(self.path)

    def to_json(self) -> dict[str, Any]:
        """What `quantkit export` prints as JSON; with `dry_run` a row for each parameter."""
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        warnings = {"warnings": list(self.warnings)}
        if self.is_dry_run:
            return {"parameters": [row.to_json() for row in self.parameters], **sizes, **warnings}
        return {
            "path": str(self.path),
            "quantized": self.quantized,
            "left": self.skipped,
            **sizes,
            **warnings,
            "seconds": self.seconds,
        }

    def rows(self) -> Mapping[str, str]:
        """What a notebook shows: name → value."""
        ratio = 100 * self.bytes_after / max(1, self.bytes_before)
        return {
            "path": str(self.path) + (" (dry run: not written)" if self.is_dry_run else ""),
            "scheme": self.scheme,
            "Linears": f"{self.quantized} quantized, {self.skipped} skipped",
            "size": (
                f"{format_bytes(self.bytes_before)} → {format_bytes(self.bytes_after)}"
                f" ({ratio:.0f} %)"
            ),
            "warnings": str(len(self.warnings)),
        }

    def __str__(self) -> str:
        """One sentence."""
        if self.was_finished:
            return f"{self.path} was already complete, with unchanged files; nothing was written"
        scheme = "mixed schemes" if self.scheme == "mixed" else self.scheme
        verb = "would be quantized" if self.is_dry_run else "quantized"
        time = "" if self.is_dry_run else f", {self.seconds:.1f} s"
        return (
            f"{self.path}: {counted(self.quantized, 'Linear')} {verb} to {scheme},"
            f" {self.skipped} skipped; {self.rows()['size']}{time}"
        )

    def __repr__(self) -> str:
        return f"<ExportResult {self}>"

    def _repr_html_(self) -> str:
        return html_table("Exported checkpoint", self.rows())
