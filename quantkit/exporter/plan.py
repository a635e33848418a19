"""The plan of an export: what happens to each parameter. It is checked against the recipe, the
calibration, the checkpoint format and the runtime before a byte is written.

Planning needs only names, shapes and dtypes of the tensors, not their values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration.reader import Calibration
from quantkit.checkpoint.files import sha256_file
from quantkit.checkpoint.finished_output import CALIBRATION_FILE
from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS, KV_SUFFIXES, Format
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.exporter.ignore_targets import ignore_targets, patterns_outside_blocks
from quantkit.exporter.plan_calibration import open_calibration
from quantkit.exporter.plan_warnings import plan_warnings
from quantkit.models.assignment import (
    IGNORED,
    Assignment,
    QuantizedLinearInfo,
    assign_layers,
    refuse_taken_names,
)
from quantkit.models.tensor_roles import fused_layers
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme


@dataclass(frozen=True)
class ExportOptions:
    """The options of `export`.

    model: directory of the original model.
    output: directory to write.
    recipe: the recipe to apply.
    calibration: output directory of `calibrate`; None if the recipe needs none.
    runtime: a runtime that must be able to load the output, one of `serving.RUNTIMES`, or None.
    file_format: name of the checkpoint format, one of `checkpoint.formats.FORMATS`.
    max_shard_bytes: size limit of a shard, unless a single tensor is larger.
    resume: continue an interrupted export.
    overwrite: replace an existing output.
    allow_unreached: skip Linears that can't be quantized, instead of refusing the model.
    """

    model: Path
    output: Path
    recipe: Recipe
    calibration: Path | None = None
    runtime: str | None = None
    file_format: str = DEFAULT_FORMAT
    max_shard_bytes: int = 5_000_000_000
    resume: bool = False
    overwrite: bool = False
    allow_unreached: bool = False


@dataclass(frozen=True)
class ParameterPlan:
    """What happens to one parameter: a row of the plan.

    name: name of the tensor.
    status: "quantized"; "left" if it is skipped; "unreached" if it should be quantized but can't
        be.
    reason: how it is quantized, or why it isn't.
    scheme: the scheme; None if it isn't quantized.
    bytes_before: its size in the model, with its scales.
    bytes_after: its size in the output, with its scales.
    """

    name: str
    status: str
    reason: str
    scheme: QuantScheme | None
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "scheme": self.scheme.name if self.scheme else None,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class ExportPlan:
    """Everything that determines the output of an export.

    options: the user's options.
    checkpoint: the model, with each weight as [out_features, in_features] (`linear_views`).
    calibration: the opened calibration, or None.
    fingerprint: everything that the output's bytes depend on, by name, to resume.
    parameters: what happens to each parameter.
    linears: module name → quantized Linear.
    skipped: names of the skipped Linears, including a tied lm_head, and patterns for experts.
    warnings: one sentence each.
    block_scales: weight → tensor of its block scales, if the model is already in FP8 blocks.
    dense_dtype: safetensors dtype that such weights are dequantized to if they are skipped.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    calibration: Calibration | None
    fingerprint: dict[str, str]
    parameters: tuple[ParameterPlan, ...]
    linears: dict[str, QuantizedLinearInfo]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]
    block_scales: Mapping[str, str]
    dense_dtype: str

    @property
    def file_format(self) -> Format:
        return FORMATS[self.options.file_format]

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that algorithms changed or quantized."""
        return (
            [
                name
                for name in self.calibration.weights
                if name in self.checkpoint.tensors or name in self.added
            ]
            if self.calibration
            else []
        )

    @property
    def added(self) -> dict[str, str]:
        """Tensors that the model doesn't have, such as an untied lm_head → the tensor that they
        were tied to, whose dtype and shape they get.
        """
        return (
            {
                name: source
                for name, source in self.calibration.untied.items()
                if name not in self.checkpoint.tensors
            }
            if self.calibration
            else {}
        )

    @property
    def skipped_elsewhere(self) -> list[str]:
        """Patterns for skipped Linears next to the decoder blocks (`patterns_outside_blocks`)."""
        return patterns_outside_blocks(self.linears, self.skipped)

    @cached_property
    def fused_with(self) -> dict[str, tuple[str, ...]]:
        """Quantized Linear → the Linears that runtimes fuse it with, including itself."""
        alone = {name: (name,) for name in self.linears}
        fused = {member: members for members in fused_layers(self.linears) for member in members}
        return alone | fused

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "parameters": [row.to_json() for row in self.parameters],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "warnings": list(self.warnings),
        }

    @property
    def bytes_before(self) -> int:
        """Size of the model's tensors."""
        return sum(row.bytes_before for row in self.parameters)

    @property
    def bytes_after(self) -> int:
        """Size of the output's tensors."""
        return sum(row.bytes_after for row in self.parameters)


