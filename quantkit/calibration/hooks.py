"""Hooks that measure a decoder block while it runs: inputs of Linears and experts, keys and values,
and tokens per expert.

A `BlockRecorder` hooks one block. Each batch is recorded by the thread that runs it into a
`BlockStatistics` of its own, and these are merged. Linears that share an input (q, k and v; gate
and up) are observed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.observers import HELD_OUT, BlockStatistics, HeadObserver
from quantkit.errors import CheckpointError
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.dataflow import KnownTensors
from quantkit.models.experts import (
    each_expert,
    expert_linear,
    has_selectable_forward,
    intermediate,
    is_experts,
    plain_experts,
    register_experts,
    stack_names,
)
from quantkit.models.hooks import capture
from quantkit.models.linear_views import DOWN, GATE_UP, experts_module
from quantkit.models.null_cache import NullCache
from quantkit.models.weight_map import ParameterSource, names_on_disk
from quantkit.ops.linear import QuantizedLinear

# The name under which transformers finds `observing_experts`.
EXPERTS_IMPLEMENTATION = "quantkit_observing"
# Modules whose inputs are measured; an algorithm may have quantized a Linear already.
LINEARS = (nn.Linear, QuantizedLinear)


# ---- Recording.


@dataclass
class _RecordedBatch:
    """A batch while a thread runs it, and the statistics that hooks write to.

    statistics: of this batch.
    recorder: of the block.
    positions, windows: the shape of the batch.
    quarter: which quarter of the data it belongs to, 0 to 3.
    earlier: in the held-out quarter, each input's amax in the other quarters, by its name.
    seen: inputs that were observed.
    """

    statistics: BlockStatistics
    recorder: BlockRecorder
    positions: int
    windows: int
    quarter: int
    earlier: Mapping[str, float]
    seen: KnownTensors = field(default_factory=KnownTensors)

    def observe(self, linears: Sequence[str], inputs: Tensor, first: Tensor | None = None) -> None:
        """Add an input to the statistics.

        linears: names on disk of the Linears that read it.
        inputs: [windows, positions, in_features], or [n, in_features].
        first: [n] bool, which of n rows are first positions of a window.
        """
        name = linears[0]
        observer = self.statistics.input(linears, inputs.shape[-1], inputs.device)
        earlier = self.earlier.get(name, torch.inf) if self.quarter == HELD_OUT else torch.inf
        if inputs.dim() == 2 and first is not None:
            observer.update_first(inputs[first])
            observer.update_rows(inputs[~first], self.quarter, earlier)
        else:
            observer.update(inputs, self.quarter, earlier)

    def observe_linear(self, names: Sequence[str], inputs: Tensor) -> None:
        """Add the input of a Linear, once for all Linears that share it.

        names: the Linear's names on disk.
        inputs: [..., in_features].
        """
        if not inputs.numel():
            return
        first = self.seen.name_of(inputs)
        if first is not None:
            linears = self.statistics.linears[first]
            linears += [name for name in names if name not in linears]
            return
        self.seen.remember(names[0], inputs)
        if inputs.shape[:-1].numel() == self.windows * self.positions:
            # Some models insert a dimension of size 1 for heads.
            inputs = inputs.reshape(self.windows, self.positions, -1)
        else:
            inputs = inputs.flatten(0, -2)
        self.observe(names, inputs)

    def count_tokens(self, experts: _ObservedExperts, top_k_index: Tensor) -> None:
        """Add how many tokens the router sends to each expert. top_k_index: [tokens, experts per
        token].
        """
        counts = torch.bincount(top_k_index.reshape(-1), minlength=experts.count + 1)
        counts = counts[: experts.count].cpu()
        earlier = self.statistics.experts.get(experts.name, torch.zeros_like(counts))
        self.statistics.experts[experts.name] = earlier + counts

    def first_positions(self, hidden_states: Tensor) -> Tensor | None:
        """Which rows of hidden states [tokens, features] are first positions of a window, [tokens]
        bool; None where the rows aren't those of whole windows.
        """
        count = hidden_states.shape[0]
        # Llama 4's experts are given all tokens once for each expert.
        if count % (self.windows * self.positions):
            return None
        return torch.arange(count, device=hidden_states.device) % self.positions == 0


# The batch that this thread runs and records. transformers doesn't pass the recorder on to the
# experts' forward or to the cache.
_RECORDED: ContextVar[_RecordedBatch | None] = ContextVar("recorded batch", default=None)


class BlockRecorder:
    """The hooks of one block.

    all_experts: show every token to every expert; outputs still follow the router.
    experts: the stacked experts in the block.
    heads_of: layer_idx of an attention module → its name on disk.
    """

    def __init__(
        self, model: BlockwiseModel, number: int, block: nn.Module, all_experts: bool = False
    ) -> None:
        self.all_experts = all_experts
        prefix = model.block_name(number)
        names_of: dict[str, list[str]] = {}  # path of a Linear → its names on disk
        self.experts: dict[nn.Module, _ObservedExperts] = {}
        self._linears: dict[str, int] = {}  # name on disk → in_features, of every Linear here
        self._order: dict[str, int] = {}  # name on disk → its place in the block
        self.heads_of = _attention_modules(model, prefix, block)
        for path, module in block.named_modules():
            name = f"{prefix}.{path}" if path else prefix
            if isinstance(module, LINEARS):
                names = names_on_disk(model.sources(f"{name}.weight"), name)
                self._linears |= dict.fromkeys(names, module.in_features)
                names_of[path] = names
            elif is_experts(module) and has_selectable_forward(module):
                self.experts[module] = experts = _ObservedExperts.of(module, name, model)
                names = [linear for linears, _ in experts.inputs() for linear in linears]
            else:
                names = []
            self._order |= {
                name: len(self._order) + position for position, name in enumerate(names)
            }

        def observe(path: str, inputs: Tensor) -> None:
            batch = _RECORDED.get()
            if batch is not None:
                batch.observe_linear(names_of[path], inputs)

        self._hooks = ExitStack()
        observed = {path: block.get_submodule(path) for path in names_of}
        self._hooks.enter_context(capture(observed, before=observe))

    @contextmanager
    def batch(
        self, shape: Sequence[int], quarter: int, earlier: Mapping[str, float]
    ) -> Iterator[BlockStatistics]:
        """Record what this thread runs within this context.

        shape: windows and positions of the batch.
        quarter: which quarter of the data it belongs to, 0 to 3.
        earlier: in the held-out quarter, each input's amax in the other quarters, by its name.
        """
        statistics = BlockStatistics()
        token = _RECORDED.set(
            _RecordedBatch(statistics, self, shape[1], shape[0], quarter, earlier)
        )
        try:
            yield statistics
        finally:
            _RECORDED.reset(token)

    def complete(self, statistics: BlockStatistics) -> BlockStatistics:
        """Add an empty observer for each Linear and expert that no token reached, and sort all in
        the order of the block.
        """
        reached = {linear for linears in statistics.linears.values() for linear in linears}
        for experts in self.experts.values():
            for linears, in_features in experts.inputs():
                statistics.input(linears, in_features)
            statistics.experts.setdefault(
                experts.name, torch.zeros(experts.count, dtype=torch.int64)
            )
            reached.update(linear for linears, _ in experts.inputs() for linear in linears)
        for name, in_features in self._linears.items():
            if name not in reached:
                statistics.input([name], in_features)
        names = sorted(statistics.inputs, key=self._order.__getitem__)
        statistics.inputs = {name: statistics.inputs[name] for name in names}
        statistics.linears = {name: statistics.linears[name] for name in names}
        return statistics

    def close(self) -> None:
        self._hooks.close()


def _attention_modules(model: BlockwiseModel, prefix: str, block: nn.Module) -> dict[int, str]:
    """layer_idx of each attention module of a block → its name on disk. prefix: of the block."""
    found = {}
    for path, module in block.named_modules():
        index = getattr(module, "layer_idx", None)
        linears = [leaf for leaf, child in module.named_children() if isinstance(child, LINEARS)]
        if isinstance(index, int) and linears:
            child = f"{prefix}.{path}.{linears[0]}" if path else f"{prefix}.{linears[0]}"
            on_disk = names_on_disk(model.sources(f"{child}.weight"), child)[0]
            found[index] = on_disk.rpartition(".")[0]
    return found


def require_linears(model: BlockwiseModel) -> None:
    """Refuse a model whose decoder blocks hold no Linear. Raises CheckpointError."""
    modules = [module for _, module in model.model.get_submodule(model.blocks_name).named_modules()]
    if any(isinstance(module, nn.Linear) or is_experts(module) for module in modules):
        return
    kinds = dict.fromkeys(
        type(module).__name__
        for module in modules
        if any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
    )
    raise CheckpointError(
        f"the decoder blocks of {model.where} are made of {', '.join(kinds) or 'no matrices'} and"
        " hold no torch.nn.Linear, which is what quantkit measures and quantizes; choose another"
        " model"
    )


class ObservingCache(NullCache):
    """A KV cache that stores nothing: it measures keys and values after rotary embedding and
    returns them.
    """

    may_be_left_out = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        batch = _RECORDED.get()
        if batch is None:
            return key_states, value_states
        module = batch.recorder.heads_of.get(layer_idx)
        if module is not None:
            for which, states in (("k", key_states), ("v", value_states)):
                heads = batch.statistics.heads
                heads.setdefault(
                    (module, which),
                    HeadObserver(torch.zeros(states.shape[1], device=states.device)),
                ).update(states)
        return key_states, value_states


# ---- Stacked experts: transformers keeps all experts of a layer in 3-D tensors.


@dataclass(frozen=True)
class _ObservedExperts:
    """A module of stacked experts, and the names of their Linears on disk.

    name: of the module on disk.
    count: how many experts there are.
    first: for each expert the Linears that read the layer's hidden states (gate and up).
    down: for each expert the Linear that reads their product.
    in_features: channels of the first input.
    intermediate: channels of the second input.
    gains: [experts], how large an expert's second input grows for the same hidden states, estimated
        from its weights.
    """

    name: str
    count: int
    first: list[list[str]]
    down: list[list[str]]
    in_features: int
    intermediate: int
    gains: Tensor

    @classmethod
    def of(cls, module: nn.Module, name: str, model: BlockwiseModel) -> _ObservedExperts:
        leaf, down = stack_names(module)
        weight, transposed = getattr(module, leaf), getattr(module, "is_transposed", False)
        count = weight.shape[0]
        first_linears, down_linears = (
            _expert_linears(model.sources(f"{name}.{part}"), f"{name}.{part}", count)
            for part in (leaf, down)
        )
        stored = first_linears[0][0]
        name_on_disk = (
            stored[: stored.index(".experts") + len(".experts")] if ".experts" in stored else name
        )
        in_features = weight.shape[1] if transposed else weight.shape[2]
        down_weight = getattr(module, down)
        return cls(
            name_on_disk,
            count,
            first_linears,
            down_linears,
            in_features,
            down_weight.shape[1] if transposed else down_weight.shape[2],
            _expert_gains(module, weight),
        )

    def inputs(self) -> list[tuple[list[str], int]]:
        """For each input of each expert: the Linears that read it, and its number of channels."""
        return [
            pair
            for first, down in zip(self.first, self.down)
            for pair in ((first, self.in_features), (down, self.intermediate))
        ]


def _expert_linears(source: ParameterSource | None, name: str, count: int) -> list[list[str]]:
    """For each expert the names on disk of the Linears in its part of a stacked parameter.

    Where experts are stacked on disk too, the names are those that `export` gives them.
    """
    if (
        source is not None
        and all(len(tensors) == count for tensors in source.lists)
        and count * len(source.lists) > 1
    ):
        return [
            [tensors[expert].removesuffix(".weight") for tensors in source.lists]
            for expert in range(count)
        ]
    module = experts_module(source.lists[0][0] if source is not None else name)
    leaves = {"gate_up_proj": GATE_UP, "down_proj": DOWN}.get(
        name.rpartition(".")[2], (name.rpartition(".")[2],)
    )
    return [[f"{module}.{expert}.{leaf}" for leaf in leaves] for expert in range(count)]


def _expert_gains(module: nn.Module, weight: Tensor) -> Tensor:
    """For each expert the largest product of the row norms of gate and up, [experts] float32.

    The second input act(g·x)·(u·x) grows with it.
    """
    # [experts, rows]
    rows = weight.float().norm(dim=1 if getattr(module, "is_transposed", False) else 2)
    if getattr(module, "has_gate", True):
        gate, up = (
            rows.chunk(2, dim=1)
            if getattr(module, "is_concatenated", True)
            else (rows[:, ::2], rows[:, 1::2])
        )
        rows = gate * up
    return rows.amax(1).cpu()


def observing_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of stacked experts that observes each expert's two inputs; see
    `experts.each_expert`.

    hidden_states: [tokens, features].
    top_k_index: [tokens, experts per token]; an index of `count` or more means no expert.
    top_k_weights: [tokens, experts per token].
    """
    batch, down = _RECORDED.get(), stack_names(module)[1]
    experts = None if batch is None else batch.recorder.experts.get(module)
    if batch is None or experts is None:
        return plain_experts(module, hidden_states, top_k_index, top_k_weights)
    batch.count_tokens(experts, top_k_index)
    is_first = batch.first_positions(hidden_states)
    shows_all = batch.recorder.all_experts

    def observe(expert: int, states: Tensor, between: Tensor, token: Tensor) -> None:
        first = None if is_first is None else is_first[token]
        batch.observe(experts.first[expert], states, first)
        batch.observe(experts.down[expert], between, first)

    def output_of(expert: int, token: Tensor, states: Tensor) -> Tensor:
        between = intermediate(module, expert, states)
        if not shows_all:
            observe(expert, states, between, token)
        return expert_linear(module, down, expert, between)

    if shows_all:
        sent = torch.where((top_k_index < experts.count).any(1))[0]
        states = hidden_states[sent]
        for expert in range(experts.count):
            observe(expert, states, intermediate(module, expert, states), sent)
    return each_expert(module, hidden_states, top_k_index, top_k_weights, output_of)


def register_observing_experts() -> None:
    register_experts(EXPERTS_IMPLEMENTATION, observing_experts)
