"""The plan of an export: what becomes of every parameter, decided and checked before a byte is written.

It is made from names, shapes and dtypes alone, and against the recipe, the calibration, the format and the runtime.
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
from quantkit.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, CheckpointError, RecipeError, RuntimeLimitError
from quantkit.layouts import QuantizationLayout, format_obstacle, kv_scale_name, linear_tensors, shape_obstacle
from quantkit.matrices import as_matrices, as_stored_where_left, experts_module, find_stacks
from quantkit.measurements import Calibration
from quantkit.model import BLOCK, ModuleInfo, classify_tensors, fused_sets, is_of_other_tower
from quantkit.output import CALIBRATION_FILE, TensorPlan, sha256_file
from quantkit.runtimes import RUNTIMES, QuantizedLinearInfo, runtime_problems
from quantkit.scheme import TENSOR, Pattern, QuantScheme, Recipe
from quantkit.streaming import block_scales
from quantkit.task import task_of

FLOATS = ("BF16", "F16", "F32")
_IGNORED = "ignored by"


@dataclass(frozen=True)
class ExportOptions:
    """layout: the format of the files, one of `layouts.FORMATS`. allow_unreached: leave what should be quantized but can't be, instead of refusing the model."""

    model: Path
    output: Path
    recipe: Recipe
    calibration: Path | None = None
    runtime: str | None = None
    layout: str = "compressed-tensors"
    max_shard_bytes: int = 5_000_000_000
    resume: bool = False
    overwrite: bool = False
    allow_unreached: bool = False


@dataclass(frozen=True)
class ParameterPlan:
    """What becomes of one parameter: a row of `export --dry-run`. status: "quantized", "left" or "unreached"."""

    name: str
    status: str
    reason: str
    scheme: QuantScheme | None
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "status": self.status, "reason": self.reason, "scheme": self.scheme.name if self.scheme else None,
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
        }  # fmt: skip


@dataclass(frozen=True)
class ExportPlan:
    """Everything that decides the output, before its first byte.

    checkpoint: with each Linear as one matrix (`matrices.as_matrices`).
    block_scales: weight → the tensor of its block scales, where the input is FP8 block already. dense_dtype: what such weights become if they
    are left.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    calibration: Calibration | None
    fingerprint: dict[str, str]
    parameters: tuple[ParameterPlan, ...]
    linears: dict[str, QuantizedLinearInfo]  # the quantized ones, by module name
    left: tuple[str, ...]  # Linears that stay, lm_head among them
    warnings: tuple[str, ...]
    block_scales: Mapping[str, str]
    dense_dtype: str

    @property
    def changed(self) -> list[str]:
        """Tensors of the checkpoint that algorithms changed, and Linears whose codes they chose, by the names that they have there."""
        return [name for name in self.calibration.weights if name in self.checkpoint.tensors or name in self.added] if self.calibration else []

    @property
    def added(self) -> dict[str, str]:
        """Tensors that the checkpoint doesn't have, and whose dtype and shape they get: an output head that was tied to the embedding."""
        return {name: source for name, source in self.calibration.untied.items() if name not in self.checkpoint.tensors} if self.calibration else {}

    @property
    def left_elsewhere(self) -> list[str]:
        """Patterns for Linears that stay beside the decoder blocks: a runtime may have them in another module (vLLM keeps Gemma 3n's projections in its `self_decoder`)."""
        block = next(filter(None, map(BLOCK.match, self.linears)), None)
        if block is None:
            return []
        parent = block["prefix"][: block["prefix"].rfind(".") + 1]
        beside = [name for name in self.left if name.startswith(parent) and not name.startswith((f"{block['prefix']}.", "re:", "lm_head"))]
        return [rf"re:.*\.{re.escape(name.removeprefix(parent))}$" for name in beside if not is_of_other_tower(name)]

    @cached_property
    def fused_with(self) -> dict[str, tuple[str, ...]]:
        """Quantized Linear → the fused set that it is a member of, if it is."""
        return {member: members for members in fused_sets(self.linears) for member in members}

    def to_json(self) -> dict[str, Any]:
        """What `export --dry-run --json` prints."""
        return {
            "parameters": [row.to_json() for row in self.parameters], "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "warnings": list(self.warnings),
        }  # fmt: skip

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.parameters)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.parameters)


