"""Where a scale per channel can be folded into what comes before a Linear, found by running the
block and not by a table of architectures.

A norm feeds the Linears that are handed the very tensor that it returned. A Linear feeds another
where scaling its outputs, each channel by a number of its own, scales the other's inputs, each by
one of these numbers: so it is with values and the output projection (whatever attention does
between, and however many query heads read one head of values), and with up and down, but not with
gate and down.

Whatever is folded is tried on a float32 copy of the block, with scales that are powers of two, and
must leave its output as it was.
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

# How much of what a block adds to its input may change when only float32's rounding differs:
# algebra that doesn't hold changes a tenth and more.
TOLERANCE = 1e-3
# The same for scales as they are stored, where a norm or a Linear that isn't quantized is rounded
# to bfloat16.
STORED_TOLERANCE = 2e-2


@dataclass(frozen=True)
class ScaleFolding:
    """producer: a norm, or the Linear whose outputs are scaled. consumers: the Linears whose inputs
    are. All are paths inside of the block.

    adds_one: the norm multiplies by 1 + weight. channels: of a Linear, its output channel that
    scales each of the consumer's input channels, [in_features].
    """

    producer: str
    consumers: tuple[str, ...]
    adds_one: bool = False
    channels: Tensor | None = None


class BlockProbe:
    """A float32 copy of a block with one batch of its inputs. hidden: [windows, positions, hidden
    size].
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
        """How far the block's output now is from what it was, over what the block adds to its
        input: of nine tokens in ten it is less.

        rotation: of the hidden states, where the parameters that the copy has now expect and return
        them rotated, [hidden size, hidden size].
        """
        output = self.run() if rotation is None else self.run(self.hidden @ rotation) @ rotation.T
        moved = (output - self.output).norm(dim=-1) / (self.output - self.hidden).norm(
            dim=-1
        ).clamp(min=1e-30)
        return float(moved.flatten().quantile(0.9)) if torch.isfinite(output).all() else torch.inf

    @contextmanager
    def changed(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The copy with these parameters in place of its own for a while."""
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
    """All foldings of a block, and for each Linear whose inputs can't be scaled the reason."""
    found = trace(probe.block, probe.run)
    foldings, reasons = _norm_foldings(probe, found)
    into_linears, without = _linear_foldings(probe, found)
    return foldings + into_linears, reasons | without


def find_norm_foldings(probe: BlockProbe) -> tuple[list[ScaleFolding], dict[str, str]]:
    """Those into norms alone, and the reasons of Linears behind a norm that takes no scale."""
    return _norm_foldings(probe, trace(probe.block, probe.run))


def find_linear_foldings(probe: BlockProbe) -> list[ScaleFolding]:
    """Those into Linears alone."""
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
                f"more than Linears reads what {norm} returns, or it isn't scaled by its weight",
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
    """Whether the folding leaves the output as it was, tried with scales ½, 1 and 2, which round
    nothing.
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
    """The parameters that a folding changes: float32, or rounded to `dtypes` where a parameter is
    stored so.

    scale: what the consumers' inputs are divided by, for each channel of the producer. Where the
    producer is rounded, the consumers take up just what it became, so that nothing is lost.
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
    # all different, between 1 and 2
    scale = 1 + torch.arange(1, size + 1, device=first.weight.device) / size
    before = _inputs(probe, consumer)
    with capture({producer: first}, after=lambda _, output: output * scale):
        after = _inputs(probe, consumer)
    # Over the tokens, the ratio that fits best, and how well it does.
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
    """What a Linear is given, over all its calls, [rows, in_features]."""
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
