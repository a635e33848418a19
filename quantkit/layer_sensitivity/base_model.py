"""The unquantized model that variants start from, and the names of its Linears on disk.

A calibration may hold weights that algorithms quantized. The base model then has the weights before
rounding. Algorithms fold scales per channel into weights, and these scales are recovered from the
codes. If the calibration rotated the model, its weights are first rotated again, with the same
matrices (they follow from the seed) and as the calibration describes for each Linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.algorithms.rotation import Rotation
from quantkit.calibration.rotate import make_rotation
from quantkit.calibration.rotate_block import RotatedLinear
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.errors import EvaluationError
from quantkit.evaluation.quantized_experts import EXPERTS_IMPLEMENTATION, register_serving_experts
from quantkit.exporter.plan import ExportPlan
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.experts import Restacked, is_experts, stack_names
from quantkit.models.skeleton import StoredWeights, build_skeleton
from quantkit.models.weight_map import names_on_disk
from quantkit.ops.reference import QuantizedTensor, sqnr_db

# The least SQNR of codes against the recovered weight: 8-bit codes have 30 dB and more against the
# weight that they were rounded from.
LEAST_RECOVERED_DB = 20.0


@dataclass(frozen=True)
class BaseModel:
    """The unquantized model.

    blocks: the model, whose blocks are read from disk; each can run once.
    weights: the source of its tensors.
    """

    blocks: BlockwiseModel
    weights: BaseWeights

    def linear_name(self, path: str) -> str | None:
        """The name on disk of a Linear of the module tree; None if several tensors make it up."""
        names = names_on_disk(self.blocks.sources(f"{path}.weight"), path)
        return names[0] if len(names) == 1 else None

    def linears_of(self, number: int) -> list[str]:
        """The names on disk of a block's Linears, including those that transformers stacks."""
        prefix = self.blocks.block_name(number)
        names: list[str] = []
        for leaf, module in self.blocks.model.get_submodule(prefix).named_modules():
            path = f"{prefix}.{leaf}"
            if isinstance(module, nn.Linear):
                names += names_on_disk(self.blocks.sources(f"{path}.weight"), path)
            elif is_experts(module):
                for stack in stack_names(module):
                    names += self.stacked_linears(f"{path}.{stack}")
        return names

    def stacked_linears(self, stack: str) -> list[str]:
        """The Linears on disk, or written by `export`, that make up a stacked parameter."""
        source = self.blocks.sources(stack)
        if source is None:
            return [stack]
        return [
            linear
            for tensors in source.lists
            for tensor in tensors
            for linear in self.weights.restacked.names(tensor)
        ]


def open_base_model(plan: ExportPlan, trust_remote_code: bool, device: str) -> BaseModel:
    """plan: the recipe's plan, whose calibration may have changed weights.

    Raises CheckpointError if blocks share weights.
    """
    register_serving_experts()
    skeleton = build_skeleton(
        plan.checkpoint,
        trust_remote_code,
        bool(plan.added),
        experts_implementation=EXPERTS_IMPLEMENTATION,
    )
    weights = BaseWeights(plan, skeleton)
    blocks = BlockwiseModel(skeleton, weights, str(plan.options.model), device)
    blocks.require_unshared()
    weights.rotate(blocks)
    return BaseModel(blocks, weights)


class BaseWeights(StoredWeights):
    """The checkpoint's tensors, or those that a calibration's codes were rounded from.

    restacked: the stacked experts that transformers expects, if the plan has experts one by one.
    """

    def __init__(self, plan: ExportPlan, skeleton: nn.Module) -> None:
        super().__init__(plan.checkpoint, require_finite=True)
        self.restacked = Restacked.of(
            skeleton, [name.removesuffix(".weight") for name in plan.checkpoint.tensors]
        )
        self._plan, self._calibration = plan, plan.calibration
        self._changed = plan.calibration.weights if plan.calibration else {}
        self._rotation = Rotation(None, None)
        # by the weight's name on disk: how it is rotated, and the name of its norm's weight
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

    def rotate(self, blocks: BlockwiseModel) -> None:
        """Rotate weights as the calibration did, if it rotated the model.

        Raises EvaluationError if the calibration doesn't describe how.
        """
        settings, calibration = self._plan.options.recipe.algorithm("rotation"), self._calibration
        if calibration is not None:
            calibration.require_recoverable()
        if calibration is None or not settings:
            return
        rotation = make_rotation(settings, blocks, calibration.description["seed"])
        self._rotation = Rotation(_on_cpu(rotation.stream), _on_cpu(rotation.head))
        for entry in calibration.description["chosen"]["rotations"]:
            if "linears" not in entry:
                raise EvaluationError(
                    f"{calibration.path} doesn't describe how its Linears were rotated, because an"
                    " earlier quantkit wrote it; calibrate again"
                )
            for path, fields in entry["linears"].items():
                how = RotatedLinear(**fields)
                weight, norm = (
                    blocks.sources(f"{entry['block']}.{place}.weight")
                    for place in (path, how.norm or path)
                )
                if weight is None or norm is None:
                    raise EvaluationError(
                        f"{calibration.path} rotates {entry['block']}.{path}, which the model"
                        " doesn't have; calibrate again"
                    )
                self._rotated[weight.lists[0][0]] = how, norm.lists[0][0]

    def read(self, name: str) -> Tensor:
        return self.read_rounded(name, {})

    def read_rounded(self, name: str, codes: Mapping[str, QuantizedTensor]) -> Tensor:
        """A tensor in which some Linears' weights are replaced by the values of codes.

        codes: by the Linear's name on disk.
        """
        if name in self.restacked.shapes:
            return self.restacked.read(
                name, lambda linear: self.read_rounded(f"{linear}.weight", codes)
            )
        if name in self._plan.added:
            return read_tensor(self._changed[name])
        stored, linear = super().read(name), name.removesuffix(".weight")
        if linear in codes:
            return codes[linear].dequantize().to(stored.dtype)
        if self._calibration is None or name not in self._changed:
            return stored
        found = None
        if linear in self._plan.linears:
            spec = self._plan.linears[linear].scheme.weight
            found = self._calibration.quantized_weight(linear, spec)
        if found is None:
            return read_tensor(self._changed[name])
        rotated = self._as_rotated(name, stored)
        return recovered_weight(rotated, found.dequantize(), name).to(stored.dtype)

    def _as_rotated(self, name: str, stored: Tensor) -> Tensor:
        if name not in self._rotated:
            return stored.float()
        how, norm = self._rotated[name]
        return how.apply(stored, self._rotation, super().read(norm) if how.norm else None)


def _on_cpu(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.cpu()


def recovered_weight(original: Tensor, values: Tensor, name: str = "the weight") -> Tensor:
    """The weight R·W·C, with diagonal R and C, that is nearest to the values of codes.

    It is the weight that was quantized, if scales had been folded into W's rows and columns. Found
    by alternating least squares. Each scale is an average over a whole row or column, so the error
    of single codes hardly affects it.

    original, values: [out_features, in_features] float32.
    Raises EvaluationError if no such weight is near.
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
            " rows and columns, so layer groups can't be scored one by one",
            hint="calibrate again, or leave out `calibration` to score rounding to nearest",
        )
    return found
