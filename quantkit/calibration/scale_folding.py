"""Fold per-channel scales of Linears into the norm or Linear before them. Where that is possible is
found by running the block, not by a table of architectures.

- A norm feeds the Linears whose input is the very tensor that it returned.
- A Linear feeds another if scaling its output channels scales the other's input channels by the
  same numbers. This holds for v_proj and o_proj, also where query heads share a value head. It
  holds for up_proj and down_proj, not for gate_proj and down_proj.

Each folding is tried on a float32 copy of the block, with scales that are powers of two. The
block's output must stay the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.models.block_inputs import BlockInputs
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.dataflow import Trace, trace
from quantkit.models.hooks import capture

# The largest change of a block's output, relative to what the block adds to its input, that float32
# rounding may cause. A folding that doesn't hold changes a tenth or more.
TOLERANCE = 1e-3
# The same where unquantized parameters (norms) are rounded to the dtype that is stored, bfloat16.
STORED_TOLERANCE = 2e-2


@dataclass(frozen=True)
class ScaleFolding:
    """A norm or Linear that can take up the input scales of Linears. Names are paths in the block.

    producer: the norm or Linear whose outputs are divided by the scales.
    consumers: the Linears whose input channels are multiplied by them.
    adds_one: the producer is a norm that multiplies by 1 + weight.
    channels: for each input channel of the consumer, the producer's output channel that it follows,
        [in_features]; None where the producer is a norm.
    """

    producer: str
    consumers: tuple[str, ...]
    adds_one: bool = False
    channels: Tensor | None = None


class BlockProbe:
    """A float32 copy of a block with one batch of its inputs.

    block: the copy.
    hidden: the hidden states that the block reads, [windows, positions, hidden size] float32.
    output: what the unchanged block returns for them, of the same shape.
    """

    def __init__(
        self, model: BlockwiseModel, block: nn.Module, call: BlockInputs, hidden: Tensor
    ) -> None:
        self._model = model
        self.block = copy.deepcopy(block).float()
        call = call.resolved()
        self._call = replace(
            call,
            arguments=_in_float32(call.arguments),
            keywords=_in_float32(call.keywords),
            side_outputs=(),
        )
        self.hidden = hidden.float()
        self.output = self.run()

    def run(self, hidden: Tensor | None = None) -> Tensor:
        return self._model.run_block(
            self.block, self._call, self.hidden if hidden is None else hidden
        ).float()

    def change(self, rotation: Tensor | None = None) -> float:
        """How far the block's output is from the original's, relative to what the block adds to its
        input: the 90th percentile over tokens; infinity where it isn't finite.

        rotation: [hidden size, hidden size], where the present parameters expect and return rotated
        hidden states.
        """
        output = self.run() if rotation is None else self.run(self.hidden @ rotation) @ rotation.T
        moved = (output - self.output).norm(dim=-1) / (self.output - self.hidden).norm(
            dim=-1
        ).clamp(min=1e-30)
        return float(moved.flatten().quantile(0.9)) if torch.isfinite(output).all() else torch.inf

    @contextmanager
    def changed(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters of the copy within this context. tensors: by path."""
        parameters = dict(self.block.named_parameters())
        before = {name: parameters[name].data for name in tensors}
        try:
            for name, tensor in tensors.items():
                parameters[name].data = tensor.float()
            yield
        finally:
            for name, tensor in before.items():
                parameters[name].data = tensor


def find_foldings(probe: BlockProbe) -> tuple[list[ScaleFolding], dict[str, str]]:
    """All foldings of a block, and for each Linear whose inputs can't be scaled the reason why."""
    found = trace(probe.block, probe.run)
    foldings, reasons = _norm_foldings(probe, found)
    into_linears, without = _linear_foldings(probe, found)
    return foldings + into_linears, reasons | without


def find_norm_foldings(probe: BlockProbe) -> tuple[list[ScaleFolding], dict[str, str]]:
    """The foldings into norms, and for each Linear after a norm that takes no scale the reason."""
    return _norm_foldings(probe, trace(probe.block, probe.run))


def find_linear_foldings(probe: BlockProbe) -> list[ScaleFolding]:
    """The foldings of Linears into Linears."""
    return _linear_foldings(probe, trace(probe.block, probe.run))[0]


def _norm_foldings(probe: BlockProbe, found: Trace) -> tuple[list[ScaleFolding], dict[str, str]]:
    foldings: list[ScaleFolding] = []
    reasons: dict[str, str] = {}
    for norm in dict.fromkeys(found.norm_of.values()):
        consumers = tuple(name for name in found.order if found.norm_of.get(name) == norm)
        folding = next(
            (
                folding
                for adds_one in (False, True)
                if keeps_output(probe, folding := ScaleFolding(norm, consumers, adds_one))
            ),
            None,
        )
        if folding is not None:
            foldings.append(folding)
        else:
            reasons |= dict.fromkeys(
                consumers,
                f"not only Linears read what {norm} returns, or it isn't scaled by its weight",
            )
    return foldings, reasons


