"""A set of Linears as it is served, put in the place of the original one while a variant runs; and
what quantizing did to each Linear by itself.

Codes are made as `export` makes them. Where a calibration holds weights that algorithms chose, its
codes are taken, and the unquantized model is the one they were made from: algorithms fold scales
per channel into weights before they choose codes, and those scales are found again from the codes.
Where the calibration rotated the model, its weights are rotated again first: by the same matrices,
which follow from the seed, and as the calibration says of each Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.algorithms.rotation import Rotation
from quantkit.calibration.rotate import RotatedLinear, make_rotation
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.errors import EvaluationError
from quantkit.evaluation.quantized_experts import (
    EXPERTS_IMPLEMENTATION,
    ExpertInput,
    register_serving_experts,
)
from quantkit.exporter.plan import ExportPlan
from quantkit.exporter.tensor_maker import input_scale_of
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.distributed import Ranks
from quantkit.models.experts import Restacked, first_and_down, is_experts
from quantkit.models.skeleton import StoredWeights, build_skeleton
from quantkit.models.threads import one_thread
from quantkit.models.weight_map import names_on_disk
from quantkit.ops.linear import QuantizedLinear
from quantkit.ops.reference import QuantizedTensor, sqnr_db
from quantkit.schemes.scheme import TENSOR
from quantkit.sensitivity.variants import Swap

# Rows of each Linear's input on which its output is compared: of so many windows, so many positions
# each.
SAMPLED_WINDOWS, SAMPLED_POSITIONS = 4, 64
# What recovering the folded weight may leave of it: codes of 8 bits lie 30 dB and more from what
# they were made from.
LEAST_RECOVERED_DB = 20.0
NUDGED = 1 / 12  # share of roundings that a nudge moves by one step


class SetInstaller:
    """plans: for each choice of a set the plan of a model whose sets all take it, None for the
    first, which leaves them. sets: the Linears of each, once they are known. looked_at: the windows
    that run here.
    """

    def __init__(
        self,
        model: Path,
        plans: Sequence[ExportPlan | None],
        trust_remote_code: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self._path, self._plans, self._trust_remote_code, self._ranks = (
            model,
            plans,
            trust_remote_code,
            ranks or Ranks(),
        )
        self.sets: Sequence[Sequence[str]] = ()
        self.looked_at: Sequence[int] = (0,)
        self._figures: dict[int, dict[str, dict[str, Any]]] = {}
        self._known_blocks = 0
        self._inputs: dict[str, Tensor] | None = None  # of the block that was looked at last

    # -- The model.

    def open(self, device: str) -> int:
        """How many blocks it has."""
        return self.reopened(device).block_count

    def reopened(self, device: str) -> BlockwiseModel:
        """The unquantized model, its blocks on disk: each of them runs once."""
        register_serving_experts()
        checkpoint = self._plans[1].checkpoint
        skeleton = build_skeleton(
            checkpoint,
            self._trust_remote_code,
            bool(self._plans[1].added),
            experts_implementation=EXPERTS_IMPLEMENTATION,
        )
        self._weights = _Weights(self._plans[1], skeleton)
        self._model = BlockwiseModel(skeleton, self._weights, str(self._path), device)
        self._model.require_unshared()
        self._weights.rotate(self._model)
        self._inputs = None
        return self._model

    def linears_of(self, number: int) -> list[str]:
        """The names on disk of a block's Linears, those that transformers stacks among them."""
        prefix = self._model.block_name(number)
        names: list[str] = []
        for path, module in self._model.model.get_submodule(prefix).named_modules():
            if isinstance(module, nn.Linear):
                names += names_on_disk(
                    self._model.sources(f"{prefix}.{path}.weight"), f"{prefix}.{path}"
                )
            elif is_experts(module):
                names += [
                    name
                    for leaf in first_and_down(module)
                    for name in self._stacked_linears(f"{prefix}.{path}.{leaf}")
                ]
        return names

    def _stacked_linears(self, stack: str) -> list[str]:
        """The Linears on disk, or those that `export` writes, that make a stacked parameter."""
        source = self._model.sources(stack)
        return (
            [
                linear
                for tensors in source.lists
                for tensor in tensors
                for linear in self._weights.restacked.names(tensor)
            ]
            if source
            else [stack]
        )

    # -- A block's sets.

    def install(self, number: int, block: nn.Module, place: int, choice: int) -> list[Swap]:
        """What takes the place of a set's Linears under a choice; places beyond the sets are
        nudges.
        """
        if choice == 0:
            return []
        if place >= len(self.sets):
            linears = [
                (path, module)
                for path, module in block.named_modules()
                if isinstance(module, nn.Linear)
            ]
            return [Swap(*_owner(block, path), _Nudged(linear)) for path, linear in linears[-1:]]
        prefix, plan = self._model.block_name(number), self._plans[choice]
        members = set(self.sets[place])
        swaps: list[Swap] = []
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                names = names_on_disk(
                    self._model.sources(f"{prefix}.{path}.weight"), f"{prefix}.{path}"
                )
                if len(names) == 1 and names[0] in members:
                    swaps.append(
                        Swap(
                            *_owner(block, path),
                            self._quantized(plan, choice, names[0], module, place),
                        )
                    )
            elif is_experts(module):
                swaps += self._stacked(plan, choice, f"{prefix}.{path}", module, members)
        return swaps

    def _quantized(
        self, plan: ExportPlan, choice: int, name: str, linear: nn.Linear, place: int
    ) -> QuantizedLinear:
        info = plan.linears[name]
        weight = self._codes(plan, choice, info)
        weight = replace(
            weight,
            qdata=weight.qdata.to(self._model.device),
            scale=weight.scale.to(self._model.device),
        )
        input_scale = (
            input_scale_of(info, plan).reshape(1).to(self._model.device)
            if info.scheme.needs_calibration
            else None
        )
        made = QuantizedLinear(
            weight, info.scheme, input_scale, linear.bias, self._model.model.config.dtype
        )
        if choice == 1 and self._inputs is not None:
            self._compare(place, name, linear, weight, made)
        return made

    def _codes(self, plan: ExportPlan, choice: int, info: QuantizedLinearInfo) -> QuantizedTensor:
        chosen = (
            plan.calibration.quantized_weight(info.name, info.scheme.weight)
            if choice == 1 and plan.calibration
            else None
        )
        if chosen is not None:
            return chosen
        amax = None
        if info.scheme.weight.granularity == TENSOR:
            members = plan.fused_with.get(info.name, (info.name,))
            amax = (
                torch.stack(
                    [
                        self._weights.read(f"{member}.weight").abs().amax().float()
                        for member in members
                    ]
                )
                .amax()
                .reshape(1, 1)
            )
        return ops.quantize(self._weights.read(f"{info.name}.weight"), info.scheme.weight, amax)

    def _stacked(
        self, plan: ExportPlan, choice: int, name: str, module: nn.Module, members: set[str]
    ) -> list[Swap]:
        """Stacked experts run with the values of their codes, and quantize their inputs."""
        swaps, inputs = [], {}
        for leaf in first_and_down(module):
            names = [
                linear for linear in self._stacked_linears(f"{name}.{leaf}") if linear in members
            ]
            if not names:
                continue
            self._weights.rounded = {
                f"{linear}.weight": self._codes(plan, choice, plan.linears[linear])
                for linear in names
            }
            try:
                swaps.append(Swap(module, leaf, self._model.read_anew(f"{name}.{leaf}")))
            finally:
                self._weights.rounded = {}
            specs = {plan.linears[linear].scheme.input for linear in names}
            spec = specs.pop() if len(specs) == 1 else None
            if spec is not None:
                static = not spec.dynamic
                scale = (
                    torch.stack(
                        [input_scale_of(plan.linears[linear], plan).reshape(()) for linear in names]
                    )
                    .max()
                    .reshape(1)
                    if static
                    else None
                )
                inputs[leaf] = ExpertInput(spec, scale)
        return [*swaps, Swap(module, "quantkit_inputs", inputs)] if swaps else []

    # -- Figures of each Linear.

    def know(self, blocks: int, figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """What an earlier run found in so many blocks: `layer_figures`, as JSON keeps it."""
        self._known_blocks = blocks
        self._figures = {
            int(place): {entry["name"]: dict(entry) for entry in entries}
            for place, entries in figures.items()
        }

    def look(self, number: int, block: nn.Module, run: Callable[[int], Tensor]) -> None:
        """Keep some rows of the inputs of a block's Linears, as the unquantized model has them: of
        the first windows, wherever they run.
        """
        self._inputs = None
        if number < self._known_blocks:
            return
        prefix, kept = self._model.block_name(number), {}
        seen: dict[int, dict[str, Tensor]] = {}

        def keeper(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                rows = arguments[0].reshape(-1, arguments[0].shape[-1])
                places = (
                    torch.linspace(0, rows.shape[0] - 1, min(SAMPLED_POSITIONS, rows.shape[0]))
                    .long()
                    .to(rows.device)
                )
                kept[name] = torch.cat([kept[name], rows[places]]) if name in kept else rows[places]

            return keep

        hooks = []
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                names = names_on_disk(
                    self._model.sources(f"{prefix}.{path}.weight"), f"{prefix}.{path}"
                )
                hooks += (
                    [module.register_forward_pre_hook(keeper(names[0]))] if len(names) == 1 else []
                )
        try:
            with one_thread():
                for window in [window for window in self.looked_at if window < SAMPLED_WINDOWS]:
                    run(window)
                    seen[window] = {name: rows.cpu() for name, rows in kept.items()}
                    kept.clear()
        finally:
            for hook in hooks:
                hook.remove()
        shares = self._ranks.all_gather(seen)
        of_windows = [
            rows
            for _, rows in sorted(
                (item for share in shares for item in share.items()), key=lambda item: item[0]
            )
        ]
        names = dict.fromkeys(name for rows in of_windows for name in rows)
        self._inputs = {
            name: torch.cat([rows[name] for rows in of_windows if name in rows]) for name in names
        }

    def _compare(
        self,
        place: int,
        name: str,
        linear: nn.Linear,
        weight: QuantizedTensor,
        made: QuantizedLinear,
    ) -> None:
        figures = {
            "name": name,
            "weight_sqnr_db": float(sqnr_db(linear.weight, weight.dequantize())),
        }
        rows = self._inputs.get(name)
        if rows is not None and rows.shape[0]:
            rows = rows.to(self._model.device)
            with one_thread():  # on one thread the result doesn't depend on how many there are
                figures["output_sqnr_db"] = float(sqnr_db(linear(rows), made(rows)))
        self._figures.setdefault(place, {})[name] = figures

    def layer_figures(self) -> dict[int, list[dict[str, Any]]]:
        """By the set's place: weight and output SQNR of each of its Linears."""
        return {place: list(layers.values()) for place, layers in self._figures.items()}


def _owner(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return block.get_submodule(parent), leaf


class _Nudged(nn.Module):
    """A Linear, one in twelve of whose outputs is a step of its dtype larger: what any small change
    does to the roundings behind it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.linear(inputs)
        draws = torch.rand(
            output.shape, generator=torch.Generator().manual_seed(output.shape[-2])
        ).to(output.device)
        larger = (output.float() * (1 + torch.finfo(output.dtype).eps)).to(output.dtype)
        return torch.where(draws < NUDGED, larger, output)


class _Weights(StoredWeights):
    """The checkpoint's tensors, or those that a calibration's codes were made from. rounded:
    tensors that are read as what their codes stand for.

    restacked: the stacks that transformers looks for, where the plan has their experts one by one.
    """

    def __init__(self, plan: ExportPlan, skeleton: nn.Module) -> None:
        super().__init__(plan.checkpoint, require_finite=True)
        self.restacked = Restacked.of(
            skeleton, [name.removesuffix(".weight") for name in plan.checkpoint.tensors]
        )
        self._plan, self._chosen = plan, plan.calibration.weights if plan.calibration else {}
        self.rounded: dict[str, QuantizedTensor] = {}
        self._rotation = Rotation(None, None)
        # by the weight's name on disk: how, and its norm's weight
        self._rotated: dict[str, tuple[RotatedLinear, str]] = {}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = super().shapes()
        merged = {f"{linear}.weight" for linear in self.restacked.parts()}
        added = {name: shapes[source] for name, source in self._plan.added.items()}
        return (
            {name: shape for name, shape in shapes.items() if name not in merged}
            | self.restacked.shapes
            | added
        )

    def rotate(self, model: BlockwiseModel) -> None:
        """Read weights as the calibration's rotation makes them, if it has one. Raises
        EvaluationError where it doesn't say how.
        """
        recipe, calibration = self._plan.options.recipe, self._plan.calibration
        if calibration is not None:
            calibration.require_recoverable()
        if calibration is None or not recipe.algorithm("rotation"):
            return
        self._rotation = make_rotation(
            recipe.algorithm("rotation"), model, calibration.description["seed"]
        )
        for entry in calibration.description["chosen"]["rotations"]:
            if "linears" not in entry:
                raise EvaluationError(
                    f"{calibration.path} doesn't say how its Linears were rotated, as an earlier"
                    " quantkit wrote it; calibrate again"
                )
            for path, fields in entry["linears"].items():
                how = RotatedLinear(**fields)
                weights = [
                    model.sources(f"{entry['block']}.{place}.weight")
                    for place in (path, how.norm or path)
                ]
                if None in weights:
                    raise EvaluationError(
                        f"{calibration.path} rotates {entry['block']}.{path}, which the model"
                        " doesn't have; calibrate again"
                    )
                name, norm = (source.lists[0][0] for source in weights)
                self._rotated[name] = how, norm

    def read(self, name: str) -> Tensor:
        if name in self.restacked.shapes:
            return self.restacked.read(name, lambda linear: self.read(f"{linear}.weight"))
        if name in self._plan.added:
            return read_tensor(self._chosen[name])
        stored = super().read(name)
        if name in self.rounded:
            return self.rounded[name].dequantize().to(stored.dtype)
        if name not in self._chosen:
            return stored
        linear = name.removesuffix(".weight")
        if f"{linear}.weight_scale" not in self._chosen:
            return read_tensor(self._chosen[name])
        values = self._plan.calibration.quantized_weight(
            linear, self._plan.linears[linear].scheme.weight
        ).dequantize()
        return recovered_weight(self._as_rotated(name, stored), values, name).to(stored.dtype)

    def _as_rotated(self, name: str, stored: Tensor) -> Tensor:
        if name not in self._rotated:
            return stored.float()
        how, norm = self._rotated[name]
        rotation = Rotation(
            *(
                None if matrix is None else matrix.cpu()
                for matrix in (self._rotation.stream, self._rotation.head)
            )
        )
        return how.apply(stored, rotation, super().read(norm) if how.norm else None)


def recovered_weight(original: Tensor, values: Tensor, name: str = "the weight") -> Tensor:
    """The weight R·W·C, R and C diagonal, that is nearest to the values of codes: what was
    quantized, where scales had been folded into W's rows and columns.

    original, values: [out_features, in_features] float32. Alternating least squares; each scale is
    an average over a whole row or column, so that the error of single codes hardly touches it.
    """
    rows, columns = torch.ones(original.shape[0], 1), torch.ones(1, original.shape[1])
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(8):
        scaled = original * rows
        columns = (scaled * values).sum(0, keepdim=True) / scaled.square().sum(
            0, keepdim=True
        ).clamp(min=tiny)
        scaled = original * columns
        rows = (scaled * values).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp(
            min=tiny
        )
    found = original * rows * columns
    if float(sqnr_db(found, values)) < LEAST_RECOVERED_DB:
        raise EvaluationError(
            f"the calibration's codes of {name} are not those of the model's weight with scaled"
            " rows and columns, so sets can't be scored one by one; calibrate again, or leave out"
            " --calibration to score rounding to nearest"
        )
    return found
