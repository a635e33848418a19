"""One decoder block while its weights are quantized, with the batches that run through it.

Running it shows the order of its Linears, which norm feeds which Linear, and the importance of each
token.
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
    """What an algorithm changes in a block.

    parameters: changed parameters by their paths in the block, float32.
    described: entries for `chosen` in calibration.json, by section.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    described: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockNames:
    """Names on disk in a block. A parameter that several tensors on disk make up is absent.

    parameters: path of a parameter in the block → its name on disk.
    linears: path of a Linear in the block → its name on disk.
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

    schemes: of the Linears to quantize, by path.
    weights: of these Linears, by path, [out_features, in_features] float32. The block itself holds
        them rounded to its dtype.
    groups: paths of these Linears in the order in which they run, one group for each shared input.
        Linears that did not run come last, each in a group of its own.
    stored: other parameters that changed, by name on disk, in the dtype that is stored.
    trace: order of the Linears, and which norm feeds which.
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
        """batches: numbers of this rank's batches.
        call_of: the arguments with which a batch calls the block.
        states: the hidden states that the block reads.
        schemes: of the whole model, by the Linears' names on disk.
        rotation: of the whole model, if the recipe has one.
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
        """A float32 copy of the block with the first batch.

        rotation: [hidden size, hidden size], where the hidden states are rotated already and the
        block isn't; it is undone for the copy.
        """
        hidden = self._states.get(self.batches[0]).to(self.model.device)
        return BlockProbe(
            self.model,
            self.block,
            self._call_of(self.batches[0]),
            hidden if rotation is None else hidden.float() @ rotation.T,
        )

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of parameters that are stored unquantized, by path."""
        return {
            path: parameter.dtype
            for path, parameter in self.block.named_parameters()
            if path.removesuffix(".weight") not in self.schemes
        }

    def put(self, changed: Mapping[str, Tensor]) -> None:
        """Put changed parameters into the block, and keep them for storage. changed: float32, by
        path.
        """
        parameters = dict(self.block.named_parameters())
        for path, tensor in changed.items():
            linear = path.removesuffix(".weight")
            stored = tensor.to(parameters[path].dtype)
            parameters[path].data = stored
            if linear in self.schemes:
                self.weights[linear] = tensor
            else:
                self.stored[self.names.parameters[path]] = stored

    # -- Found by one run.

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

    # -- Importance of tokens.

    def weigh_tokens(self) -> None:
        """Compute the importance of each token of each batch: 1 / the mean square of the block's
        output.
        """

        def work(batch: int) -> Tensor:
            return 1 / self.run(batch).flatten(0, -2).float().square().mean(1, keepdim=True).clamp(
                min=1e-12
            )

        with torch.inference_mode():
            self._importance = dict(zip(self.batches, self.workers.each(work, self.batches)))

    def importance(self, linear: str, batch: int, tokens: int) -> Tensor | None:
        """How much an error in a Linear's output counts at each token, [tokens, 1] float32; None
        where all tokens count alike.

        It applies to Linears that write to the residual stream (`o_proj`, `down_proj`), which no
        norm feeds. The next norm divides by the size of the hidden state. Without this weighting,
        the massive activation of a window's first token would dominate the fit.
        """
        if linear in self.trace.norm_of:
            return None
        importance = self._importance[batch]
        return importance if len(importance) == tokens else None
