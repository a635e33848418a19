"""The weights of one decoder block, chosen with data: which scales are folded where, then codes for each Linear.

A block is worked through in the order in which it computes. What it reads comes from earlier blocks as they are quantized, and each of its Linears
is quantized before the inputs of the next are looked at: errors are seen by all that can still make up for them. What is chosen is final: codes and
scales go to CALIB, and `export` copies them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.gptq import Solution, corrected_weight, gptq
from quantkit.algorithms.smoothquant import Smoothing, search_smoothing
from quantkit.blockwise import BlockwiseModel, Call, each_batch, one_thread
from quantkit.errors import CalibrationError
from quantkit.folding import STORED_TOLERANCE, BlockProbe, Fold, find_folds, folded
from quantkit.linear import QuantizedLinear
from quantkit.model import fused_sets
from quantkit.ops import quantize as quantize_weight
from quantkit.quantize import QuantizedTensor, block_amax, quantize
from quantkit.recording import names_on_disk
from quantkit.rotating import Rotation, require_on_disk, rotate_block
from quantkit.scheme import TENSOR, TOKEN, QuantScheme, Recipe
from quantkit.states import HiddenStates

# Rows of each input on which the strength of a smoothing is searched, evenly spread over all batches.
SEARCH_ROWS = 1024


@dataclass
class ChosenWeights:
    """linears: codes and scales, by the Linear's name on disk. tensors: other parameters that changed, by theirs, as they are stored.

    described: for CALIB, what was done to each set and Linear.
    """

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    described: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"rotations": [], "folds": [], "refused": [], "linears": []})

    def to_tensors(self) -> dict[str, Tensor]:
        """NAME.weight and NAME.weight_scale of each Linear [block rows, block columns], and the other parameters."""
        tensors = dict(self.tensors)
        for name, weight in self.linears.items():
            tensors |= {f"{name}.weight": weight.qdata, f"{name}.weight_scale": weight.scale.float()}
        return tensors


class _EnoughSeen(Exception):
    """Ends a forward whose rest nobody needs."""


@dataclass
class BlockChooser:
    """Chooses for block after block. schemes: Linear on disk → scheme. threads: at work at once on a CPU. rotation: of the whole model, if any."""

    model: BlockwiseModel
    recipe: Recipe
    schemes: Mapping[str, QuantScheme]
    threads: int
    rotation: Rotation | None = None

    def choose(self, number: int, block: nn.Module, batches: Sequence[int], calls: Mapping[int, Any], states: HiddenStates) -> ChosenWeights:
        """Choose and put in place: afterwards the block is the quantized one."""
        work = _Block(self, number, block, batches, lambda batch: calls[batch][number], states)
        if self.rotation is not None:
            work.rotate(self.rotation)
        if self.recipe.algorithm("smoothquant"):
            work.smooth()
        work.quantize()
        return work.chosen

    def install(self, number: int, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put in place what an earlier run chose: `ChosenWeights.to_tensors` as it was read back."""
        names = _Names(self.model, number, block)
        device = self.model.device
        parameters = dict(block.named_parameters())
        for path, stored in names.parameters.items():
            if stored in tensors and f"{stored}_scale" not in tensors:
                parameters[path].data = tensors[stored].to(device)
        for path, linear in names.linears.items():
            if f"{linear}.weight_scale" in tensors:
                weight = QuantizedTensor(tensors[f"{linear}.weight"].to(device), tensors[f"{linear}.weight_scale"].to(device), self.schemes[linear].weight)
                replace_linear(self.model, block, path, weight, self.schemes[linear])


@dataclass(frozen=True)
class _Names:
    """What a block's parameters and Linears are called on disk, by their paths in it; those that several tensors make aren't here."""

    parameters: dict[str, str]
    linears: dict[str, str]

    def __init__(self, model: BlockwiseModel, number: int, block: nn.Module) -> None:
        prefix = model.block_name(number)
        parameters = {}
        for path, _ in block.named_parameters():
            source = model.sources(f"{prefix}.{path}")
            if source is not None and sum(map(len, source.lists)) == 1:
                parameters[path] = source.lists[0][0]
        linears = {}
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and f"{path}.weight" in parameters:
                (linears[path],) = names_on_disk(model.sources(f"{prefix}.{path}.weight"), f"{prefix}.{path}")
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "linears", linears)


