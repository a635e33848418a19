"""Quantizes one decoder block after the other, with the algorithms of a recipe.

First come algorithms that change a whole block (rotation, SmoothQuant), then, group by group, those
that make codes. A group is quantized before the inputs of the next are looked at, and a block reads
what earlier blocks return as they are quantized: what follows an error can still make up for it.
Codes and scales are final; they go to CALIB, and `export` copies them.

Where several processes share the batches, what is found by running the block on one batch is
broadcast from rank 0, and sums over tokens are added up over all ranks. Each search, and each
Linear's codes, are made by one rank and sent to the others: so all hold the same weights.
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
    """linears: codes and scales, by the Linears' names on disk.
    tensors: other parameters that changed, by their names on disk, as they are stored.
    described: what each algorithm did, for `chosen` in calibration.json, by its sections.
    """

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    described: dict[str, list[dict[str, Any]]] = field(default_factory=_no_entries)

    def to_tensors(self) -> dict[str, Tensor]:
        """NAME.weight and NAME.weight_scale of each Linear [block rows, block columns], and the
        other parameters.
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
    """schemes: of the Linears to quantize, by their names on disk.
    threads: how many batches run at once on a CPU.
    rotation: of the whole model, if the recipe has one.
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
        """Quantize a block in place. batches: those of this rank; calls: how each calls each
        block; states: the block's inputs.
        """
        work = BlockRun(
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
        quantized = QuantizedBlock(tensors=work.stored)
        steps = self.recipe.algorithms_in_order
        are_weighed = False
        for step in steps:
            module = step.row.implementation()
            if module.needs(step).token_importance and not are_weighed:
                work.weigh_tokens()
                are_weighed = True
            if step.row.works_on == BLOCK:
                # On one thread the result doesn't depend on how many there are; each search is
                # small.
                with torch.inference_mode(), one_thread():
                    changes = module.change_block(work, step)
                    work.put(changes.parameters)
                quantized.describe(changes.described)
        for paths in work.groups:
            _quantize_group(work, paths, [s for s in steps if s.row.works_on == GROUP], quantized)
        return quantized

    def install(self, number: int, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put in place what an earlier run made of a block: `QuantizedBlock.to_tensors`, read
        back.
        """
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
    work: BlockRun, paths: Sequence[str], steps: Sequence[Algorithm], quantized: QuantizedBlock
) -> None:
    """Make codes for Linears that share their input, and put them in place."""
    group = LayerGroup(_group_linears(work, paths, steps), work.workers)
    for step in steps:
        step.row.implementation().quantize_group(group, step)
    group.round_to_nearest()
    for path, linear in group.linears.items():
        assert linear.codes is not None, "rounding to nearest leaves no Linear without codes"
        quantized.linears[linear.name] = linear.codes
        quantized.describe({"linears": [linear.described]})
        if linear.bias is not None and linear.bias_changed:
            work.linear(path).bias.data = linear.bias
            work.stored[work.names.parameters[f"{path}.bias"]] = linear.bias
        _replace_linear(work.model, work.block, path, linear.codes, linear.scheme)


def _group_linears(
    work: BlockRun, paths: Sequence[str], steps: Sequence[Algorithm]
) -> dict[str, GroupLinear]:
    needs = reduce(or_, (step.row.implementation().needs(step) for step in steps), Needs())
    inputs: Mapping[str, InputSums | None] = dict.fromkeys(paths)
    if needs.input_sums:
        specs = {path: _with_dynamic_inputs(work.schemes[path]).input for path in paths}
        inputs = sum_inputs(work, specs, needs)
    linears = {}
    for path in paths:
        bias = work.linear(path).bias
        is_stored = f"{path}.bias" in work.names.parameters
        linears[path] = GroupLinear(
            work.names.linears[path],
            work.schemes[path],
            work.weights.pop(path),  # no longer than they are needed
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
    """The scheme with its input scales computed from each token, where they are static: those are
    measured last, on the weights that are quantized here.
    """
    if scheme.input is None or not scheme.needs_calibration:
        return scheme
    return replace(scheme, input=replace(scheme.input, granularity=TOKEN, dynamic=True))
