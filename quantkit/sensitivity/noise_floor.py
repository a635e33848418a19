"""The noise floor: the KL that any change in a block causes, because it makes later roundings to
the model's dtype fall otherwise. It is measured by perturbing single roundings in some blocks, and
subtracted from what quantizing a layer group costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.sensitivity.layer_groups import LayerGroup

MEASURED_BLOCKS = 8  # in which the floor is measured, evenly spread


@dataclass(frozen=True)
class NoiseFloor:
    """values: KL in nats of a perturbation with 0, 1, 2 ... blocks before it, [blocks + 1]."""

    values: tuple[float, ...]

    @classmethod
    def interpolated(cls, kld: Mapping[int, float], blocks: int) -> NoiseFloor:
        """kld: what perturbing a block's output costs, by its number, in rising order."""
        places, values = [block + 1 for block in kld], list(kld.values())
        slope = (values[1] - values[0]) / (places[1] - places[0]) if len(places) > 1 else 0.0
        places, values = [0, *places], [max(0.0, values[0] - places[0] * slope), *values]
        return cls(tuple(np.interp(np.arange(blocks + 1), places, values).tolist()))

    @property
    def deepest(self) -> float:
        """Of a change that goes through the whole model."""
        return self.values[0]

    def above(self, kld: float, depth: float) -> float:
        """What a KL has above the floor. depth: how many blocks are before the change."""
        floor = float(np.interp(depth, np.arange(len(self.values)), self.values))
        return max(0.0, kld - floor)


def measured_blocks(blocks: int) -> list[int]:
    """The blocks that are perturbed; the last is one of them."""
    return sorted({*range(0, blocks, max(1, blocks // MEASURED_BLOCKS)), blocks - 1})


def depths(groups: Sequence[LayerGroup]) -> list[float]:
    """How many blocks come before each group, with the share of its own block that does."""
    in_block = Counter(group.block for group in groups)
    seen: Counter[int] = Counter()
    found = []
    for group in groups:
        found.append(group.block + seen[group.block] / in_block[group.block])
        seen[group.block] += 1
    return found