def plan_export(options: ExportOptions, calibration_follows: bool = False, checkpoint: Checkpoint | None = None) -> ExportPlan:
    """Decide what becomes of every parameter, and refuse what can't be done.

    calibration_follows: the plan is looked at before the calibration that it will need is made. checkpoint: options.model where it is open already.
    Raises CheckpointError, RecipeError, CalibrationError or RuntimeLimitError with one sentence.
    """
    recipe, checkpoint = options.recipe, checkpoint or Checkpoint.open(options.model)
    task_of(checkpoint.config, options.model)
    layout = QuantizationLayout.read(checkpoint.config)
    if layout is not None and layout.method != "fp8":
        raise CheckpointError(f"{options.model} is quantized already ({layout.method}); export from the original model, or from one in FP8 blocks")
    obstacle = format_obstacle(options.layout, recipe.schemes, recipe.kv_cache is not None)
    if obstacle:
        raise RecipeError(obstacle)
    stored, checkpoint = checkpoint, as_matrices(checkpoint)
    scales = block_scales(checkpoint)
    consumed = set(scales.values())
    infos = classify_tensors({name: info.shape for name, info in checkpoint.tensors.items() if name not in consumed})
    _refuse_unreached(options, infos)
    schemes, reasons = _assign(recipe, infos, checkpoint, _stack_names(stored))
    checkpoint, whole = as_stored_where_left(stored, checkpoint, {f"{module}.weight" for module in schemes})
    infos = {
        name: infos.get(name) or replace(infos[whole[name]], name=name.removesuffix(".weight"), tensor=name, shape=info.shape)
        for name, info in checkpoint.tensors.items()
        if name not in consumed
    }
    reasons |= {name: reasons[part] for name, part in whole.items() if part in reasons}
    turned = {name for name, info in checkpoint.tensors.items() if name in stored.tensors and not info.is_dense}
    linears = {
        module: QuantizedLinearInfo(module, checkpoint.tensors[f"{module}.weight"].shape, scheme, f"{module}.weight" in turned)
        for module, scheme in schemes.items()
    }
    _refuse_dtypes(checkpoint, infos, linears, scales)
    left = _left_linears(infos, linears, checkpoint)
    warnings = _shape_warnings(reasons) + _runtime_warnings(options, checkpoint, linears, left) + _observer_warnings(recipe, linears)
    fingerprint = {
        "model": stored.fingerprint(),
        "model files": file_times(checkpoint),
        "recipe": recipe.canonical(),
        "format": options.layout,
        "quantkit version": __version__,
        "torch version": version("torch"),
    }
    calibration = None if calibration_follows else _calibration_for(options, checkpoint, fingerprint["model"], linears)
    fingerprint["calibration"] = sha256_file(calibration.path / CALIBRATION_FILE) if calibration else ""
    fingerprint["shard size"] = str(options.max_shard_bytes)
    dense_dtype = _dense_dtype(checkpoint)
    parameters = _parameter_plans(checkpoint, options.layout, infos, linears, reasons, scales, dense_dtype)
    _refuse_clashes(options, checkpoint, linears, calibration, scales)
    plan = ExportPlan(options, checkpoint, calibration, fingerprint, tuple(parameters), linears, tuple(left), tuple(warnings), scales, dense_dtype)
    untied = [ParameterPlan(name, "left", f"no longer {source}", None, 0, checkpoint.tensors[source].nbytes) for name, source in plan.added.items()]
    return replace(plan, parameters=(*plan.parameters, *untied))


def _refuse_clashes(
    options: ExportOptions, checkpoint: Checkpoint, linears: Mapping[str, QuantizedLinearInfo], calibration: Calibration | None, scales: Mapping[str, str]
) -> None:
    """Refuse where the checkpoint has a tensor of the name of one that would be made."""
    made = {plan.name for linear in linears.values() for plan in linear_plans(linear, options.layout)}
    if options.recipe.kv_cache and calibration:
        made |= {kv_scale_name(module, suffix, options.layout) for module in calibration.kv_amax for suffix in ("k_scale", "v_scale")}
    kept = set(checkpoint.tensors) - {f"{name}.weight" for name in linears} - set(scales.values())
    for name in sorted(made & kept):
        raise CheckpointError(f"{options.model} holds a tensor {name} already; export from the original model")


