"""The result of `verify`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.schemes.scheme import QuantScheme

# Quantized Linear → its scheme and its weight's shape [out_features, in_features].
QuantizedLinears = dict[str, tuple[QuantScheme, tuple[int, int]]]


@dataclass
class Verification:
    """The result of `verify`, which adds to it check by check.

    path: directory of the checkpoint.
    tensors: number of tensors.
    quantized: number of quantized Linears.
    skipped: Linear that isn't quantized → why.
    faults: (tensor, message), where a tensor of "" means the whole checkpoint.
    warnings: one sentence each.
    unequal: fused layers with different scales, as (tensor, message).
    sqnr_db: Linear → signal-to-quantization-noise ratio of its weight in dB, if there is a base.
    changed: tensors that algorithms changed, according to the manifest. They aren't compared with
        the base model.
    """

    path: Path
    tensors: int = 0
    quantized: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unequal: list[tuple[str, str]] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    def fault(self, tensor: str, message: str) -> None:
        """Add a fault."""
        self.faults.append((tensor, message))

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "faults": [{"tensor": tensor, "message": message} for tensor, message in self.faults],
            "warnings": list(self.warnings),
            "path": str(self.path),
            "tensors": self.tensors,
            "quantized": self.quantized,
            "changed": len(self.changed),
            "left": [{"name": name, "reason": reason} for name, reason in self.skipped.items()],
            "layers": [{"name": name, "weight_sqnr_db": value} for name, value in self.worst_first],
        }

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def worst_first(self) -> list[tuple[str, float]]:
        """(Linear, SQNR in dB), the lowest first."""
        return sorted(self.sqnr_db.items(), key=lambda item: item[1])
