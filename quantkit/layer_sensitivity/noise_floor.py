"""The noise floor: the KL that any change in a block causes, however small, because some later
activations round differently to the model's dtype. It is measured by perturbing outputs in some
blocks, and subtracted from the KL of each layer group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.evaluation.json_values import from_json
from quantkit.layer_sensitivity.layer_groups import LayerGroup

MEASURED_BLOCKS = 8  # in which the noise floor is measured, evenly spread


@dataclass(frozen=True)
class NoiseFloor:
    """values: KL in nats of a perturbation after 0, 1, 2 ... blocks, [blocks + 1]."""

    values: tuple[float, ...]

    @classmethod
    def interpolated(cls, kld: Mapping[int, float], blocks: int) -> NoiseFloor:
        """kld: KL from perturbing a block's output, by the block's number, in ascending order."""
        places, values = [block + 1 for block in kld], list(kld.values())
        slope = (values[1] - values[0]) / (places[1] - places[0]) if len(places) > 1 else 0.0
        places, values = [0, *places], [max(0.0, values[0] - places[0] * slope), *values]
        return cls(tuple(np.interp(np.arange(blocks + 1), places, values).tolist()))

    def to_json(self) -> list[float]:
        return list(self.values)

    @classmethod
    def from_json(cls, content: Any) -> NoiseFloor:
        return cls(from_json(tuple[float, ...], content))

    @property
    def deepest(self) -> float:
        """The noise floor of a change before the first block."""
        return self.values[0]

    def above(self, kld: float, depth: float) -> float:
        """A KL without the noise floor. depth: how many blocks come before the change."""
        floor = float(np.interp(depth, np.arange(len(self.values)), self.values))
        return max(0.0, kld - floor)


def measured_blocks(blocks: int) -> list[int]:
    """The blocks that are perturbed, the last one included."""
    return sorted({*range(0, blocks, max(1, blocks // MEASURED_BLOCKS)), blocks - 1})


def depths(groups: Sequence[LayerGroup]) -> list[float]:
    """How many blocks come before each group, with a fraction for its place in its own block."""
    in_block = Counter(group.block for group in groups)
    seen: Counter[int] = Counter()
    found = []
    for group in groups:
        found.append(group.block + seen[group.block] / in_block[group.block])
        seen[group.block] += 1
    return found