def file_times(checkpoint: Checkpoint) -> str:
    """Sizes and times of the shards: the fingerprint of their contents is taken from samples, and an edit in place may lie between them."""
    if checkpoint.identity is not None:
        return ""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.shard_paths]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _refuse_dtypes(checkpoint: Checkpoint, infos: Mapping[str, ModuleInfo], linears: Mapping[str, QuantizedLinearInfo], scales: Mapping[str, str]) -> None:
    for name in linears:
        dtype = checkpoint.tensors[f"{name}.weight"].dtype
        if dtype not in FLOATS and f"{name}.weight" not in scales:
            raise CheckpointError(f"{name}.weight is stored as {dtype}; quantkit quantizes bfloat16, float16 and float32 weights, and FP8 in blocks")
    for tensor in infos:
        if checkpoint.tensors[tensor].dtype.startswith("F8_") and tensor not in scales:
            raise CheckpointError(f"{tensor} holds FP8 codes, but config.json has no quantization_config that says how; export from the original model")


def _dense_dtype(checkpoint: Checkpoint) -> str:
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return names.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch."), "BF16")


def _stack_names(stored: Checkpoint) -> dict[str, str]:
    """A part of a stack of experts → the stack, under whose name it can be ignored too."""
    stacks = find_stacks({name: info.shape for name, info in stored.tensors.items()})
    return {
        stack.linear(expert, leaf): name.removesuffix(".weight") for name, stack in stacks.items() for expert in range(stack.shape[0]) for leaf in stack.leaves
    }


def _assign(
    recipe: Recipe, infos: Mapping[str, ModuleInfo], checkpoint: Checkpoint, stack_of: Mapping[str, str]
) -> tuple[dict[str, QuantScheme], dict[str, str]]:
    """Module → scheme of what is quantized, and tensor → reason of what would be but isn't. stack_of: the other name of experts that are stored as one."""
    modules = {info.name: info for info in infos.values() if info.tensor.endswith(".weight")}
    tied = "lm_head" not in modules and checkpoint.config.get("tie_word_embeddings")
    for pattern in recipe.ignore:
        # A tied lm_head has no tensor of its own, but recipes name it to be safe.
        pattern.require_match([*modules, *infos, *stack_of.values(), *(["lm_head"] if tied else [])], "ignore")
    for pattern, _ in recipe.layers:
        if tied and pattern.matches("lm_head") and not any(pattern.matches(name) for name in modules):
            raise RecipeError(
                f"the layer pattern '{pattern.text}' means lm_head, which is tied to the embedding here and has no weight of its own; leave the entry out"
            )
        pattern.require_match(modules, "layer")
    schemes: dict[str, QuantScheme] = {}
    reasons: dict[str, str] = {}
    used: set[Pattern] = set()
    for name, info in modules.items():
        entry = next(((pattern, scheme) for pattern, scheme in recipe.layers if pattern.matches(name)), None)
        names = (name, info.tensor, stack_of.get(name, name))
        ignored = next((pattern for pattern in recipe.ignore if any(map(pattern.matches, names))), None)
        if ignored is not None:
            reasons[info.tensor] = f"{_IGNORED} '{ignored.text}'"
            continue
        if info.kind == "linear":
            scheme = entry[1] if entry else recipe.scheme
        elif entry and info.kind in ("lm_head", "router", "outside the blocks", "other tower") and len(info.shape) == 2:
            scheme = entry[1]
        elif entry and info.kind != "unreached":
            raise RecipeError(f"the layer pattern '{entry[0].text}' matches {name}, which is no Linear ({info.reason}); narrow the pattern")
        else:
            continue
        if entry:
            used.add(entry[0])
        if 0 in info.shape:
            raise CheckpointError(f"{info.tensor} has the empty shape {list(info.shape)}, so it can't be quantized; leave it out of the recipe's layers")
        obstacle = shape_obstacle(scheme, info.shape)
        if obstacle:
            reasons[info.tensor] = f"left because of its shape: {obstacle}"
        else:
            schemes[name] = scheme
    for tensor, info in infos.items():
        if info.kind == "unreached":
            ignored = next((pattern for pattern in recipe.ignore if pattern.matches(info.name) or pattern.matches(tensor)), None)
            reasons[tensor] = f"{_IGNORED} '{ignored.text}', and out of reach: {info.reason}" if ignored else f"out of reach: {info.reason}"
    for pattern, _ in recipe.layers:
        if pattern not in used:
            raise RecipeError(
                f"the layer pattern '{pattern.text}' never applies: an earlier entry or 'ignore' takes all that it matches; reorder them or leave it out"
            )
    for members in fused_sets([name for name, info in modules.items() if info.kind == "linear"]):
        theirs = {schemes.get(member) for member in members}
        one_scale = any(scheme and (scheme.needs_calibration or scheme.weight.granularity == TENSOR) for scheme in theirs)
        if one_scale and len(theirs) > 1:
            raise RecipeError(f"runtimes merge {', '.join(members)} and give them one scale; give them one scheme")
    if not schemes:
        why = next(iter(reasons.values()), "it has no Linear in numbered decoder blocks")
        raise RecipeError(f"this recipe quantizes nothing in {checkpoint.path}: {why}")
    return schemes, reasons


