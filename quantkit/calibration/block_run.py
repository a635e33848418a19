"""One decoder block, the batches that run through it, and what was found by running it: the order
of its Linears, which norm feeds which, and how much each token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.rotation import Rotation
from quantkit.calibration.scale_folding import BlockProbe
from quantkit.models.block_inputs import BlockInputs
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.dataflow import Trace, trace
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.threads import one_thread
from quantkit.models.weight_map import names_on_disk
from quantkit.models.workers import Workers
from quantkit.schemes.scheme import QuantScheme


@dataclass(frozen=True)
class BlockChanges:
    """What an algorithm makes of a block.

    parameters: those that change, float32, by their paths in the block.
    described: entries for `chosen` in calibration.json, by its sections.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    described: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockNames:
    """Names on disk of a block's parameters and Linears, by their paths in it. A parameter that
    several tensors make is absent.
    """

    parameters: Mapping[str, str]
    linears: Mapping[str, str]

    @classmethod
    def of(cls, model: BlockwiseModel, number: int, block: nn.Module) -> BlockNames:
        prefix = model.block_name(number)
        parameters = {}
        for path, _ in block.named_parameters():
            source = model.sources(f"{prefix}.{path}")
            if source is not None and sum(map(len, source.lists)) == 1:
                parameters[path] = source.lists[0][0]
        linears = {}
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and f"{path}.weight" in parameters:
                (linears[path],) = names_on_disk(
                    model.sources(f"{prefix}.{path}.weight"), f"{prefix}.{path}"
                )
        return cls(parameters, linears)


class BlockRun:
    """A block while its weights are quantized.

    schemes: of the Linears to quantize, by their paths.
    weights: of these Linears, [out_features, in_features] float32. The block itself holds them
        rounded to its dtype.
    groups: the same Linears in the order in which the block computes; those that share their input
        stand together, and those that did not run come last.
    stored: other parameters that changed, by their names on disk, in the dtype that is stored.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        number: int,
        block: nn.Module,
        batches: Sequence[int],
        call_of: Callable[[int], BlockInputs],
        states: HiddenStates,
        schemes: Mapping[str, QuantScheme],
        workers: Workers,
        rotation: Rotation | None,
    ) -> None:
        """schemes: by the Linears' names on disk, of the whole model. rotation: of the whole model,
        if there is one.
        """
        self.model, self.block, self.name = model, block, model.block_name(number)
        self.batches, self.workers, self.rotation = batches, workers, rotation
        self._call_of, self._states = call_of, states
        self.names = BlockNames.of(model, number, block)
        self.schemes = {
            path: schemes[name] for path, name in self.names.linears.items() if name in schemes
        }
        self.weights = {path: self.linear(path).weight.data.float() for path in self.schemes}
        self.stored: dict[str, Tensor] = {}
        self.trace: Trace = self.ranks.broadcast_from_first(self._trace)
        self.groups = self._groups()
        self._importance: dict[int, Tensor] = {}  # of each batch's tokens, [tokens, 1]

    @property
    def ranks(self) -> Ranks:
        return self.workers.ranks

    def linear(self, path: str) -> nn.Linear:
        module = self.block.get_submodule(path)
        assert isinstance(module, nn.Linear), f"{path} is quantized already, or no Linear"
        return module

    def run(self, batch: int) -> Tensor:
        hidden = self._states.get(batch).to(self.model.device)
        return self.model.run_block(self.block, self._call_of(batch), hidden)

    def probe(self, rotation: Tensor | None = None) -> BlockProbe:
        """A float32 copy of the block, on the first batch. rotation: that the hidden states have
        and this block doesn't expect, [hidden size, hidden size].
        """
        hidden = self._states.get(self.batches[0]).to(self.model.device)
        return BlockProbe(
            self.model,
            self.block,
            self._call_of(self.batches[0]),
            hidden if rotation is None else hidden.float() @ rotation.T,
        )

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Of the parameters that are stored unquantized, by path."""
        return {
            path: parameter.dtype
            for path, parameter in self.block.named_parameters()
            if path.removesuffix(".weight") not in self.schemes
        }

    def put(self, changed: Mapping[str, Tensor]) -> None:
        """Take changed parameters, float32, into the block, and into what will be stored."""
        parameters = dict(self.block.named_parameters())
        for path, tensor in changed.items():
            linear = path.removesuffix(".weight")
            stored = tensor.to(parameters[path].dtype)
            parameters[path].data = stored
            if linear in self.schemes:
                self.weights[linear] = tensor
            else:
                self.stored[self.names.parameters[path]] = stored

    # -- What one run shows.

    def _trace(self) -> Trace:
        with torch.inference_mode(), one_thread():
            return trace(self.block, lambda: self.run(self.batches[0]))

    def _groups(self) -> list[list[str]]:
        groups = [
            [path for path in members if path in self.schemes]
            for members in self.trace.shared_inputs
        ]
        ran = sorted(filter(None, groups), key=lambda paths: self.trace.order.index(paths[0]))
        return [*ran, *([path] for path in self.schemes if path not in self.trace.order)]

    # -- How much tokens count.

    def weigh_tokens(self) -> None:
        """Find 1 / the mean square of what the block returns for each token, for each batch."""

        def work(batch: int) -> Tensor:
            return 1 / self.run(batch).flatten(0, -2).float().square().mean(1, keepdim=True).clamp(
                min=1e-12
            )

        with torch.inference_mode():
            self._importance = dict(zip(self.batches, self.workers.each(work, self.batches)))

    def importance(self, linear: str, batch: int, tokens: int) -> Tensor | None:
        """How much an error in a Linear's output counts at each token, [tokens, 1] float32; None
        where all tokens count alike.

        A Linear that no norm feeds writes to the residual stream, and the next norm divides by the
        stream's size: next to a hidden state ten times as large an error counts a tenth. Without
        this, the one enormous token at the start of a window would decide for all others.
        """
        if linear in self.trace.norm_of:
            return None
        importance = self._importance[batch]
        return importance if len(importance) == tokens else None