def plan_export(
    options: ExportOptions, calibration_follows: bool = False, checkpoint: Checkpoint | None = None
) -> ExportPlan:
    """Plan an export.

    calibration_follows: plan without a calibration, because it will be made afterwards.
    checkpoint: the opened model, if it is open already.

    Raises:
        CheckpointError: the model can't be quantized.
        RecipeError: the recipe doesn't fit the model.
        CalibrationError: the calibration is missing, or belongs to another model or recipe.
        RuntimeLimitError: `options.runtime` can't load the output.
    """
    checkpoint = checkpoint or Checkpoint.open(options.model)
    recipe, file_format = options.recipe, FORMATS[options.file_format]
    assignment = assign_layers(checkpoint, recipe, options.file_format, options.allow_unreached)
    skipped = ignore_targets(assignment)
    warnings = plan_warnings(recipe, assignment, skipped, options.file_format, options.runtime)
    fingerprint, calibration = checkpoint.fingerprint(), None
    if not calibration_follows:
        calibration = open_calibration(
            options.calibration,
            recipe,
            options.model,
            assignment.checkpoint,
            fingerprint,
            assignment.linears,
        )
    if recipe.kv_cache and calibration:
        refuse_taken_names(assignment, _kv_scale_names(calibration, file_format))
    dense_dtype = _dense_dtype(checkpoint)
    plan = ExportPlan(
        options,
        assignment.checkpoint,
        calibration,
        _fingerprint(options, assignment.checkpoint, fingerprint, calibration),
        tuple(_parameter_plans(assignment, file_format, dense_dtype)),
        dict(assignment.linears),
        tuple(skipped),
        tuple(warnings),
        assignment.block_scales,
        dense_dtype,
    )
    return replace(plan, parameters=(*plan.parameters, *_untied_parameters(plan)))


def _kv_scale_names(calibration: Calibration, file_format: Format) -> set[str]:
    """The tensors that an FP8 KV cache adds to the checkpoint."""
    return {
        file_format.kv_scale_name(module, suffix)
        for module in calibration.kv_amax
        for suffix in KV_SUFFIXES
    }


def _untied_parameters(plan: ExportPlan) -> list[ParameterPlan]:
    """Rows for tensors that were tied to another one, and that algorithms changed."""
    tensors = plan.checkpoint.tensors
    return [
        ParameterPlan(name, "left", f"no longer {source}", None, 0, tensors[source].nbytes)
        for name, source in plan.added.items()
    ]


def _fingerprint(
    options: ExportOptions, checkpoint: Checkpoint, model: str, calibration: Calibration | None
) -> dict[str, str]:
    """Everything that the output's bytes depend on. model: fingerprint of the model's contents."""
    return {
        "model": model,
        "model files": file_times(checkpoint),
        "recipe": options.recipe.canonical(),
        "format": options.file_format,
        "quantkit version": __version__,
        "torch version": version("torch"),
        "calibration": sha256_file(calibration.path / CALIBRATION_FILE) if calibration else "",
        "shard size": str(options.max_shard_bytes),
    }


def file_times(checkpoint: Checkpoint) -> str:
    """A hash of the shards' sizes and modification times. It finds edits that the fingerprint may
    miss, because that reads only samples of the contents.
    """
    if checkpoint.identity is not None:
        return ""
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.shard_paths
    ]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _dense_dtype(checkpoint: Checkpoint) -> str:
    """The safetensors dtype of the model's unquantized weights, by its config."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return names.get(
        str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix(
            "torch."
        ),
        "BF16",
    )


def _parameter_plans(
    assignment: Assignment, file_format: Format, dense_dtype: str
) -> list[ParameterPlan]:
    """A row for each parameter of the model."""
    rows, tensors, scales = [], assignment.checkpoint.tensors, assignment.block_scales
    for tensor, role in assignment.roles.items():
        before = after = tensors[tensor].nbytes
        reason = assignment.reasons.get(tensor, role.reason)
        if tensor in scales:
            before += tensors[scales[tensor]].nbytes
            after = TensorPlan(tensor, dense_dtype, role.shape).nbytes
            reason += f"; FP8 blocks become {dense_dtype}"
        linear = assignment.linears.get(role.name) if tensor.endswith(".weight") else None
        if linear is not None:
            after = sum(plan.nbytes for plan in linear.tensors(file_format))
            rows.append(
                ParameterPlan(
                    tensor, "quantized", str(linear.scheme.weight), linear.scheme, before, after
                )
            )
        else:
            is_unreached = role.kind == "unreached" and not reason.startswith(IGNORED)
            rows.append(
                ParameterPlan(
                    tensor, "unreached" if is_unreached else "left", reason, None, before, after
                )
            )
    return rows
