"""Running statistics in bounded memory.

Two observers of the same input merge by adding counts and sums and taking maxima, so batches,
resumed runs and processes combine to the same result. Sums are float64, counts int64. What is
measured in one pass over the values is `torch.ops.quantkit.observe_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.models.distributed import Ranks
from quantkit.ops.fallback import HISTOGRAM_BINS, histogram_edges
from quantkit.ops.reference import encode_codes
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.recipe import ObserverChoice

# The data come in quarters, by batches. The last one is held out: how far it goes beyond the others
# says whether there was enough.
QUARTERS = 4
HELD_OUT = QUARTERS - 1


# How a field of an observer combines with another's: it adds, it is a maximum, or it ends in a
# minimum and a maximum [..., 2].
SUM, MAX, EXTREMES = "sum", "max", "extremes"


def _combined(how: str) -> Any:
    return field(metadata={"combined": how})


class Observer:
    """Statistics in tensors, each of whose fields says how it combines."""

    def combined_fields(self) -> Iterator[tuple[str, str]]:
        """Name and SUM, MAX or EXTREMES of each field."""
        for each in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            yield each.name, each.metadata["combined"]

    def merge(self, other: Self) -> None:
        for name, how in self.combined_fields():
            setattr(self, name, _COMBINE[how](getattr(self, name), getattr(other, name)))


def _wider(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.stack(
        [torch.minimum(ours[..., 0], theirs[..., 0]), torch.maximum(ours[..., 1], theirs[..., 1])],
        dim=-1,
    )


_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    SUM: torch.add,
    MAX: torch.maximum,
    EXTREMES: _wider,
}


@dataclass
class InputObserver(Observer):
    """Statistics of the inputs of one Linear, or of several that share their input.

    The first position of each window is kept apart: many models put one enormous token there, and a
    static scale made with it would leave the others no codes.

    channel_amax: [in_features] float32, without the first positions.
    channel_sum_of_squares: [in_features] float64, likewise.
    histogram: [HISTOGRAM_BINS] int64 of |x|, likewise, in the bins of `fallback.histogram_edges`.
    token_histogram: [HISTOGRAM_BINS] int64 of each token's largest |x|, likewise.
    extremes: [QUARTERS, 2] float32: minimum and maximum in each quarter of the data, likewise.
    first_extremes: [2] float32: the same of the first positions.
    counts: [4] int64: tokens without, and of, the first positions; values held out; how many of
    these exceed every earlier magnitude.
    """

    channel_amax: Tensor = _combined(MAX)
    channel_sum_of_squares: Tensor = _combined(SUM)
    histogram: Tensor = _combined(SUM)
    token_histogram: Tensor = _combined(SUM)
    extremes: Tensor = _combined(EXTREMES)
    first_extremes: Tensor = _combined(EXTREMES)
    counts: Tensor = _combined(SUM)

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> InputObserver:
        nothing_yet = torch.tensor([torch.inf, -torch.inf], device=device)
        return cls(
            torch.zeros(in_features, device=device),
            torch.zeros(in_features, dtype=torch.float64, device=device),
            torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=device),
            torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=device),
            nothing_yet.repeat(QUARTERS, 1),
            nothing_yet,
            torch.zeros(4, dtype=torch.int64, device=device),
        )

    def update(self, inputs: Tensor, quarter: int = 0, earlier_amax: float = math.inf) -> None:
        """Add a batch. inputs: [windows, positions, in_features], or [tokens, in_features] where
        positions are unknown.

        quarter: which of the data this belongs to. earlier_amax: in the held-out quarter, the
        largest magnitude of the others.
        """
        if inputs.dim() == 2:
            self.update_rows(inputs, quarter, earlier_amax)
            return
        self.update_first(inputs[:, :1].flatten(0, 1))
        for window in inputs[:, 1:]:
            self.update_rows(window, quarter, earlier_amax)

    def update_rows(self, rows: Tensor, quarter: int = 0, earlier_amax: float = math.inf) -> None:
        """Add tokens that are no first positions. rows: [tokens, in_features]."""
        if not rows.numel():
            return
        counts = torch.zeros(2, dtype=torch.int64, device=rows.device)
        torch.ops.quantkit.observe_rows(
            rows,
            earlier_amax,
            self.channel_amax,
            self.channel_sum_of_squares,
            self.histogram,
            self.token_histogram,
            self.extremes[quarter],
            counts,
        )
        self.counts[0] += counts[0]
        if quarter == HELD_OUT:
            self.counts[2] += rows.numel()
            self.counts[3] += counts[1]

    def update_first(self, rows: Tensor) -> None:
        """Add first positions. rows: [windows, in_features]."""
        if not rows.numel():
            return
        low, high = (bound.float() for bound in rows.aminmax())
        self.first_extremes = torch.stack(
            [
                torch.minimum(self.first_extremes[0], low),
                torch.maximum(self.first_extremes[1], high),
            ]
        )
        self.counts[1] += rows.shape[0]

    def is_finite(self) -> bool:
        """Whether no NaN and no infinity was seen."""
        return bool(torch.isfinite(self.channel_amax).all()) and not (
            self.counts[1] and not bool(torch.isfinite(self.first_extremes).all())
        )

    @property
    def amax(self) -> float:
        """Largest magnitude outside the first positions; 0 when nothing was seen."""
        return float(self.channel_amax.max()) if self.channel_amax.numel() else 0.0

    @property
    def first_amax(self) -> float:
        """Largest magnitude in the first positions."""
        return float(self.first_extremes.abs().max()) if self.counts[1] else 0.0

    @property
    def quarter_amax(self) -> list[float | None]:
        """Largest magnitude in each quarter of the data by itself; None where it had no tokens."""
        return [
            float(pair.abs().max()) if torch.isfinite(pair).all() else None
            for pair in self.extremes
        ]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.{each.name}": getattr(self, each.name).cpu() for each in fields(self)}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor]) -> InputObserver:
        return cls(**{each.name: tensors[f"{name}.{each.name}"].clone() for each in fields(cls)})


@dataclass
class HeadObserver(Observer):
    """Largest magnitudes of keys or values per head, after rotary embedding. amax: [heads]
    float32.
    """

    amax: Tensor = _combined(MAX)

    def update(self, states: Tensor) -> None:
        """states: [windows, heads, positions, head_dim]."""
        self.amax = torch.maximum(self.amax, states.abs().amax(dim=(0, 2, 3)).float())


# ---- How far a static scale should reach, from what was observed.

# Points per bin of the histogram; and how far below the largest magnitude clipping is tried: 2^-5,
# in steps of a bin.
_POINTS_PER_BIN = 32
_CLIPPING_STEPS = 80


def observed_amax(observer: InputObserver, choice: ObserverChoice, spec: QuantSpec) -> float:
    """The magnitude that a static scale maps to the largest code, from the tokens outside the first
    positions.
    """
    if choice.kind == "absmax" or not observer.counts[0]:
        return observer.amax
    return (
        percentile_amax(observer, choice.percentile)
        if choice.kind == "percentile"
        else least_error_amax(observer, spec)
    )


def percentile_amax(observer: InputObserver, percentile: float) -> float:
    """The magnitude that this share of the values doesn't exceed, from the histogram: exact to its
    bin, which is 1/16 of an octave.
    """
    counts = observer.histogram.double().cumsum(0)
    wanted = counts[-1] * percentile / 100
    position = int(torch.searchsorted(counts, wanted))
    if position >= HISTOGRAM_BINS - 1:
        return observer.amax
    before = counts[position - 1] if position else counts.new_zeros(())
    share = float((wanted - before) / (counts[position] - before).clamp(min=1))
    edges = histogram_edges()
    low, high = float(edges[position]), float(edges[position + 1])
    return min(low + share * (high - low), observer.amax)


def least_error_amax(observer: InputObserver, spec: QuantSpec) -> float:
    """The magnitude whose scale gives the least squared error over the histogram, clipping counted;
    at most the amax.
    """
    filled = observer.histogram.nonzero().reshape(-1)
    amax = observer.amax
    if not len(filled) or not amax:
        return amax
    edges = torch.cat([histogram_edges(), torch.tensor([2.0**32])])
    low, high = edges[filled], edges[filled + 1].clamp(max=max(amax, float(edges[filled[-1]])))
    steps = (torch.arange(_POINTS_PER_BIN) + 0.5) / _POINTS_PER_BIN
    points = low[:, None] + (high - low)[:, None] * steps  # [bins, points per bin]
    weights = observer.histogram[filled].double()[:, None] / _POINTS_PER_BIN

    def error(limit: float) -> float:
        scale = limit / spec.format.max
        values = encode_codes(points / scale, spec.format).float() * scale
        return float(((values - points).double().square() * weights).sum())

    candidates = [amax * 2.0 ** (-step / 16) for step in range(_CLIPPING_STEPS)]
    return min(candidates, key=error)


Key = TypeVar("Key")
AnyObserver = TypeVar("AnyObserver", bound=Observer)


@dataclass
class BlockStatistics:
    """All observers of one block.

    inputs: by the name, on disk, of the first Linear that reads the input. linears: the same name →
    all Linears that read it.
    heads: (attention module, "k" or "v") → observer. experts: experts' module → tokens per expert,
    [experts] int64.
    """

    inputs: dict[str, InputObserver] = field(default_factory=dict)
    linears: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[tuple[str, str], HeadObserver] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)

    def input(
        self, linears: Sequence[str], in_features: int, device: torch.device | str = "cpu"
    ) -> InputObserver:
        """The observer of the input that these Linears read, made when it is first asked for."""
        name = linears[0]
        if name not in self.inputs:
            self.inputs[name] = InputObserver.empty(in_features, device)
            self.linears[name] = list(linears)
        return self.inputs[name]

    def merge(self, other: BlockStatistics) -> None:
        for name, linears in other.linears.items():
            known = self.linears.setdefault(name, [])
            known += [linear for linear in linears if linear not in known]
        _merge(self.inputs, other.inputs)
        _merge(self.heads, other.heads)
        for name, counts in other.experts.items():
            self.experts[name] = self.experts[name] + counts if name in self.experts else counts

    def require_finite(self) -> None:
        """Raise CalibrationError that names the first Linear whose input holds NaN or infinity."""
        for name, observer in self.inputs.items():
            if not observer.is_finite():
                raise CalibrationError(
                    f"the input of {name} holds NaN or infinity; the model overflows on this text"
                    " or its weights are damaged"
                )
        for (module, which), head in self.heads.items():
            if not torch.isfinite(head.amax).all():
                raise CalibrationError(
                    f"the {'keys' if which == 'k' else 'values'} of {module} hold NaN or infinity;"
                    " the model overflows on this text"
                )

    def reduced(self, ranks: Ranks) -> BlockStatistics:
        """The statistics of all ranks together, on every rank: counts and maxima as one process
        gets them, to the last bit.
        """
        if ranks.count == 1:
            return self
        whole = self._structure_of_all(ranks)
        whole.merge(self)
        places: dict[tuple[torch.dtype, str], list[tuple[Observer, str]]] = {}
        for observer in [*whole.inputs.values(), *whole.heads.values()]:
            for name, how in observer.combined_fields():
                key = getattr(observer, name).dtype, how
                places.setdefault(key, []).append((observer, name))
        for (_, how), group in places.items():
            turn = _upward if how == EXTREMES else torch.Tensor.contiguous
            tensors = [turn(getattr(observer, name)) for observer, name in group]
            reduced = ranks.reduce(tensors, SUM if how == SUM else MAX)
            for (observer, name), tensor in zip(group, reduced):
                setattr(observer, name, turn(tensor))
        whole.experts = dict(zip(whole.experts, ranks.reduce([*whole.experts.values()], SUM)))
        return whole

    def _structure_of_all(self, ranks: Ranks) -> BlockStatistics:
        """Empty observers for whatever any rank has seen, in the same order everywhere: a rank may
        have met experts that another hasn't.
        """
        whole = BlockStatistics()
        device = next(
            (observer.channel_amax.device for observer in self.inputs.values()), ranks.device
        )
        described = (
            [
                (self.linears[name], observer.channel_amax.numel())
                for name, observer in self.inputs.items()
            ],
            [(key, observer.amax.numel()) for key, observer in self.heads.items()],
            [(name, counts.numel()) for name, counts in self.experts.items()],
        )
        for inputs, heads, experts in ranks.all_gather(described):
            for linears, in_features in inputs:
                whole.input(linears, in_features, device)
            for key, count in heads:
                whole.heads.setdefault(key, HeadObserver(torch.zeros(count, device=device)))
            for name, count in experts:
                whole.experts.setdefault(name, torch.zeros(count, dtype=torch.int64))
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """Everything as it is stored: NAME.FIELD of inputs, MODULE.k_amax and .v_amax per head,
        MODULE.expert_tokens.
        """
        tensors: dict[str, Tensor] = {}
        for name, observer in self.inputs.items():
            tensors |= observer.tensors(name)
        tensors |= {
            f"{module}.{which}_amax": observer.amax.cpu()
            for (module, which), observer in self.heads.items()
        }
        return tensors | {
            f"{module}.expert_tokens": counts.cpu() for module, counts in self.experts.items()
        }


def _merge(ours: dict[Key, AnyObserver], theirs: Mapping[Key, AnyObserver]) -> None:
    for key, observer in theirs.items():
        if key in ours:
            ours[key].merge(observer)
        else:
            ours[key] = observer


def _upward(extremes: Tensor) -> Tensor:
    """Minimum and maximum as two numbers of which the larger counts; its own inverse."""
    return extremes * torch.tensor([-1.0, 1.0], device=extremes.device)
