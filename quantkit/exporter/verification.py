"""What `verify` found in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.schemes.number_formats import NUMBER_FORMATS
from quantkit.schemes.scheme import QuantScheme

# Quantized Linear → its scheme and its weight's shape [out_features, in_features].
QuantizedLinears = dict[str, tuple[QuantScheme, tuple[int, int]]]


@dataclass
class Verification:
    """What `verify` found.

    tensors, quantized: how many tensors, and how many quantized Linears.
    left: Linear that isn't quantized → why.
    faults: (tensor, message).
    unequal: fused layers with several scales, as faults are written.
    sqnr_db: Linear → weight SQNR against the base in dB, where one was given.
    changed: tensors that algorithms changed, by the manifest; they differ from the base's on
        purpose and aren't compared with it.
    """

    path: Path
    tensors: int = 0
    quantized: int = 0
    left: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unequal: list[tuple[str, str]] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    def fault(self, tensor: str, message: str) -> None:
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
            "left": [{"name": name, "reason": reason} for name, reason in self.left.items()],
            "layers": [{"name": name, "weight_sqnr_db": value} for name, value in self.worst_first],
        }

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def worst_first(self) -> list[tuple[str, float]]:
        return sorted(self.sqnr_db.items(), key=lambda item: item[1])


def holds_codes(dtype: str) -> bool:
    """Whether a safetensors dtype is one of codes or of scales: no model's weights have it."""
    return any(dtype == known.safetensors_name for known in NUMBER_FORMATS.values())
