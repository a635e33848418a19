"""The result of `verify`, and what its checks add to while they run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.checkpoint.notebook import html_table
from quantkit.checkpoint.units import counted
from quantkit.errors import FaultsFound
from quantkit.schemes.scheme import QuantScheme

# Quantized Linear → its scheme and its weight's shape [out_features, in_features].
QuantizedLinears = dict[str, tuple[QuantScheme, tuple[int, int]]]


class Fault(NamedTuple):
    """Something that a runtime would refuse or misread.

    tensor: name of the tensor or file; "" for the whole checkpoint.
    message: what is wrong, to be read after the name.
    """

    tensor: str
    message: str

    def __str__(self) -> str:
        return f"{self.tensor} {self.message}".lstrip()


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    path: directory of the checkpoint.
    tensors: number of tensors.
    quantized: number of quantized Linears.
    skipped: Linear that isn't quantized → why.
    faults: what a runtime would refuse or misread.
    warnings: one sentence each.
    unequal: fused layers with different scales.
    sqnr_db: Linear → signal-to-quantization-noise ratio of its weight in dB, if there is a base.
    changed: tensors that algorithms changed, according to the manifest. They aren't compared with
        the base model.
    seconds: wall time.
    """

    path: Path
    tensors: int = 0
    quantized: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    warnings: tuple[str, ...] = ()
    unequal: tuple[Fault, ...] = ()
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @property
    def worst_first(self) -> list[tuple[str, float]]:
        """(Linear, SQNR in dB), the lowest first."""
        return sorted(self.sqnr_db.items(), key=lambda item: item[1])

    def require_ok(self) -> None:
        """Raise FaultsFound with the first fault, if there is one."""
        if self.faults:
            raise FaultsFound(f"{self.path} has faults: {self.first_fault}")

    @property
    def first_fault(self) -> str:
        """The first fault and the number of others, as part of a sentence; "" if there is none."""
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"{self.faults[0]}{more}" if self.faults else ""

    def to_json(self) -> dict[str, Any]:
        """What `quantkit verify` prints as JSON."""
        return {
            "ok": self.ok,
            "faults": [fault._asdict() for fault in self.faults],
            "warnings": list(self.warnings),
            "path": str(self.path),
            "tensors": self.tensors,
            "quantized": self.quantized,
            "changed": len(self.changed),
            "left": [{"name": name, "reason": reason} for name, reason in self.skipped.items()],
            "layers": [{"name": name, "weight_sqnr_db": value} for name, value in self.worst_first],
        }

    def found(self) -> str:
        """Whether there are faults, in words."""
        return f"faults: {self.first_fault}" if self.faults else "no faults"

    def _compared(self) -> str:
        """What the comparison with the base found, as the middle of a sentence."""
        lowest = min(self.sqnr_db.values()) if self.sqnr_db else math.inf
        text = f", lowest weight SQNR {lowest:.1f} dB" if math.isfinite(lowest) else ""
        if self.sqnr_db and self.changed:
            text += f", {len(self.changed)} tensors differ from the base because algorithms changed"
            text += " them"
        return text

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"{self.path}: {self.found()}; {counted(self.tensors, 'tensor')},"
            f" {counted(self.quantized, 'Linear')} quantized, {len(self.skipped)}"
            f" skipped{self._compared()}, {self.seconds:.1f} s"
        )

    def __repr__(self) -> str:
        return f"<Verification {self}>"

    def _repr_html_(self) -> str:
        rows = {
            "path": str(self.path),
            "found": self.found(),
            "Linears": f"{self.quantized} quantized, {len(self.skipped)} skipped",
        }
        if self.sqnr_db:
            name, value = self.worst_first[0]
            rows["lowest weight SQNR"] = f"{value:.1f} dB ({name})"
        rows |= {f"warning {number}": text for number, text in enumerate(self.warnings, 1)}
        return html_table("Verified checkpoint", rows)


@dataclass
class Findings:
    """What `verify` has found so far; its checks add to it. Fields are those of `Verification`."""

    path: Path
    tensors: int = 0
    quantized: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unequal: list[Fault] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    def fault(self, tensor: str, message: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(tensor, message))

    def result(self, seconds: float) -> Verification:
        return Verification(
            self.path,
            self.tensors,
            self.quantized,
            self.skipped,
            tuple(self.faults),
            tuple(self.warnings),
            tuple(self.unequal),
            self.sqnr_db,
            self.changed,
            seconds,
        )
