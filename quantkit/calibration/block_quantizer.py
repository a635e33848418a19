"""Quantize one decoder block after the other with the algorithms of a recipe.

Algorithms that change a whole block come first (rotation, SmoothQuant). Then each group of Linears
that share an input is quantized, in the order in which they run. The inputs of a group come from
quantized groups and blocks before it, so that it can compensate for their errors. Codes and scales
are stored in CALIB, and `export` copies them.

Several ranks share the batches. What one batch shows about a block is broadcast from rank 0, and
sums over tokens are added over all ranks. Each search and each Linear's codes are computed on one
rank and sent to the others, so that all ranks hold the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.layer_group import GroupLinear, InputSums, LayerGroup, Needs
from quantkit.algorithms.rotation import Rotation
from quantkit.calibration.block_run import BlockNames, BlockRun
from quantkit.calibration.input_sums import sum_inputs
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.threads import one_thread
from quantkit.models.workers import Workers
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor
from quantkit.schemes.algorithms import ALGORITHMS, BLOCK, GROUP
from quantkit.schemes.quant_spec import TOKEN
from quantkit.schemes.recipe import Algorithm, Recipe
from quantkit.schemes.scheme import QuantScheme


def _no_entries() -> dict[str, list[dict[str, Any]]]:
    sections: dict[str, list[dict[str, Any]]] = {
        section: [] for row in ALGORITHMS.values() for section in row.sections
    }
    return sections | {"linears": []}


@dataclass
class QuantizedBlock:
    """What was made of a block.

    linears: codes and scales of quantized Linears, by name on disk.
    tensors: other parameters that changed, by name on disk, in the dtype that is stored.
    described: the entries for `chosen` in calibration.json, by section.
    """

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    described: dict[str, list[dict[str, Any]]] = field(default_factory=_no_entries)

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors to store: for each Linear NAME.weight, [out_features, in_features] codes, and
        NAME.weight_scale, [block rows, block columns] float32; and the other parameters.
        """
        tensors = dict(self.tensors)
        for name, weight in self.linears.items():
            tensors |= {
                f"{name}.weight": weight.qdata,
                f"{name}.weight_scale": weight.scale.float(),
            }
        return tensors

    def describe(self, described: Mapping[str, list[dict[str, Any]]]) -> None:
        for section, entries in described.items():
            self.described[section] += entries


