"""The plan of an export: what becomes of every parameter, decided and checked before a byte is
written.

It is made from names, shapes and dtypes alone, and against the recipe, the calibration, the format
and the runtime.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration.results import Calibration
from quantkit.checkpoint.files import sha256_file
from quantkit.checkpoint.finished_output import CALIBRATION_FILE
from quantkit.checkpoint.formats import DEFAULT_FORMAT, FORMATS, KV_SUFFIXES, Format
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.shard_plan import TensorPlan
from quantkit.errors import CalibrationError, RuntimeLimitError
from quantkit.exporter.runtimes import runtime_problems
from quantkit.models.assignment import (
    IGNORED,
    SHAPE,
    Assignment,
    QuantizedLinearInfo,
    assign_layers,
    more,
    refuse_taken_names,
)
from quantkit.models.linear_views import experts_module
from quantkit.models.tensor_roles import fused_layers, is_of_other_tower
from quantkit.schemes.pattern import BLOCK
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme
from quantkit.schemes.serving import RUNTIMES


@dataclass(frozen=True)
class ExportOptions:
    """What `export` is asked for.

    model, output: directories.
    calibration: the CALIB directory, where the recipe needs one.
    runtime: refuse what this runtime can't load.
    file_format: one of `checkpoint.formats.FORMATS`, by its name.
    max_shard_bytes: a shard that would grow beyond it starts a new file.
    allow_unreached: skip what should be quantized but can't be, instead of refusing the model.
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
    """What becomes of one parameter: a row of `export --dry-run`.

    name: the tensor's.
    status: "quantized"; "left", if it is skipped; or "unreached", if it should be quantized but
        can't be.
    reason: how, or why not.
    bytes_before, bytes_after: with its scales.
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
    """Everything that decides the output, before its first byte.

    checkpoint: with a view of each quantized weight (`linear_views`).
    fingerprint: everything that the output's bytes depend on, as text, for `--resume`.
    parameters: a row for each parameter.
    linears: module name → quantized Linear.
    left: names of the Linears that are skipped, lm_head among them.
    warnings: one sentence each.
    block_scales: weight → the tensor of its block scales, where the input is in FP8 blocks already.
    dense_dtype: the safetensors dtype that such weights get if they are skipped.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    calibration: Calibration | None
    fingerprint: dict[str, str]
    parameters: tuple[ParameterPlan, ...]
    linears: dict[str, QuantizedLinearInfo]
    left: tuple[str, ...]
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
        """Tensors that the checkpoint doesn't have, and whose dtype and shape they get: an output
        head that was tied to the embedding.
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
        """Patterns for skipped Linears outside the decoder blocks: a runtime may have them in
        another module (vLLM keeps Gemma 3n's projections in its `self_decoder`).
        """
        block = next(filter(None, map(BLOCK.match, self.linears)), None)
        if block is None:
            return []
        parent = block["prefix"][: block["prefix"].rfind(".") + 1]
        outside = [
            name
            for name in self.left
            if name.startswith(parent)
            and not name.startswith((f"{block['prefix']}.", "re:", "lm_head"))
        ]
        return [
            rf"re:.*\.{re.escape(name.removeprefix(parent))}$"
            for name in outside
            if not is_of_other_tower(name)
        ]

    @cached_property
    def fused_with(self) -> dict[str, tuple[str, ...]]:
        """Quantized Linear → the Linears that runtimes fuse it with, itself among them."""
        return {member: members for members in fused_layers(self.linears) for member in members}

    def to_json(self) -> dict[str, Any]:
        """What `export --dry-run --json` prints."""
        return {
            "parameters": [row.to_json() for row in self.parameters],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "warnings": list(self.warnings),
        }

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.parameters)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.parameters)


def plan_export(
    options: ExportOptions, calibration_follows: bool = False, checkpoint: Checkpoint | None = None
) -> ExportPlan:
    """Decide what becomes of every parameter, and refuse what can't be done.

    calibration_follows: plan before the calibration that the export will need is made.
    checkpoint: options.model where it is open already. Raises CheckpointError, RecipeError,
    CalibrationError or RuntimeLimitError with one sentence.
    """
    checkpoint, file_format = (
        checkpoint or Checkpoint.open(options.model),
        FORMATS[options.file_format],
    )
    assignment = assign_layers(
        checkpoint, options.recipe, options.file_format, options.allow_unreached
    )
    linears, left = assignment.linears, _skipped_linears(assignment)
    warnings = (
        _shape_warnings(assignment.reasons)
        + _runtime_warnings(options, assignment, left)
        + _observer_warnings(options.recipe, linears)
    )
    model = checkpoint.fingerprint()
    calibration = (
        None
        if calibration_follows
        else _calibration_for(options, assignment.checkpoint, model, linears)
    )
    if options.recipe.kv_cache and calibration:
        made = {
            file_format.kv_scale_name(module, suffix)
            for module in calibration.kv_amax
            for suffix in KV_SUFFIXES
        }
        refuse_taken_names(assignment, made)
    dense_dtype = _dense_dtype(checkpoint)
    parameters = _parameter_plans(assignment, file_format, dense_dtype)
    plan = ExportPlan(
        options,
        assignment.checkpoint,
        calibration,
        _fingerprint(options, assignment.checkpoint, model, calibration),
        tuple(parameters),
        dict(linears),
        tuple(left),
        tuple(warnings),
        assignment.block_scales,
        dense_dtype,
    )
    untied = [
        ParameterPlan(
            name, "left", f"no longer {source}", None, 0, plan.checkpoint.tensors[source].nbytes
        )
        for name, source in plan.added.items()
    ]
    return replace(plan, parameters=(*plan.parameters, *untied))


def _fingerprint(
    options: ExportOptions, checkpoint: Checkpoint, model: str, calibration: Calibration | None
) -> dict[str, str]:
    """model: the fingerprint of the checkpoint's contents."""
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
    """Sizes and times of the shards. The fingerprint of their contents is taken from samples, and
    an edit in place may fall between two samples.
    """
    if checkpoint.identity is not None:
        return ""
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.shard_paths
    ]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _dense_dtype(checkpoint: Checkpoint) -> str:
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return names.get(
        str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix(
            "torch."
        ),
        "BF16",
    )