def _linear_foldings(probe: BlockProbe, found: Trace) -> tuple[list[ScaleFolding], dict[str, str]]:
    foldings: list[ScaleFolding] = []
    reasons: dict[str, str] = {}
    for number, consumer in enumerate(found.order):
        if consumer in found.norm_of:
            continue
        for producer in reversed(found.order[:number]):
            folding = _linear_folding(probe, producer, consumer)
            if folding is not None and keeps_output(probe, folding):
                foldings.append(folding)
                break
        else:
            reasons[consumer] = "no norm and no Linear before it takes a scale for each channel"
    return foldings, reasons


def keeps_output(probe: BlockProbe, folding: ScaleFolding) -> bool:
    """Whether the folding leaves the block's output the same, tried with scales ½, 1 and 2, which
    cause no rounding.
    """
    parameters = dict(probe.block.named_parameters())
    size = parameters[f"{folding.producer}.weight"].shape[0]
    scale = torch.exp2(
        torch.arange(size, device=parameters[f"{folding.producer}.weight"].device) % 3 - 1.0
    )
    with probe.changed(folded_parameters(folding, parameters, scale)):
        return probe.change() < TOLERANCE


def folded_parameters(
    folding: ScaleFolding,
    parameters: Mapping[str, Tensor],
    scale: Tensor,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """The parameters that a folding changes, by path, float32.

    Where the producer's weight is rounded, its effective scale changes a little. The consumers are
    multiplied by that scale, so that the block computes the same.

    parameters: of the block, by path.
    scale: what the consumers' inputs are divided by, for each channel of the producer.
    dtypes: parameters that are stored unquantized are rounded to these, by path.
    """
    dtypes = dtypes or {}
    weight = parameters[f"{folding.producer}.weight"].float()
    changed: dict[str, Tensor] = {}
    if folding.channels is None:
        one = 1.0 if folding.adds_one else 0.0
        stored = (
            ((weight + one) / scale - one)
            .to(dtypes.get(f"{folding.producer}.weight", torch.float32))
            .float()
        )
        scale = (weight + one) / (stored + one)
        sound = torch.isfinite(scale) & (scale > 0)
        scale, stored = torch.where(sound, scale, 1.0), torch.where(sound, stored, weight)
        changed[f"{folding.producer}.weight"] = stored
    else:
        changed[f"{folding.producer}.weight"] = weight / scale[:, None]
    bias = parameters.get(f"{folding.producer}.bias")
    if bias is not None:
        changed[f"{folding.producer}.bias"] = bias.float() / scale
    columns = scale if folding.channels is None else scale[folding.channels]
    for consumer in folding.consumers:
        changed[f"{consumer}.weight"] = parameters[f"{consumer}.weight"].float() * columns
    return {
        name: tensor.to(dtypes.get(name, torch.float32)).float() for name, tensor in changed.items()
    }


def _linear_folding(probe: BlockProbe, producer: str, consumer: str) -> ScaleFolding | None:
    """The folding of one Linear into another, if each input channel of the consumer follows the
    scale of one output channel of the producer.
    """
    first, second = _linear(probe, producer), _linear(probe, consumer)
    if second.in_features % first.out_features:
        return None
    size = first.out_features
    # All different, between 1 and 2, so that a channel is found again by its scale.
    scale = 1 + torch.arange(1, size + 1, device=first.weight.device) / size
    before = _inputs(probe, consumer)
    with capture({producer: first}, after=lambda _, output: output * scale):
        after = _inputs(probe, consumer)
    # The least-squares ratio over the tokens for each channel, and its relative error.
    signal = before.square().sum(0).clamp(min=1e-30)
    ratio = (before * after).sum(0) / signal
    misfit = (after - before * ratio).square().sum(0) / signal
    channels = ((ratio - 1) * size - 1).round().long().clamp(0, size - 1)
    if float(misfit.max()) > 1e-6 or float((scale[channels] - ratio).abs().max()) > 0.25 / size:
        return None
    if len(channels.unique()) < size:
        return None
    return ScaleFolding(producer, (consumer,), channels=channels)


def _linear(probe: BlockProbe, path: str) -> nn.Linear:
    module = probe.block.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} was traced as a Linear"
    return module


def _inputs(probe: BlockProbe, linear: str) -> Tensor:
    """The inputs of a Linear over all its calls, [rows, in_features]."""
    seen: list[Tensor] = []
    with capture(
        {linear: probe.block.get_submodule(linear)},
        before=lambda _, inputs: seen.append(inputs.flatten(0, -2)),
    ):
        probe.run()
    return torch.cat(seen)


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_in_float32(item) for item in value)
    return {key: _in_float32(item) for key, item in value.items()} if type(value) is dict else value