def _refuse_unreached(options: ExportOptions, infos: Mapping[str, ModuleInfo]) -> None:
    """What should be quantized but can't be is an error unless it is ignored by name, or all of it is allowed: a half-quantized model is no result."""
    ignore = options.recipe.ignore
    unreached = [i for i in infos.values() if i.kind == "unreached" and not any(p.matches(i.tensor) or p.matches(i.name) for p in ignore)]
    if unreached and not options.allow_unreached:
        raise CheckpointError(
            f"{unreached[0].tensor} can't be quantized by this version: {unreached[0].reason}{_more(len(unreached))}; "
            "add it to --ignore, or pass --allow-unreached to leave all such as they are"
        )


def _shape_warnings(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for all Linears that stay because of their shape."""
    left = [tensor for tensor, reason in reasons.items() if reason.startswith("left because of its shape")]
    return [f"{left[0]}{_more(len(left))} stays unquantized, {reasons[left[0]]}"] if left else []


def _left_linears(infos: Mapping[str, ModuleInfo], linears: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Names for the config's `ignore`: everything that may be a Linear in a runtime and is not quantized."""
    kinds = ("linear", "lm_head", "router", "outside the blocks", "other tower", "used directly", "unreached")
    left = [
        info.name for info in infos.values() if info.kind in kinds and len(info.shape) >= 2 and info.tensor.endswith(".weight") and info.name not in linears
    ]
    # Runtimes have experts as modules, whatever they are stored in: one pattern for all of a layer's.
    stacks = dict.fromkeys(experts_module(info.tensor) for info in infos.values() if len(info.shape) == 3 and info.kind in ("linear", "unreached"))
    left += [rf"re:{re.escape(module)}\..*" for module in stacks if not any(name.startswith(f"{module}.") for name in linears)]
    # A tied lm_head has no tensor, yet runtimes have the module.
    return left if "lm_head" in left or "lm_head" in linears else [*left, "lm_head"]


def _runtime_warnings(options: ExportOptions, checkpoint: Checkpoint, linears: Mapping[str, QuantizedLinearInfo], left: Sequence[str]) -> list[str]:
    if options.runtime is not None:
        problems = runtime_problems(options.runtime, linears.values(), left, options.layout)
        if options.runtime == "transformers" and not problems:
            from quantkit.experts import not_found_by_transformers

            problems = list(filter(None, [not_found_by_transformers(checkpoint, linears)]))
        if problems:
            raise RuntimeLimitError(problems[0] + _more(len(problems)))
        return []
    return [problem for name in RUNTIMES for problem in runtime_problems(name, linears.values(), left, options.layout)]


def _observer_warnings(recipe: Recipe, linears: Mapping[str, QuantizedLinearInfo]) -> list[str]:
    if recipe.observer.kind == "absmax":
        return []
    static = [linear.scheme for linear in linears.values() if linear.scheme.needs_calibration]
    if not static:
        return [f"the observer {recipe.observer} changes nothing: no scheme here has static input scales"]
    if recipe.observer.kind == "percentile" and any(scheme.input.format.kind == "float" for scheme in static):
        return [f"the observer {recipe.observer} clips inputs that FP8 has range for; absmax or mse usually loses less"]
    return []


def _calibration_for(options: ExportOptions, checkpoint: Checkpoint, model: str, linears: Mapping[str, QuantizedLinearInfo]) -> Calibration | None:
    static = [linear for linear in linears.values() if linear.scheme.needs_calibration]
    if options.calibration is None:
        if options.recipe.chooses_weights:
            names = " and ".join(algorithm.name for algorithm in options.recipe.algorithms)
            raise CalibrationError(
                f"{names} choose weights with data; first: quantkit calibrate {shlex.quote(str(options.model))} -o CALIB --recipe RECIPE, then pass --calibration CALIB"
            )
        if static or options.recipe.kv_cache:
            what = f"{static[0].scheme.name} has static input scales, which" if static else "an FP8 KV cache has scales, which"
            raise CalibrationError(
                f"{what} have to be measured; first: quantkit calibrate {shlex.quote(str(options.model))} -o CALIB, then pass --calibration CALIB"
            )
        return None
    calibration = Calibration.open(options.calibration)
    calibration.require_same_model(checkpoint, model)
    calibration.require_same_recipe(options.recipe)
    calibration.require_weights({name: (linear.shape, linear.scheme.weight) for name, linear in linears.items()}, checkpoint)
    for linear in static:
        statistics = calibration.inputs.get(linear.name)
        if statistics is None or not (statistics.tokens or statistics.amax):
            raise CalibrationError(f"{calibration.path} has no statistics of {linear.name}'s input; leave it with --ignore, or give it a dynamic scheme")
        if statistics.in_features != linear.shape[1]:
            raise CalibrationError(
                f"{calibration.path} saw {statistics.in_features} input features at {linear.name}, which has {linear.shape[1]}; calibrate again"
            )
    if options.recipe.kv_cache and not calibration.kv_amax:
        raise CalibrationError(f"{calibration.path} has no statistics of keys and values; this model keeps no ordinary KV cache, so leave out --kv-cache")
    return calibration


def _parameter_plans(
    checkpoint: Checkpoint, layout: str, infos: Mapping[str, ModuleInfo], linears: Mapping[str, QuantizedLinearInfo], reasons: Mapping[str, str],
    scales: Mapping[str, str], dense_dtype: str,
) -> list[ParameterPlan]:  # fmt: skip
    rows, tensors = [], checkpoint.tensors
    for tensor, info in infos.items():
        before = after = tensors[tensor].nbytes
        reason = reasons.get(tensor, info.reason)
        if tensor in scales:
            before += tensors[scales[tensor]].nbytes
            after = TensorPlan(tensor, dense_dtype, info.shape).nbytes
            reason += f"; FP8 blocks become {dense_dtype}"
        linear = linears.get(info.name) if tensor.endswith(".weight") else None
        if linear is not None:
            after = sum(plan.nbytes for plan in linear_plans(linear, layout))
            rows.append(ParameterPlan(tensor, "quantized", str(linear.scheme.weight), linear.scheme, before, after))
        else:
            is_unreached = info.kind == "unreached" and not reason.startswith(_IGNORED)
            rows.append(ParameterPlan(tensor, "unreached" if is_unreached else "left", reason, None, before, after))
    return rows


def linear_plans(linear: QuantizedLinearInfo, layout: str) -> list[TensorPlan]:
    """The tensors that a quantized Linear becomes."""
    tensors = linear_tensors(linear.scheme, linear.shape, layout)
    if linear.is_transposed and "weight" in tensors:
        dtype, (rows, columns) = tensors["weight"]
        tensors["weight"] = (dtype, (columns, rows))
    return [TensorPlan(f"{linear.name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in tensors.items()]


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