def _shape_warnings(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for all Linears that are skipped because of their shape."""
    left = [tensor for tensor, reason in reasons.items() if reason.startswith(SHAPE)]
    return [f"{left[0]}{more(len(left))} stays unquantized, {reasons[left[0]]}"] if left else []


def _skipped_linears(assignment: Assignment) -> list[str]:
    """Names for the config's `ignore`: everything that may be a Linear in a runtime and is not
    quantized.
    """
    roles, linears = assignment.roles.values(), assignment.linears
    kinds = (
        "linear",
        "lm_head",
        "router",
        "outside the blocks",
        "other tower",
        "used directly",
        "unreached",
    )
    left = [
        role.name
        for role in roles
        if role.kind in kinds
        and len(role.shape) >= 2
        and role.tensor.endswith(".weight")
        and role.name not in linears
    ]
    # Runtimes have experts as modules, whatever they are stored in: one pattern for all of a
    # layer's.
    stacks = dict.fromkeys(
        experts_module(role.tensor)
        for role in roles
        if len(role.shape) == 3 and role.kind in ("linear", "unreached")
    )
    left += [
        rf"re:{re.escape(module)}\..*"
        for module in stacks
        if not any(name.startswith(f"{module}.") for name in linears)
    ]
    # A tied lm_head has no tensor, yet runtimes have the module.
    return left if "lm_head" in left or "lm_head" in linears else [*left, "lm_head"]


def _runtime_warnings(
    options: ExportOptions, assignment: Assignment, left: Sequence[str]
) -> list[str]:
    linears, file_format = assignment.linears.values(), options.file_format
    if options.runtime is not None:
        problems = runtime_problems(
            options.runtime, linears, left, file_format, assignment.checkpoint
        )
        if problems:
            raise RuntimeLimitError(problems[0] + more(len(problems)))
        return []
    return [
        problem
        for name in RUNTIMES
        for problem in runtime_problems(name, linears, left, file_format)
    ]


def _observer_warnings(recipe: Recipe, linears: Mapping[str, QuantizedLinearInfo]) -> list[str]:
    if recipe.observer.kind == "absmax":
        return []
    inputs = [linear.scheme.input for linear in linears.values()]
    static = [spec for spec in inputs if spec is not None and not spec.dynamic]
    if not static:
        return [
            f"the observer {recipe.observer} changes nothing: no scheme here has static input"
            " scales"
        ]
    if recipe.observer.kind == "percentile" and any(spec.format.kind == "float" for spec in static):
        return [
            f"the observer {recipe.observer} clips inputs that FP8 has range for; absmax or mse"
            " usually loses less"
        ]
    return []


def _calibration_for(
    options: ExportOptions,
    checkpoint: Checkpoint,
    model: str,
    linears: Mapping[str, QuantizedLinearInfo],
) -> Calibration | None:
    static = [linear for linear in linears.values() if linear.scheme.needs_calibration]
    if options.calibration is None:
        if options.recipe.quantizes_weights:
            names = " and ".join(algorithm.name for algorithm in options.recipe.algorithms)
            raise CalibrationError(
                f"the recipe's algorithms ({names}) run during calibration; first: quantkit"
                f" calibrate {shlex.quote(str(options.model))} -o CALIB --recipe RECIPE, then pass"
                " --calibration CALIB"
            )
        if static or options.recipe.kv_cache:
            what = (
                f"{static[0].scheme.name} has static input scales, which"
                if static
                else "an FP8 KV cache has scales, which"
            )
            raise CalibrationError(
                f"{what} have to be measured; first: quantkit calibrate"
                f" {shlex.quote(str(options.model))} -o CALIB, then pass --calibration CALIB"
            )
        return None
    calibration = Calibration.open(options.calibration)
    calibration.require_same_model(checkpoint, model)
    calibration.require_same_recipe(options.recipe)
    calibration.require_weights(
        {name: (linear.shape, linear.scheme.weight) for name, linear in linears.items()}, checkpoint
    )
    for linear in static:
        statistics = calibration.inputs.get(linear.name)
        if statistics is None or not (statistics.tokens or statistics.amax):
            raise CalibrationError(
                f"{calibration.path} has no statistics of {linear.name}'s input; leave it with"
                " --ignore, or give it a dynamic scheme"
            )
        if statistics.in_features != linear.shape[1]:
            raise CalibrationError(
                f"{calibration.path} saw {statistics.in_features} input features at {linear.name},"
                f" which has {linear.shape[1]}; calibrate again"
            )
    if options.recipe.kv_cache and not calibration.kv_amax:
        raise CalibrationError(
            f"{calibration.path} has no statistics of keys and values; this model keeps no ordinary"
            " KV cache, so leave out --kv-cache"
        )
    return calibration


def _parameter_plans(
    assignment: Assignment, file_format: Format, dense_dtype: str
) -> list[ParameterPlan]:
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
