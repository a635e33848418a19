"""Running statistics of activations in bounded memory.

Observers of the same input merge: counts and sums are added, and maxima are taken. Batches, resumed
runs and ranks therefore combine to the same result. Sums are float64, counts int64. One pass over
the values is `torch.ops.quantkit.observe_rows`.
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

# Batches are split into quarters. The last one is held out: if it exceeds the others by much, there
# was too little data.
QUARTERS = 4
HELD_OUT = QUARTERS - 1


# How a field combines with another observer's: by addition, by the maximum, or as a pair of minimum
# and maximum in its last dimension, [..., 2].
SUM, MAX, EXTREMES = "sum", "max", "extremes"


def _combined(how: str) -> Any:
    return field(metadata={"combined": how})


class Observer:
    """Statistics as tensors; each field says how it combines with another observer's."""

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
    """Statistics of the input x of one Linear, or of several that share it.

    First positions of windows are measured separately: many models have massive activations there,
    and a static scale that covers them would leave too few codes for all other tokens. All fields
    but the last two are without first positions.

    channel_amax: largest |x| of each channel, [in_features] float32.
    channel_sum_of_squares: [in_features] float64.
    histogram: counts of |x| in the bins of `fallback.histogram_edges`, [HISTOGRAM_BINS] int64.
    token_histogram: counts of each token's largest |x|, [HISTOGRAM_BINS] int64.
    extremes: minimum and maximum in each quarter of the data, [QUARTERS, 2] float32.
    first_extremes: minimum and maximum in first positions, [2] float32.
    counts: [4] int64: tokens in other positions, tokens in first positions, held-out values, and
        how many of these exceed all values of the other quarters.
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
        """Add a batch.

        inputs: [windows, positions, in_features], or [tokens, in_features] where positions are
            unknown.
        quarter: which quarter of the data the batch belongs to, 0 to 3.
        earlier_amax: in the held-out quarter, the largest magnitude in the other quarters.
        """
        if inputs.dim() == 2:
            self.update_rows(inputs, quarter, earlier_amax)
            return
        self.update_first(inputs[:, :1].flatten(0, 1))
        for window in inputs[:, 1:]:
            self.update_rows(window, quarter, earlier_amax)

    def update_rows(self, rows: Tensor, quarter: int = 0, earlier_amax: float = math.inf) -> None:
        """Add tokens in other than first positions. rows: [tokens, in_features]."""
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
        """Whether all inputs were finite."""
        return bool(torch.isfinite(self.channel_amax).all()) and not (
            self.counts[1] and not bool(torch.isfinite(self.first_extremes).all())
        )

    @property
    def amax(self) -> float:
        """Largest magnitude outside first positions; 0 where there were no tokens."""
        return float(self.channel_amax.max()) if self.channel_amax.numel() else 0.0

    @property
    def first_amax(self) -> float:
        """Largest magnitude in first positions; 0 where there were none."""
        return float(self.first_extremes.abs().max()) if self.counts[1] else 0.0

    @property
    def quarter_amax(self) -> list[float | None]:
        """Largest magnitude in each quarter of the data alone; None where it had no tokens."""
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
    """Statistics of keys or values after rotary embedding.

    amax: largest magnitude of each head, [heads] float32.
    """

    amax: Tensor = _combined(MAX)

    def update(self, states: Tensor) -> None:
        """states: [windows, heads, positions, head_dim]."""
        self.amax = torch.maximum(self.amax, states.abs().amax(dim=(0, 2, 3)).float())


# ---- Static scales from statistics.

# Each bin of the histogram is represented by so many points.
_POINTS_PER_BIN = 32
# Clipping is tried down to 2^-5 of the amax, in steps of a bin, which is 1/16 of an octave.
_CLIPPING_STEPS = 80


def observed_amax(observer: InputObserver, choice: ObserverChoice, spec: QuantSpec) -> float:
    """The magnitude that a static scale maps to the largest code, without first positions."""
    if choice.kind == "absmax" or not observer.counts[0]:
        return observer.amax
    return (
        percentile_amax(observer, choice.percentile)
        if choice.kind == "percentile"
        else least_error_amax(observer, spec)
    )


def percentile_amax(observer: InputObserver, percentile: float) -> float:
    """A percentile of |x| from the histogram, interpolated within a bin (1/16 of an octave).

    percentile: from 50 to 100.
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
    """The clipping bound whose scale gives the least squared error over the histogram; at most the
    amax.
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
    """All observers of one block. Names are those on disk.

    inputs: the first Linear that reads an input → the input's observer.
    linears: the same Linear → all Linears that read the input.
    heads: (attention module, "k" or "v") → observer.
    experts: experts' module → tokens per expert, [experts] int64.
    """

    inputs: dict[str, InputObserver] = field(default_factory=dict)
    linears: dict[str, list[str]] = field(default_factory=dict)
    heads: dict[tuple[str, str], HeadObserver] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)

    def input(
        self, linears: Sequence[str], in_features: int, device: torch.device | str = "cpu"
    ) -> InputObserver:
        """The observer of the input that these Linears share; created on the first call."""
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
        """Raise a CalibrationError that names the first Linear whose input isn't finite."""
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
        """The statistics of all ranks, on every rank. Counts and maxima are bit-identical to those
        of one process.
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
            # A maximum reduces pairs of minimum and maximum if the minimum is negated.
            convert = _negate_minimum if how == EXTREMES else torch.Tensor.contiguous
            tensors = [convert(getattr(observer, name)) for observer, name in group]
            reduced = ranks.reduce(tensors, SUM if how == SUM else MAX)
            for (observer, name), tensor in zip(group, reduced):
                setattr(observer, name, convert(tensor))
        whole.experts = dict(zip(whole.experts, ranks.reduce([*whole.experts.values()], SUM)))
        return whole

    def _structure_of_all(self, ranks: Ranks) -> BlockStatistics:
        """Empty observers for all that any rank has observed, in the same order on all ranks.

        A rank may have sent tokens to experts that no other rank used.
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
        """The tensors to store: NAME.FIELD of inputs, MODULE.k_amax and MODULE.v_amax of heads, and
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


def _negate_minimum(extremes: Tensor) -> Tensor:
    """(minimum, maximum) → (-minimum, maximum), [..., 2]; its own inverse."""
    return extremes * torch.tensor([-1.0, 1.0], device=extremes.device)