def replace_linear(model: BlockwiseModel, block: nn.Module, path: str, weight: QuantizedTensor, scheme: QuantScheme) -> None:
    parent, _, leaf = path.rpartition(".")
    linear = block.get_submodule(path)
    setattr(block.get_submodule(parent), leaf, QuantizedLinear(weight, as_it_arrives(scheme), None, linear.bias, model.model.config.dtype))


def as_it_arrives(scheme: QuantScheme) -> QuantScheme:
    """The scheme with its input scales computed from each token, where they are static: those are measured last, on the weights chosen here."""
    return replace(scheme, input=replace(scheme.input, granularity=TOKEN, dynamic=True)) if scheme.needs_calibration else scheme


class _Block:
    """The work on one block."""

    def __init__(
        self, chooser: BlockChooser, number: int, block: nn.Module, batches: Sequence[int], call_of: Callable[[int], Call], states: HiddenStates
    ) -> None:
        self.chooser, self.model, self.recipe = chooser, chooser.model, chooser.recipe
        self.block, self.batches, self.call_of, self.states = block, batches, call_of, states
        self.names, self.prefix = _Names(self.model, number, block), self.model.block_name(number)
        self.schemes = {path: chooser.schemes[name] for path, name in self.names.linears.items() if name in chooser.schemes}
        # In float32 as they will be quantized; the block itself holds them rounded to its dtype.
        self.weights = {path: block.get_submodule(path).weight.data.float() for path in self.schemes}
        self.chosen = ChosenWeights()

    def _run(self, batch: int) -> Tensor:
        return self.model.run_block(self.block, self.call_of(batch), self.states.get(batch).to(self.model.device))

    def _each(self, work: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
        return each_batch(work, list(numbers), self.model.device, self.chooser.threads)

    def _probe(self, rotation: Tensor | None = None) -> BlockProbe:
        """On the first batch. rotation: that the hidden states have and this block doesn't expect."""
        hidden = self.states.get(self.batches[0]).to(self.model.device)
        return BlockProbe(self.model, self.block, self.call_of(self.batches[0]), hidden if rotation is None else hidden.float() @ rotation.T)

    def _stored_dtypes(self) -> dict[str, torch.dtype]:
        """Of parameters that are stored as they are."""
        return {path: parameter.dtype for path, parameter in self.block.named_parameters() if path.removesuffix(".weight") not in self.schemes}

    # -- Rotation.

    def rotate(self, rotation: Rotation) -> None:
        # On one thread the result doesn't depend on how many there are.
        with torch.inference_mode(), one_thread():
            found = rotate_block(self._probe(rotation.stream), rotation, self._stored_dtypes(), self.prefix)
            require_on_disk(self.model, self.prefix, list(found.parameters))
            self._put(found.parameters)
        entry = {"block": self.prefix, "norms": list(found.norms), "writers": list(found.writers), "heads": list(found.heads), "change": found.change}
        self.chosen.described["rotations"].append(entry)

    # -- SmoothQuant.

    def smooth(self) -> None:
        # On one thread the result doesn't depend on how many there are; each search is small.
        with torch.inference_mode(), one_thread():
            probe = self._probe()
            folds, reasons = find_folds(probe)
            name = self.names.linears
            self.chosen.described["refused"] += [{"linear": name.get(path, path), "reason": reason} for path, reason in reasons.items() if path in self.schemes]
            if not folds:
                return
            samples = self._samples([fold.consumers[0] for fold in folds])
            dtypes = self._stored_dtypes()
            before = dict(probe.block.named_parameters())
            after = dict(before)
            described = []
            # Each scales other columns, so that none changes what another is chosen by.
            searches = self._each(lambda index: self._search(folds[index], samples[folds[index].consumers[0]], before), range(len(folds)))
            for fold, found in zip(folds, searches):
                if found is None:
                    continue
                changed = folded(fold, after, _of_producer(fold, found.scale), dtypes)
                foreign = [path for path in changed if path not in self.names.parameters]
                if foreign:
                    self._refuse(fold, f"{foreign[0]} isn't one tensor on disk")
                    continue
                after |= changed
                described.append(self._described_fold(fold, found))
            changed = {path: tensor for path, tensor in after.items() if tensor is not before[path]}
            with probe.changed(changed):
                change = probe.change()
            if not change < STORED_TOLERANCE:
                for fold in folds:
                    self._refuse(fold, f"with the scales as they are stored the block's output changes by {change:.1%}")
                return
            self.chosen.described["folds"] += described
            self._put(changed)

    def _refuse(self, fold: Fold, reason: str) -> None:
        self.chosen.described["refused"] += [{"linear": self.names.linears.get(path, path), "reason": reason} for path in fold.consumers]

    def _search(self, fold: Fold, rows: Tensor, weights: Mapping[str, Tensor]) -> Smoothing | None:
        consumers = [path for path in fold.consumers if path in self.schemes]
        if not consumers or not rows.numel():
            return None
        strength = self.recipe.algorithm("smoothquant")["strength"]
        arguments = [weights[f"{path}.weight"].float() for path in consumers], [self.schemes[path] for path in consumers]
        return search_smoothing(rows, *arguments, strength, fold.channels)

    def _described_fold(self, fold: Fold, found: Smoothing) -> dict[str, Any]:
        prefix = self.names.parameters[f"{fold.producer}.weight"].removesuffix(".weight")
        return {
            "into": prefix, "linears": [self.names.linears[path] for path in fold.consumers], "strength": found.strength, "measure": found.measure,
            "error": found.error, "plain_error": found.plain_error, "largest_scale": float(found.scale.max()), "smallest_scale": float(found.scale.min()),
        }  # fmt: skip

    def _put(self, changed: Mapping[str, Tensor]) -> None:
        """Take changed parameters, float32, into the block, and into what is stored."""
        parameters = dict(self.block.named_parameters())
        for path, tensor in changed.items():
            linear = path.removesuffix(".weight")
            stored = tensor.to(parameters[path].dtype)
            parameters[path].data = stored
            if linear in self.schemes:
                self.weights[linear] = tensor
            else:
                self.chosen.tensors[self.names.parameters[path]] = stored

    def _samples(self, linears: Sequence[str]) -> dict[str, Tensor]:
        """Some rows of these Linears' inputs, [rows, in_features] float32."""
        each = -(-SEARCH_ROWS // len(self.batches))

        def work(batch: int) -> dict[str, Tensor]:
            kept = {}
            for path, inputs in inputs_of(batch).items():
                places = torch.linspace(0, inputs.shape[0] - 1, min(each, inputs.shape[0])).long().to(inputs.device)
                kept[path] = inputs[places].float()
            return kept

        with self._keeping_inputs(linears) as inputs_of:
            found = list(self._each(work, self.batches))
        return {path: torch.cat([rows[path] for rows in found if path in rows] or [torch.empty(0)]) for path in linears}

    @contextmanager
    def _keeping_inputs(self, linears: Sequence[str]) -> Iterator[Callable[[int], dict[str, Tensor]]]:
        """A function from a batch to what these Linears are handed, [rows, in_features] each; its forward ends with the last of them."""
        here = threading.local()

        def keeper(path: str) -> Callable[..., None]:
            def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
                here.seen[path] = arguments[0].reshape(-1, arguments[0].shape[-1])
                if len(here.seen) == len(linears):
                    raise _EnoughSeen

            return keep

        def inputs_of(batch: int) -> dict[str, Tensor]:
            here.seen = {}
            with suppress(_EnoughSeen):
                self._run(batch)
            return here.seen

        hooks = [self.block.get_submodule(path).register_forward_pre_hook(keeper(path)) for path in linears]
        try:
            yield inputs_of
        finally:
            for hook in hooks:
                hook.remove()

    # -- Codes.

    def quantize(self) -> None:
        settings = self.recipe.algorithm("gptq")
        for linears in self._sets():
            if settings is None:
                solutions = {path: Solution(weight, 0.0, 0.0) for path, weight in zip(linears, self._rounded(linears))}
            else:
                solutions = self._solve(linears, settings)
            for path, solution in solutions.items():
                name, scheme = self.names.linears[path], self.schemes[path]
                self.chosen.linears[name] = solution.weight
                entry = {"name": name, "algorithm": "gptq" if settings and not solution.fallback else "rtn"}
                if settings:
                    entry |= {"error": solution.error, "plain_error": solution.plain_error} | ({"reason": solution.fallback} if solution.fallback else {})
                self.chosen.described["linears"].append(entry)
                replace_linear(self.model, self.block, path, solution.weight, scheme)
            for path in linears:
                del self.weights[path]

    def _sets(self) -> list[list[str]]:
        """Quantized Linears in the order in which the block computes them, those that read one input together; those that aren't reached come last."""
        order: dict[tuple[int, int], list[str]] = {}
        alive: list[Tensor] = []

        def keeper(path: str) -> Callable[..., None]:
            def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
                alive.append(arguments[0])
                members = order.setdefault((arguments[0].data_ptr(), arguments[0].numel()), [])
                if path not in members:
                    members.append(path)

            return keep

        hooks = [self.block.get_submodule(path).register_forward_pre_hook(keeper(path)) for path in self.schemes]
        try:
            with torch.inference_mode(), one_thread():
                self._run(self.batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        reached = {path for members in order.values() for path in members}
        return [*order.values(), *([path] for path in self.schemes if path not in reached)]

    def _shared_amax(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The amax of Linears that share one scale with others of their fused set, [1, 1]."""
        amax: dict[str, Tensor | None] = dict.fromkeys(targets)
        per_tensor = [path for path in targets if self.schemes[path].weight.granularity == TENSOR]
        for members in fused_sets(per_tensor):
            shared = torch.stack([block_amax(targets[path], TENSOR) for path in members]).amax(0)
            amax |= dict.fromkeys(members, shared)
        return amax

    def _rounded(self, linears: Sequence[str]) -> list[QuantizedTensor]:
        amax = self._shared_amax({path: self.weights[path] for path in linears})
        return [quantize_weight(self.weights[path], self.schemes[path].weight, amax[path]) for path in linears]

    def _solve(self, linears: Sequence[str], settings: Any) -> dict[str, Solution]:
        grams = {spec: self._grams(linears[0], spec, settings["correct_inputs"]) for spec in {as_it_arrives(self.schemes[path]).input for path in linears}}
        if any(gram is None for gram in grams.values()):
            return {path: Solution(weight, 0.0, 0.0, "no token reached it") for path, weight in zip(linears, self._rounded(linears))}
        of = {path: grams[as_it_arrives(self.schemes[path]).input] for path in linears}
        damping = settings["damping"]

        def correct(index: int) -> Tensor:
            path = linears[index]
            hessian, deviation = of[path]
            return self.weights[path] if deviation is None else corrected_weight(self.weights[path], hessian, deviation, damping)

        targets = dict(zip(linears, self._each(correct, range(len(linears)))))
        amax = self._shared_amax(targets)

        def solve(index: int) -> Solution:
            path = linears[index]
            return gptq(self.weights[path], self.schemes[path].weight, of[path][0], targets[path], damping, settings["act_order"], amax[path])

        return dict(zip(linears, self._each(solve, range(len(linears)))))

    def _grams(self, linear: str, spec: Any, with_deviation: bool) -> tuple[Tensor, Tensor | None] | None:
        """X̂ X̂ᵀ and (X − X̂) X̂ᵀ of a Linear's inputs over all batches, [in_features, in_features] float32."""

        def work(batch: int) -> tuple[Tensor, Tensor | None] | None:
            inputs = inputs_of(batch).get(linear)
            if inputs is None or not inputs.numel():
                return None
            rows = inputs.float()
            if spec is None:
                return rows.T @ rows, None
            seen = quantize(inputs, spec).dequantize()
            return seen.T @ seen, (rows - seen).T @ seen if with_deviation else None

        total: tuple[Tensor, Tensor | None] | None = None
        with self._keeping_inputs([linear]) as inputs_of, torch.inference_mode():
            for gram in self._each(work, self.batches):
                if gram is not None and total is None:
                    total = gram
                elif gram is not None:
                    total = tuple(None if mine is None else mine.add_(other) for mine, other in zip(total, gram))
        if total is not None and not torch.isfinite(total[0]).all():
            raise CalibrationError(
                f"the input of {self.names.linears[linear]} holds NaN or infinity; the model overflows on this text or its weights are damaged"
            )
        return total


def _of_producer(fold: Fold, scale: Tensor) -> Tensor:
    """A scale of the consumers' inputs as one of the producer's channels; equal where several read one channel."""
    if fold.channels is None:
        return scale
    found = torch.empty(int(fold.channels.max()) + 1, device=scale.device)
    found[fold.channels] = scale
    return found
