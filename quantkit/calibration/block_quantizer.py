"""The weights of one decoder block, chosen with data: which scales are folded where, then codes for
each Linear.

A block is worked through in the order in which it computes. What it reads comes from earlier blocks
as they are quantized, and each of its Linears is quantized before the inputs of the next are looked
at: errors are seen by all that can still make up for them. What is chosen is final: codes and
scales go to CALIB, and `export` copies them.

Where several processes share the batches, what is found by running the block on one batch is found
by the first of them, sums over tokens are added up over all, and each search and each Linear's
codes are made by one and sent to the others: so all hold the same weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.bias_correction import corrected_bias
from quantkit.algorithms.gptq import Solution, corrected_weight, gptq
from quantkit.algorithms.scale_search import search_scale
from quantkit.algorithms.smoothquant import Smoothing, search_smoothing
from quantkit.calibration.rotate import RotatedBlock, Rotation, require_on_disk, rotate_block
from quantkit.calibration.scale_folding import (
    STORED_TOLERANCE,
    BlockProbe,
    Fold,
    find_folds,
    folded,
    is_scaled_by_vector,
)
from quantkit.errors import CalibrationError
from quantkit.models.block_inputs import BlockInputs
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.tensor_roles import fused_sets
from quantkit.models.threads import each_batch, one_thread
from quantkit.models.weight_map import names_on_disk
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor, block_amax, choose_scale, quantize
from quantkit.ops.torch_ops import quantize as quantize_weight
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import TENSOR, TOKEN, QuantScheme

# Rows of each input on which a smoothing's scale is searched, evenly spread over all batches, and
# how many numbers they may be.
SEARCH_ROWS, SEARCH_NUMBERS = 16384, 1 << 28


@dataclass
class ChosenWeights:
    """linears: codes and scales, by the Linear's name on disk. tensors: other parameters that
    changed, by theirs, as they are stored.

    described: for CALIB, what was done to each set and Linear.
    """

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    described: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"rotations": [], "folds": [], "refused": [], "linears": []}
    )

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


class _EnoughSeen(Exception):
    """Ends a forward whose rest nobody needs."""


@dataclass
class BlockChooser:
    """Chooses for block after block. schemes: Linear on disk → scheme. threads: at work at once on
    a CPU. rotation: of the whole model, if any. ranks: share the batches.
    """

    model: BlockwiseModel
    recipe: Recipe
    schemes: Mapping[str, QuantScheme]
    threads: int
    rotation: Rotation | None = None
    ranks: Ranks = Ranks()

    def choose(
        self,
        number: int,
        block: nn.Module,
        batches: Sequence[int],
        calls: Mapping[int, Any],
        states: HiddenStates,
    ) -> ChosenWeights:
        """Choose and put in place: afterwards the block is the quantized one."""
        work = _Block(self, number, block, batches, lambda batch: calls[batch][number], states)
        if self.rotation is not None:
            work.rotate(self.rotation)
        if any(
            self.recipe.algorithm(name)
            for name in ("smoothquant", "scale_search", "gptq", "bias_correction")
        ):
            work.weigh_tokens()
        if self.recipe.algorithm("smoothquant"):
            work.smooth()
        work.quantize()
        return work.chosen

    def install(self, number: int, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put in place what an earlier run chose: `ChosenWeights.to_tensors` as it was read
        back.
        """
        names = _Names(self.model, number, block)
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
                replace_linear(self.model, block, path, weight, self.schemes[linear])


@dataclass(frozen=True)
class _Names:
    """What a block's parameters and Linears are called on disk, by their paths in it; those that
    several tensors make aren't here.
    """

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
                (linears[path],) = names_on_disk(
                    model.sources(f"{prefix}.{path}.weight"), f"{prefix}.{path}"
                )
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "linears", linears)


def replace_linear(
    model: BlockwiseModel, block: nn.Module, path: str, weight: QuantizedTensor, scheme: QuantScheme
) -> None:
    linear = block.get_submodule(path)
    block.set_submodule(
        path,
        QuantizedLinear(weight, as_it_arrives(scheme), None, linear.bias, model.model.config.dtype),
    )