@dataclass
class BlockQuantizer:
    """Quantizes the blocks of one model.

    model: whose blocks are quantized.
    recipe: its algorithms.
    schemes: of the Linears to quantize, by name on disk.
    threads: how many batches run at once on a CPU.
    rotation: matrices for the whole model; None where the recipe has no rotation.
    ranks: the processes that share the batches.
    """

    model: BlockwiseModel
    recipe: Recipe
    schemes: Mapping[str, QuantScheme]
    threads: int
    rotation: Rotation | None = None
    ranks: Ranks = Ranks()

    def quantize(
        self,
        number: int,
        block: nn.Module,
        batches: Sequence[int],
        calls: Mapping[int, Any],
        states: HiddenStates,
    ) -> QuantizedBlock:
        """Quantize a block in place.

        number: of the block.
        batches: numbers of this rank's batches.
        calls: for each batch, the arguments with which it calls each block.
        states: the hidden states that the block reads.
        """
        block_run = BlockRun(
            self.model,
            number,
            block,
            batches,
            lambda batch: calls[batch][number],
            states,
            self.schemes,
            Workers(self.ranks, self.model.device, self.threads),
            self.rotation,
        )
        quantized = QuantizedBlock(tensors=block_run.stored)
        steps = self.recipe.algorithms_in_order
        are_weighed = False
        for step in steps:
            module = step.row.implementation()
            needs = module.needs(step)
            if (needs.token_importance or needs.input_sums) and not are_weighed:
                block_run.weigh_tokens()
                are_weighed = True
            if step.row.works_on == BLOCK:
                # One thread: results don't depend on the number of threads, and each search is
                # small.
                with torch.inference_mode(), one_thread():
                    changes = module.change_block(block_run, step)
                    block_run.put(changes.parameters)
                quantized.describe(changes.described)
        for paths in block_run.groups:
            _quantize_group(
                block_run, paths, [s for s in steps if s.row.works_on == GROUP], quantized
            )
        return quantized

    def install(self, number: int, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Install what an earlier run made of a block. tensors: `QuantizedBlock.to_tensors`."""
        names = BlockNames.of(self.model, number, block)
        device = self.model.device
        parameters = dict(block.named_parameters())
        for path, stored in names.parameters.items():
            if stored in tensors and f"{stored}_scale" not in tensors:
                parameters[path].data = tensors[stored].to(device)
        for path, linear in names.linears.items():
            if f"{linear}.weight_scale" in tensors:
                weight = QuantizedTensor(
                    tensors[f"{linear}.weight"].to(device),
                    tensors[f"{linear}.weight_scale"].to(device),
                    self.schemes[linear].weight,
                )
                _replace_linear(self.model, block, path, weight, self.schemes[linear])


def _quantize_group(
    block_run: BlockRun, paths: Sequence[str], steps: Sequence[Algorithm], quantized: QuantizedBlock
) -> None:
    """Quantize Linears that share an input, and install them in the block. paths: in the block."""
    group = LayerGroup(_group_linears(block_run, paths, steps), block_run.workers)
    for step in steps:
        step.row.implementation().quantize_group(group, step)
    group.round_to_nearest()
    for path, linear in group.linears.items():
        assert linear.codes is not None, "round_to_nearest() gives codes to every Linear"
        quantized.linears[linear.name] = linear.codes
        quantized.describe({"linears": [linear.described]})
        if linear.bias is not None and linear.bias_changed:
            block_run.linear(path).bias.data = linear.bias
            block_run.stored[block_run.names.parameters[f"{path}.bias"]] = linear.bias
        _replace_linear(block_run.model, block_run.block, path, linear.codes, linear.scheme)


def _group_linears(
    block_run: BlockRun, paths: Sequence[str], steps: Sequence[Algorithm]
) -> dict[str, GroupLinear]:
    needs = reduce(or_, (step.row.implementation().needs(step) for step in steps), Needs())
    inputs: Mapping[str, InputSums | None] = dict.fromkeys(paths)
    if needs.input_sums:
        specs = {path: _with_dynamic_inputs(block_run.schemes[path]).input for path in paths}
        inputs = sum_inputs(block_run, specs, needs)
    linears = {}
    for path in paths:
        bias = block_run.linear(path).bias
        is_stored = f"{path}.bias" in block_run.names.parameters
        linears[path] = GroupLinear(
            block_run.names.linears[path],
            block_run.schemes[path],
            block_run.weights.pop(path),  # frees memory: this is its last use
            bias.data if bias is not None and is_stored else None,
            inputs[path],
        )
    return linears


def _replace_linear(
    model: BlockwiseModel, block: nn.Module, path: str, weight: QuantizedTensor, scheme: QuantScheme
) -> None:
    linear = block.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is quantized already, or no Linear"
    dtype = model.model.config.dtype
    assert isinstance(dtype, torch.dtype), "build_skeleton gives every model a dtype"
    block.set_submodule(
        path, QuantizedLinear(weight, _with_dynamic_inputs(scheme), None, linear.bias, dtype)
    )


def _with_dynamic_inputs(scheme: QuantScheme) -> QuantScheme:
    """The scheme with dynamic input scales in place of static ones. Static scales are measured
    after the weights are quantized, so they aren't known yet.
    """
    if scheme.input is None or not scheme.needs_calibration:
        return scheme
    return replace(scheme, input=replace(scheme.input, granularity=TOKEN, dynamic=True))
