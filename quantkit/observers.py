"""Running statistics of one input, in bounded memory.

Two observers of the same input merge by adding counts and sums and taking maxima, so batches, resumed runs and processes combine to the
same result. Sums are float64, counts int64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# |x| is binned by the top bits of its bfloat16: 8 of exponent, 2 of mantissa. Fixed bins, four to an octave, so histograms add.
HISTOGRAM_SHIFT = 5
HISTOGRAM_BINS = 1 << (15 - HISTOGRAM_SHIFT)


def histogram_edges() -> Tensor:
    """Lower edge of each bin of |x|, [HISTOGRAM_BINS] float32."""
    bits = torch.arange(HISTOGRAM_BINS, dtype=torch.int32) << HISTOGRAM_SHIFT
    return bits.to(torch.int16).view(torch.bfloat16).float()


@dataclass
class InputObserver:
    """Statistics of the inputs of one Linear, or of several that share their input.

    The first position of each window is kept apart: many models put one enormous token there, and a static scale made with it
    would leave the others no codes.

    channel_amax: [in_features] float32, without the first positions.
    channel_sum_of_squares: [in_features] float64, likewise.
    histogram: [HISTOGRAM_BINS] int64 of |x|, likewise.
    extremes: [4] float32: minimum and maximum, then the same of the first positions.
    counts: [2] int64: tokens without, and of, the first positions.
    """

    channel_amax: Tensor
    channel_sum_of_squares: Tensor
    histogram: Tensor
    extremes: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, in_features: int) -> InputObserver:
        return cls(
            torch.zeros(in_features),
            torch.zeros(in_features, dtype=torch.float64),
            torch.zeros(HISTOGRAM_BINS, dtype=torch.int64),
            torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf]),
            torch.zeros(2, dtype=torch.int64),
        )

    def update(self, inputs: Tensor) -> None:
        """Add a batch. inputs: [windows, positions, in_features], or [tokens, in_features] where positions are unknown."""
        if inputs.dim() >= 3:
            first, rest = inputs[..., :1, :], inputs[..., 1:, :]
            self._count(first.reshape(-1, first.shape[-1]), 1)
        else:
            rest = inputs
        rest = rest.reshape(-1, rest.shape[-1])
        if not self._count(rest, 0):
            return
        magnitudes = rest.abs()
        self.channel_amax = torch.maximum(self.channel_amax, magnitudes.amax(0).float().cpu())
        self.channel_sum_of_squares += rest.float().square().sum(0, dtype=torch.float64).cpu()
        bins = magnitudes.bfloat16().contiguous().view(torch.int16)
        # A NaN keeps its sign bit through abs(); without the mask its bin would be negative.
        bins = (bins & 0x7FFF) >> HISTOGRAM_SHIFT
        self.histogram += torch.bincount(bins.reshape(-1).int(), minlength=HISTOGRAM_BINS).cpu()

    def _count(self, rows: Tensor, which: int) -> int:
        if rows.numel():
            low, high = rows.aminmax()
            pair = self.extremes[2 * which : 2 * which + 2]
            pair[0] = torch.minimum(pair[0], low.float().cpu())
            pair[1] = torch.maximum(pair[1], high.float().cpu())
            self.counts[which] += rows.shape[0]
        return rows.numel()

    def merge(self, other: InputObserver) -> None:
        self.channel_amax = torch.maximum(self.channel_amax, other.channel_amax)
        self.channel_sum_of_squares = self.channel_sum_of_squares + other.channel_sum_of_squares
        self.histogram = self.histogram + other.histogram
        low, high = torch.minimum(self.extremes, other.extremes), torch.maximum(self.extremes, other.extremes)
        self.extremes = torch.stack([low[0], high[1], low[2], high[3]])
        self.counts = self.counts + other.counts

    @property
    def amax(self) -> float:
        """Largest magnitude outside the first positions; 0 when nothing was seen."""
        return float(self.extremes[:2].abs().max()) if self.counts[0] else 0.0

    @property
    def first_amax(self) -> float:
        """Largest magnitude in the first positions."""
        return float(self.extremes[2:].abs().max()) if self.counts[1] else 0.0

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.{field}": getattr(self, field) for field in self.__dataclass_fields__}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> InputObserver:
        return cls(**{field: tensors[f"{name}.{field}"].clone() for field in cls.__dataclass_fields__})


@dataclass
class HeadObserver:
    """Largest magnitudes of keys or values per head, after rotary embedding. amax: [heads] float32."""

    amax: Tensor

    def update(self, states: Tensor) -> None:
        """states: [windows, heads, positions, head_dim]."""
        self.amax = torch.maximum(self.amax, states.abs().amax(dim=(0, 2, 3)).float().cpu())

    def merge(self, other: HeadObserver) -> None:
        self.amax = torch.maximum(self.amax, other.amax)