def as_it_arrives(scheme: QuantScheme) -> QuantScheme:
    """The scheme with its input scales computed from each token, where they are static: those are
    measured last, on the weights chosen here.
    """
    return (
        replace(scheme, input=replace(scheme.input, granularity=TOKEN, dynamic=True))
        if scheme.needs_calibration
        else scheme
    )


@dataclass(frozen=True)
class _Order:
    """sets: quantized Linears in the order in which a block computes them, those that read one
    input together; those that aren't reached come last.

    norm_of: the norm that returned what a Linear reads, where one did.
    """

    sets: list[list[str]]
    norm_of: dict[str, str]


@dataclass(frozen=True)
class _Inputs:
    """What a Linear is given, over all tokens, each as often as it counts. exact_mean, seen_mean,
    squares: mean of X, of the quantized X̂, of its squares, [in_features].

    hessian, deviation: X̂ X̂ᵀ and (X − X̂) X̂ᵀ, [in_features, in_features] float32, where they were
    asked for.
    """

    exact_mean: Tensor
    seen_mean: Tensor
    squares: Tensor
    hessian: Tensor | None = None
    deviation: Tensor | None = None


class _Block:
    """The work on one block."""

    def __init__(
        self,
        chooser: BlockChooser,
        number: int,
        block: nn.Module,
        batches: Sequence[int],
        call_of: Callable[[int], BlockInputs],
        states: HiddenStates,
    ) -> None:
        self.chooser, self.model, self.recipe, self.ranks = (
            chooser,
            chooser.model,
            chooser.recipe,
            chooser.ranks,
        )
        self.block, self.batches, self.call_of, self.states = block, batches, call_of, states
        self.names, self.prefix = _Names(self.model, number, block), self.model.block_name(number)
        self.schemes = {
            path: chooser.schemes[name]
            for path, name in self.names.linears.items()
            if name in chooser.schemes
        }
        # In float32 as they will be quantized; the block itself holds them rounded to its dtype.
        self.weights = {
            path: block.get_submodule(path).weight.data.float() for path in self.schemes
        }
        self.chosen = ChosenWeights()
        self.order: _Order = self.ranks.broadcast_from_first(self._find_order)
        self.importance: dict[int, Tensor] = {}  # of each batch's tokens, [tokens, 1]

    def _run(self, batch: int) -> Tensor:
        return self.model.run_block(
            self.block, self.call_of(batch), self.states.get(batch).to(self.model.device)
        )

    def _each(self, work: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
        return each_batch(work, list(numbers), self.model.device, self.chooser.threads)

    def _shared(self, work: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
        """work(number) for each, done by one of the ranks; every rank has all results."""
        numbers = list(numbers)
        mine = numbers[self.ranks.rank :: self.ranks.count]
        shares = self.ranks.all_gather(dict(zip(mine, self._each(work, mine))))
        return [shares[place % self.ranks.count][number] for place, number in enumerate(numbers)]

    def _probe(self, rotation: Tensor | None = None) -> BlockProbe:
        """On the first batch. rotation: that the hidden states have and this block doesn't
        expect.
        """
        hidden = self.states.get(self.batches[0]).to(self.model.device)
        return BlockProbe(
            self.model,
            self.block,
            self.call_of(self.batches[0]),
            hidden if rotation is None else hidden.float() @ rotation.T,
        )

    def _stored_dtypes(self) -> dict[str, torch.dtype]:
        """Of parameters that are stored as they are."""
        return {
            path: parameter.dtype
            for path, parameter in self.block.named_parameters()
            if path.removesuffix(".weight") not in self.schemes
        }

    # -- Rotation.

    def rotate(self, rotation: Rotation) -> None:
        def find() -> RotatedBlock:
            found = rotate_block(
                self._probe(rotation.stream), rotation, self._stored_dtypes(), self.prefix
            )
            require_on_disk(self.model, self.prefix, list(found.parameters))
            return found

        def describe(found: RotatedBlock) -> dict[str, Any]:
            entry = {
                "block": self.prefix,
                "norms": list(found.norms),
                "writers": list(found.writers),
                "heads": list(found.heads),
                "change": found.change,
            }
            return entry | {
                "linears": {path: asdict(linear) for path, linear in found.linears.items()}
            }

        # On one thread the result doesn't depend on how many there are.
        with torch.inference_mode(), one_thread():
            found = self.ranks.on_first(find)
            self.chosen.described["rotations"].append(
                self.ranks.broadcast_from_first(lambda: describe(found))
            )
            self._put(self.ranks.broadcast_tensors(found.parameters if found else None))

    # -- SmoothQuant.

    def smooth(self) -> None:
        # On one thread the result doesn't depend on how many there are; each search is small.
        with torch.inference_mode(), one_thread():
            probe = self._probe() if self.ranks.is_first else None
            folds, reasons = self.ranks.broadcast_from_first(lambda: find_folds(probe))
            name = self.names.linears
            self.chosen.described["refused"] += [
                {"linear": name.get(path, path), "reason": reason}
                for path, reason in reasons.items()
                if path in self.schemes
            ]
            if not folds:
                return
            samples, importance = self._samples([fold.consumers[0] for fold in folds])
            dtypes = self._stored_dtypes()
            before = (
                dict(probe.block.named_parameters())
                if probe
                else {
                    path: parameter.data.float()
                    for path, parameter in self.block.named_parameters()
                }
            )
            after = dict(before)
            described = []
            # Each scales other columns, so that none changes what another is chosen by.
            searches = self._shared(
                lambda index: self._search(folds[index], samples, importance, before),
                range(len(folds)),
            )
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
            change = self.ranks.broadcast_from_first(lambda: _change(probe, changed))
            if not change < STORED_TOLERANCE:
                for fold in folds:
                    self._refuse(
                        fold,
                        "with the scales as they are stored the block's output changes by"
                        f" {change:.1%}",
                    )
                return
            self.chosen.described["folds"] += described
            self._put(changed)

    def _refuse(self, fold: Fold, reason: str) -> None:
        self.chosen.described["refused"] += [
            {"linear": self.names.linears.get(path, path), "reason": reason}
            for path in fold.consumers
        ]

    def _search(
        self,
        fold: Fold,
        samples: Mapping[str, Tensor],
        importance: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
    ) -> Smoothing | None:
        consumers = [path for path in fold.consumers if path in self.schemes]
        rows = samples[fold.consumers[0]]
        if not consumers or not rows.numel():
            return None
        strength = self.recipe.algorithm("smoothquant")["strength"]
        arguments = (
            [weights[f"{path}.weight"].float() for path in consumers],
            [self.schemes[path] for path in consumers],
        )
        return search_smoothing(
            rows, *arguments, strength, fold.channels, importance.get(fold.consumers[0])
        )

    def _described_fold(self, fold: Fold, found: Smoothing) -> dict[str, Any]:
        prefix = self.names.parameters[f"{fold.producer}.weight"].removesuffix(".weight")
        return {
            "into": prefix,
            "linears": [self.names.linears[path] for path in fold.consumers],
            "strength": found.strength,
            "measure": found.measure,
            "error": found.error,
            "plain_error": found.plain_error,
            "largest_scale": float(found.scale.max()),
            "smallest_scale": float(found.scale.min()),
        }

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

    def _samples(self, linears: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Some rows of these Linears' inputs, [rows, in_features], and where they aren't all alike
        how much each counts, [rows, 1].
        """
        width = max(self.block.get_submodule(path).in_features for path in linears)
        each = -(
            -min(SEARCH_ROWS, SEARCH_NUMBERS // width)
            // sum(self.ranks.all_gather(len(self.batches)))
        )

        def work(batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            kept, counts = {}, {}
            for path, inputs in inputs_of(batch).items():
                # Drawn, not at equal distances: every window's first position among them would
                # count far more than it does in any text.
                places = torch.randint(
                    inputs.shape[0],
                    (min(each, inputs.shape[0]),),
                    generator=torch.Generator().manual_seed(batch),
                ).to(inputs.device)
                kept[path] = inputs[places]
                importance = self._importance(path, batch, inputs)
                if importance is not None:
                    counts[path] = importance[places]
            return kept, counts

        with self._keeping_inputs(linears) as inputs_of:
            shares = self.ranks.all_gather(dict(zip(self.batches, self._each(work, self.batches))))
        found = [
            kept
            for _, kept in sorted(
                (item for share in shares for item in share.items()), key=lambda item: item[0]
            )
        ]
        rows, importance = (
            {
                path: [entry[side][path] for entry in found if path in entry[side]]
                for path in linears
            }
            for side in (0, 1)
        )
        return {path: torch.cat(rows[path] or [torch.empty(0)]) for path in linears}, {
            path: torch.cat(importance[path]) for path in linears if importance[path]
        }

    def _find_order(self) -> _Order:
        """In which order the block computes, found by running the first batch."""
        sets: dict[tuple[int, int], list[str]] = {}
        returned: dict[tuple[int, int], str] = {}
        norm_of: dict[str, str] = {}
        alive: list[Tensor] = []  # as long as they live, no other tensor gets their address

        def arrive(path: str) -> Callable[..., None]:
            def hook(module: nn.Linear, arguments: tuple[Any, ...]) -> None:
                alive.append(arguments[0])
                place = arguments[0].data_ptr(), arguments[0].numel()
                members = sets.setdefault(place, [])
                if path not in members:
                    members.append(path)
                if (
                    place in returned
                    and self.block.get_submodule(returned[place]).weight.numel()
                    == module.in_features
                ):
                    norm_of[path] = returned[place]

            return hook

        def leave(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    alive.append(output)
                    returned[output.data_ptr(), output.numel()] = path

            return hook

        hooks = [
            self.block.get_submodule(path).register_forward_pre_hook(arrive(path))
            for path in self.schemes
        ]
        hooks += [
            module.register_forward_hook(leave(path))
            for path, module in self.block.named_modules()
            if is_scaled_by_vector(module)
        ]
        try:
            with torch.inference_mode(), one_thread():
                self._run(self.batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        reached = {path for members in sets.values() for path in members}
        return _Order(
            [*sets.values(), *([path] for path in self.schemes if path not in reached)], norm_of
        )

    def _importance(self, linear: str, batch: int, inputs: Tensor) -> Tensor | None:
        """How much an error in what a Linear puts out counts for each token, [tokens, 1] float32;
        None where all are alike.

        What isn't behind a norm writes to the residual stream, and the next norm divides by its
        size: beside a hidden state ten times as large an error counts a tenth. Without this, the
        one enormous token at the start of a window would decide for all others.
        """
        if linear in self.order.norm_of:
            return None
        importance = self.importance[batch]
        return importance if len(importance) == len(inputs) else None

    def weigh_tokens(self) -> None:
        """Find 1 / the mean square of what the block returns for each token, for each batch."""

        def work(batch: int) -> Tensor:
            return 1 / self._run(batch).flatten(0, -2).float().square().mean(1, keepdim=True).clamp(
                min=1e-12
            )

        with torch.inference_mode():
            self.importance = dict(zip(self.batches, self._each(work, self.batches)))

    @contextmanager
    def _keeping_inputs(
        self, linears: Sequence[str]
    ) -> Iterator[Callable[[int], dict[str, Tensor]]]:
        """A function from a batch to what these Linears are handed, [rows, in_features] each; its
        forward ends with the last of them.
        """
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

        hooks = [
            self.block.get_submodule(path).register_forward_pre_hook(keeper(path))
            for path in linears
        ]
        try:
            yield inputs_of
        finally:
            for hook in hooks:
                hook.remove()

    # -- Codes.

    def quantize(self) -> None:
        named = {
            name: self.recipe.algorithm(name)
            for name in ("scale_search", "gptq", "bias_correction")
        }
        for linears in self.order.sets:
            seen = (
                self._inputs(linears, with_gram=bool(named["gptq"])) if any(named.values()) else {}
            )
            if named["gptq"] and None not in seen.values():
                solutions = self._solve(linears, named["gptq"], seen)
            else:
                reason = "no token reached it" if named["gptq"] else ""
                scales = self._scales({path: self.weights[path] for path in linears}, seen)
                solutions = {
                    path: Solution(self._rounded(path, scales[path]), 0.0, 0.0, reason)
                    for path in linears
                }
            for path, solution in solutions.items():
                name, scheme = self.names.linears[path], self.schemes[path]
                self.chosen.linears[name] = solution.weight
                entry: dict[str, Any] = {
                    "name": name,
                    "algorithm": "gptq" if named["gptq"] and not solution.fallback else "rtn",
                }
                if named["gptq"]:
                    entry |= {"error": solution.error, "plain_error": solution.plain_error} | (
                        {"reason": solution.fallback} if solution.fallback else {}
                    )
                if named["bias_correction"]:
                    entry["bias_corrected"] = self._correct_bias(path, solution.weight, seen[path])
                self.chosen.described["linears"].append(entry)
                replace_linear(self.model, self.block, path, solution.weight, scheme)
            for path in linears:
                del self.weights[path]

    def _rounded(self, path: str, scale: Tensor | None) -> QuantizedTensor:
        spec = self.schemes[path].weight
        return (
            quantize_weight(self.weights[path], spec)
            if scale is None
            else quantize(self.weights[path], spec, scale)
        )

    def _correct_bias(self, path: str, weight: QuantizedTensor, inputs: _Inputs | None) -> bool:
        bias = self.block.get_submodule(path).bias
        if bias is None or inputs is None or f"{path}.bias" not in self.names.parameters:
            return False
        bias.data = self.ranks.broadcast_from_first(
            lambda: corrected_bias(
                bias.data,
                self.weights[path],
                weight.dequantize(),
                inputs.exact_mean,
                inputs.seen_mean,
            ).to(bias.dtype)
        )
        self.chosen.tensors[self.names.parameters[f"{path}.bias"]] = bias.data
        return True

    def _scales(
        self, targets: Mapping[str, Tensor], inputs: Mapping[str, _Inputs | None]
    ) -> dict[str, Tensor | None]:
        """Each Linear's scales [block rows, block columns]; None for the usual ones."""
        scales: dict[str, Tensor | None] = dict.fromkeys(targets)
        per_tensor = fused_sets(
            [path for path in targets if self.schemes[path].weight.granularity == TENSOR]
        )
        together = [
            *per_tensor,
            *((path,) for path in targets if not any(path in members for members in per_tensor)),
        ]

        def work(index: int) -> Tensor | None:
            members = together[index]
            spec, seen = self.schemes[members[0]].weight, inputs.get(members[0])
            weights = [targets[path] for path in members]
            if self.recipe.algorithm("scale_search"):
                return search_scale(weights, spec, None if seen is None else seen.squares)
            # Those that share one scale follow the largest weight of all.
            return (
                choose_scale(
                    torch.stack([block_amax(weight, TENSOR) for weight in weights]).amax(0), spec
                )
                if len(members) > 1
                else None
            )

        for members, scale in zip(together, self._shared(work, range(len(together)))):
            scales |= dict.fromkeys(members, scale)
        return scales

    def _solve(
        self, linears: Sequence[str], settings: Any, inputs: Mapping[str, _Inputs]
    ) -> dict[str, Solution]:
        damping = settings["damping"]

        def correct(index: int) -> Tensor:
            path = linears[index]
            if not settings["correct_inputs"] or inputs[path].deviation is None:
                return self.weights[path]
            return corrected_weight(
                self.weights[path], inputs[path].hessian, inputs[path].deviation, damping
            )

        targets = dict(zip(linears, self._each(correct, range(len(linears)))))
        scales = self._scales(targets, inputs)

        def solve(index: int) -> Solution:
            path = linears[index]
            weight, seen = self.weights[path], inputs[path]
            return gptq(
                weight,
                self.schemes[path].weight,
                seen.hessian,
                targets[path],
                damping,
                settings["act_order"],
                scales[path],
                settings["passes"],
            )

        def sent(index: int) -> Solution:
            """Codes as bytes and without their spec: neither E4M3 tensors nor formats, which are
            compared by identity, survive being sent.
            """
            solution = solve(index)
            return replace(
                solution,
                weight=replace(
                    solution.weight, qdata=solution.weight.qdata.view(torch.uint8), spec=None
                ),
            )

        found = {}
        for path, solution in zip(linears, self._shared(sent, range(len(linears)))):
            spec, device = self.schemes[path].weight, self.model.device
            codes, scale = (
                solution.weight.qdata.to(device).view(getattr(torch, spec.format.torch_name)),
                solution.weight.scale.to(device),
            )
            found[path] = replace(solution, weight=QuantizedTensor(codes, scale, spec))
        return found

    def _inputs(self, linears: Sequence[str], with_gram: bool) -> dict[str, _Inputs | None]:
        """What the Linears of a set are given, by each; None where no token reached them."""
        specs = {path: as_it_arrives(self.schemes[path]).input for path in linears}
        known = {spec: self._inputs_of(linears[0], spec, with_gram) for spec in set(specs.values())}
        return {path: known[spec] for path, spec in specs.items()}

    def _inputs_of(self, linear: str, spec: Any, with_gram: bool) -> _Inputs | None:
        def work(batch: int) -> list[Tensor] | None:
            inputs = inputs_of(batch).get(linear)
            if inputs is None or not inputs.numel():
                return None
            importance = self._importance(linear, batch, inputs)
            root = 1.0 if importance is None else importance.sqrt()
            exact = inputs.float() * root
            seen = exact if spec is None else quantize(inputs, spec).dequantize() * root
            weights = torch.ones(len(inputs), 1, device=inputs.device) * root
            sums = [
                weights.square().sum(),
                (exact * weights).sum(0),
                (seen * weights).sum(0),
                seen.square().sum(0),
            ]
            if with_gram:
                sums.append(seen.T @ seen)
            if with_gram and correct_inputs and spec is not None:
                sums.append((exact - seen).T @ seen)
            return sums

        gptq_settings = self.recipe.algorithm("gptq")
        correct_inputs = gptq_settings is not None and gptq_settings["correct_inputs"]
        total: list[Tensor] | None = None
        with self._keeping_inputs([linear]) as inputs_of, torch.inference_mode():
            for sums in self._each(work, self.batches):
                if sums is not None:
                    total = (
                        sums
                        if total is None
                        else [mine.add_(other) for mine, other in zip(total, sums)]
                    )
        total = self._added_up(total)
        if total is None:
            return None
        squares_sum, name = total[3], self.names.linears[linear]

        def require_finite() -> None:
            if not torch.isfinite(squares_sum).all():
                raise CalibrationError(
                    f"the input of {name} holds NaN or infinity; the model overflows on this text"
                    " or its weights are damaged"
                )

        self.ranks.on_first(require_finite)
        count, exact, seen, squares, *grams = total
        return _Inputs(exact / count, seen / count, squares / count, *grams)

    def _added_up(self, sums: list[Tensor] | None) -> list[Tensor] | None:
        """Over the ranks, of which some may have seen no token (None)."""
        if self.ranks.count == 1:
            return sums
        shapes = next(
            (
                shapes
                for shapes in self.ranks.all_gather(sums and [tuple(each.shape) for each in sums])
                if shapes
            ),
            None,
        )
        if shapes is None:
            return None
        sums = sums or [torch.zeros(shape, device=self.model.device) for shape in shapes]
        return [self.ranks.reduce([each], "sum")[0] for each in sums]


def _change(probe: BlockProbe, changed: Mapping[str, Tensor]) -> float:
    with probe.changed(changed):
        return probe.change()


def _of_producer(fold: Fold, scale: Tensor) -> Tensor:
    """A scale of the consumers' inputs as one of the producer's channels; equal where several read
    one channel.
    """
    if fold.channels is None:
        return scale
    found = torch.empty(int(fold.channels.max()) + 1, device=scale.device)
    found[fold.channels] = scale
    return found
