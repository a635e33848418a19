"""`export`: safetensors in, safetensors out, one tensor at a time; the model is never built.

The plan (what becomes of every parameter) is made from names and shapes alone and checked against the recipe, the calibration and the
runtime before anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration import Calibration
from quantkit.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    OutputDirectory,
    ShardWriter,
    TensorPlan,
    check_disk_space,
    check_output,
    format_bytes,
    plan_shards,
    sha256_file,
    shard_names,
    write_json,
    write_text,
)
from quantkit.errors import CalibrationError, CheckpointError, RecipeError, RuntimeLimitError
from quantkit.interrupts import stop_between_steps
from quantkit.layouts import QuantizationLayout, compressed_tensors_config, encode_linear, linear_tensors, shape_obstacle
from quantkit.model import ModuleInfo, classify_tensors, fused_sets
from quantkit.runtimes import RUNTIMES, QuantizedLinearInfo, runtime_problems
from quantkit.scheme import TENSOR, Pattern, QuantScheme, Recipe

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class ExportOptions:
    model: Path
    output: Path
    recipe: Recipe
    calibration: Path | None = None
    runtime: str | None = None
    max_shard_bytes: int = 5_000_000_000
    resume: bool = False
    overwrite: bool = False


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
    """Everything that decides the output, before its first byte."""

    options: ExportOptions
    checkpoint: Checkpoint
    calibration: Calibration | None
    fingerprint: dict[str, str]
    parameters: tuple[ParameterPlan, ...]
    linears: dict[str, QuantizedLinearInfo]  # the quantized ones, by module name
    left: tuple[str, ...]  # Linears that stay, lm_head among them
    warnings: tuple[str, ...]

    @cached_property
    def fused_with(self) -> dict[str, tuple[str, ...]]:
        """Quantized Linear → the fused set that it is a member of, if it is."""
        return {member: members for members in fused_sets(self.linears) for member in members}

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.parameters)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.parameters)


@dataclass(frozen=True)
class ExportSummary:
    path: Path
    quantized: int
    left: int
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...]


def plan_export(options: ExportOptions, calibration_follows: bool = False) -> ExportPlan:
    """Decide what becomes of every parameter, and refuse what can't be done.

    calibration_follows: the plan is looked at before the calibration that it will need is made.
    Raises CheckpointError, RecipeError, CalibrationError or RuntimeLimitError with one sentence.
    """
    recipe = options.recipe
    checkpoint = Checkpoint.open(options.model)
    layout = QuantizationLayout.read(checkpoint.config)
    if layout is not None:
        raise CheckpointError(f"{options.model} is quantized already ({layout.method}); export from the original model")
    infos = classify_tensors({name: info.shape for name, info in checkpoint.tensors.items()})
    _refuse_unreached(recipe, infos)
    schemes, reasons = _assign(recipe, infos, checkpoint)
    linears = {module: QuantizedLinearInfo(module, checkpoint.tensors[f"{module}.weight"].shape, scheme) for module, scheme in schemes.items()}
    left = _left_linears(infos, linears, checkpoint)
    warnings = _shape_warnings(reasons) + _runtime_warnings(options.runtime, linears, left)
    fingerprint = {"model": checkpoint.fingerprint(), "recipe": recipe.canonical(), "quantkit version": __version__, "torch version": version("torch")}
    calibration = None if calibration_follows else _calibration_for(options, checkpoint, fingerprint["model"], linears)
    fingerprint["calibration"] = sha256_file(calibration.path / "calibration.json") if calibration else ""
    fingerprint["shard size"] = str(options.max_shard_bytes)
    parameters = _parameter_plans(checkpoint, infos, linears, reasons)
    for suffix in ("k_scale", "v_scale"):
        clash = [f"{module}.{suffix}" for module in (calibration.kv_amax if calibration else ()) if f"{module}.{suffix}" in checkpoint.tensors]
        if recipe.kv_cache and clash:
            raise CheckpointError(f"{options.model} holds a tensor {clash[0]} already; export from the original model")
    for name in linears:
        if checkpoint.tensors[f"{name}.weight"].dtype not in FLOATS:
            dtype = checkpoint.tensors[f"{name}.weight"].dtype
            raise CheckpointError(f"{name}.weight is stored as {dtype}; quantkit quantizes bfloat16, float16 and float32 weights")
    return ExportPlan(options, checkpoint, calibration, fingerprint, tuple(parameters), linears, tuple(left), tuple(warnings))


def _assign(recipe: Recipe, infos: Mapping[str, ModuleInfo], checkpoint: Checkpoint) -> tuple[dict[str, QuantScheme], dict[str, str]]:
    """Module → scheme of what is quantized, and tensor → reason of what would be but isn't."""
    modules = {info.name: info for info in infos.values() if info.tensor.endswith(".weight")}
    tied = "lm_head" not in modules and checkpoint.config.get("tie_word_embeddings")
    for pattern in recipe.ignore:
        # A tied lm_head has no tensor of its own, but recipes name it to be safe.
        pattern.require_match([*modules, *infos, *(["lm_head"] if tied else [])], "ignore")
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
        ignored = next((pattern for pattern in recipe.ignore if pattern.matches(name) or pattern.matches(info.tensor)), None)
        if ignored is not None:
            reasons[info.tensor] = f"ignored by '{ignored.text}'"
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
        obstacle = shape_obstacle(scheme, info.shape)
        if obstacle:
            reasons[info.tensor] = f"left because of its shape: {obstacle}"
        else:
            schemes[name] = scheme
    for tensor, info in infos.items():
        if info.kind == "unreached":
            reasons[tensor] = f"ignored, and out of reach: {info.reason}"
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


def _refuse_unreached(recipe: Recipe, infos: Mapping[str, ModuleInfo]) -> None:
    """What should be quantized but can't be is an error unless it is ignored by name: a half-quantized model is no result."""
    unreached = [i for i in infos.values() if i.kind == "unreached" and not any(p.matches(i.tensor) or p.matches(i.name) for p in recipe.ignore)]
    if unreached:
        raise CheckpointError(
            f"{unreached[0].tensor} can't be quantized by this version: {unreached[0].reason}{_more(len(unreached))}; add it to --ignore to leave it as it is"
        )


def _shape_warnings(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for all Linears that stay because of their shape."""
    left = [tensor for tensor, reason in reasons.items() if reason.startswith("left because of its shape")]
    return [f"{left[0]}{_more(len(left))} stays unquantized, {reasons[left[0]]}"] if left else []


def _left_linears(infos: Mapping[str, ModuleInfo], linears: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Names for the config's `ignore`: everything that may be a Linear in a runtime and is not quantized."""
    kinds = ("linear", "lm_head", "router", "outside the blocks", "other tower", "unreached")
    left = [
        info.name for info in infos.values() if info.kind in kinds and len(info.shape) >= 2 and info.tensor.endswith(".weight") and info.name not in linears
    ]
    # A tied lm_head has no tensor, yet runtimes have the module.
    return left if "lm_head" in left or "lm_head" in linears else [*left, "lm_head"]


def _runtime_warnings(runtime: str | None, linears: Mapping[str, QuantizedLinearInfo], left: Sequence[str]) -> list[str]:
    if runtime is not None:
        problems = runtime_problems(runtime, linears.values(), left)
        if problems:
            raise RuntimeLimitError(problems[0] + _more(len(problems)))
        return []
    return [problem for name in RUNTIMES for problem in runtime_problems(name, linears.values(), left)]


def _calibration_for(options: ExportOptions, checkpoint: Checkpoint, model: str, linears: Mapping[str, QuantizedLinearInfo]) -> Calibration | None:
    static = [linear for linear in linears.values() if linear.scheme.needs_calibration]
    if options.calibration is None:
        if static or options.recipe.kv_cache:
            what = f"{static[0].scheme.name} has static input scales, which" if static else "an FP8 KV cache has scales, which"
            raise CalibrationError(f"{what} have to be measured; first: quantkit calibrate {options.model} -o CALIB, then pass --calibration CALIB")
        return None
    calibration = Calibration.open(options.calibration)
    calibration.require_same_model(checkpoint, model)
    calibration.require_same_recipe(options.recipe)
    for linear in static:
        statistics = calibration.inputs.get(linear.name)
        if statistics is None or statistics.tokens == 0:
            raise CalibrationError(f"{calibration.path} has no statistics of {linear.name}'s input; leave it with --ignore, or give it a dynamic scheme")
        if statistics.in_features != linear.shape[1]:
            raise CalibrationError(
                f"{calibration.path} saw {statistics.in_features} input features at {linear.name}, which has {linear.shape[1]}; calibrate again"
            )
    if options.recipe.kv_cache and not calibration.kv_amax:
        raise CalibrationError(f"{calibration.path} has no statistics of keys and values; this model keeps no ordinary KV cache, so leave out --kv-cache")
    return calibration


def _parameter_plans(
    checkpoint: Checkpoint, infos: Mapping[str, ModuleInfo], linears: Mapping[str, QuantizedLinearInfo], reasons: Mapping[str, str]
) -> list[ParameterPlan]:
    rows = []
    for tensor, info in infos.items():
        before = checkpoint.tensors[tensor].nbytes
        linear = linears.get(info.name) if tensor.endswith(".weight") else None
        if linear is not None:
            after = sum(plan.nbytes for plan in _linear_plans(linear))
            rows.append(ParameterPlan(tensor, "quantized", str(linear.scheme.weight), linear.scheme, before, after))
        elif info.kind == "unreached":
            rows.append(ParameterPlan(tensor, "unreached", reasons[tensor], None, before, before))
        else:
            rows.append(ParameterPlan(tensor, "left", reasons.get(tensor, info.reason), None, before, before))
    return rows


def _linear_plans(linear: QuantizedLinearInfo) -> list[TensorPlan]:
    return [TensorPlan(f"{linear.name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in linear_tensors(linear.scheme, linear.shape).items()]


def export(plan: ExportPlan, on_progress: Callable[[int, int], None] = lambda done, total: None) -> ExportSummary:
    """Write the checkpoint. on_progress(bytes read, bytes in all) is called after each tensor."""
    options, checkpoint = plan.options, plan.checkpoint
    check_output(options.output, overwrite=options.overwrite, reads=_inputs(plan))
    others = checkpoint.other_files()
    check_disk_space(options.output, plan.bytes_after + sum(path.stat().st_size for path in others))
    output = OutputDirectory(options.output, plan.fingerprint, resume=options.resume, overwrite=options.overwrite, reads=_inputs(plan))
    groups = _tensor_groups(plan)
    shards = plan_shards([[tensor for tensor in group.tensors] for group in groups], options.max_shard_bytes)
    names = shard_names(len(shards))
    by_first = {group.tensors[0].name: group for group in groups}
    shared_amax = _SharedAmax(plan)
    finished = 0
    with stop_between_steps() as stop:
        for name, tensors in zip(names, shards):
            in_shard = [by_first[tensor.name] for tensor in tensors if tensor.name in by_first]
            if _already_written(output, name):
                finished += sum(group.bytes_read for group in in_shard)
                continue
            writer = ShardWriter(output.partial / name, tensors)
            try:
                for group in in_shard:
                    for tensor_name, tensor in group.make(plan, shared_amax).items():
                        writer.write(tensor_name, tensor)
                    finished += group.bytes_read
                    on_progress(finished, plan.bytes_before)
                    stop.check(f"in {name}; finished shards are kept")
                writer.close()
            except BaseException as error:
                writer.abandon()
                if isinstance(error, CheckpointError):
                    output.discard()  # this model can't be finished, so there is nothing to resume
                raise
            output.record(name, sha256_file(output.partial / name))
    _write_index(output.partial, names, shards)
    _write_config(output.partial, plan)
    _copy_others(output.partial, plan, others)
    output.commit()
    quantized = sum(row.status == "quantized" for row in plan.parameters)
    return ExportSummary(options.output, quantized, len(plan.left), plan.bytes_before, plan.bytes_after, plan.warnings)


def _inputs(plan: ExportPlan) -> list[Path]:
    return [plan.checkpoint.path, *([plan.calibration.path] if plan.calibration else [])]


def _already_written(output: OutputDirectory, name: str) -> bool:
    recorded = output.done.get(name)
    return recorded is not None and (output.partial / name).is_file() and sha256_file(output.partial / name) == recorded


@dataclass(frozen=True)
class _TensorGroup:
    """Tensors that are made from one parameter, together: a Linear's weight with its scales, or one tensor as it was."""

    source: str | None
    linear: QuantizedLinearInfo | None
    tensors: tuple[TensorPlan, ...]
    bytes_read: int

    def make(self, plan: ExportPlan, shared: _SharedAmax) -> dict[str, Any]:
        import torch

        from quantkit.quantize import kv_scale

        if self.source is None:
            module, _, suffix = self.tensors[0].name.rpartition(".")
            k_amax, v_amax = plan.calibration.kv_amax[module]
            return {self.tensors[0].name: kv_scale(torch.tensor(k_amax if suffix == "k_scale" else v_amax))}
        values = plan.checkpoint.read(self.source)
        if self.linear is None:
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise _not_finite(self.source)
            return {self.source: values}
        quantized = _quantize_weight(self.linear, self.source, values, shared)
        input_scale = _input_scale(self.linear, plan) if self.linear.scheme.needs_calibration else None
        return {f"{self.linear.name}.{suffix}": tensor for suffix, tensor in encode_linear(quantized, self.linear.scheme, input_scale).items()}


def _tensor_groups(plan: ExportPlan) -> list[_TensorGroup]:
    groups = []
    for row in plan.parameters:
        info = plan.checkpoint.tensors[row.name]
        linear = plan.linears.get(row.name.removesuffix(".weight")) if row.status == "quantized" else None
        tensors = _linear_plans(linear) if linear else [TensorPlan(info.name, info.dtype, info.shape)]
        groups.append(_TensorGroup(row.name, linear, tuple(tensors), info.nbytes))
    if plan.options.recipe.kv_cache:
        names = [f"{module}.{suffix}" for module in plan.calibration.kv_amax for suffix in ("k_scale", "v_scale")]
        groups += [_TensorGroup(None, None, (TensorPlan(name, "F32", (1,)),), 0) for name in names]
    return groups


class _SharedAmax:
    """Largest weight of each fused set that shares one per-tensor scale; each set is measured when its first member comes."""

    def __init__(self, plan: ExportPlan) -> None:
        self._checkpoint = plan.checkpoint
        self._sets = plan.fused_with
        self._amax: dict[tuple[str, ...], Any] = {}

    def of(self, name: str, own: Any) -> Any:
        import torch

        from quantkit.quantize import block_amax

        members = self._sets.get(name)
        if members is None:
            return own
        if members not in self._amax:
            largest = own
            for member in members:
                if member != name:
                    largest = torch.maximum(largest, block_amax(self._checkpoint.read(f"{member}.weight"), TENSOR))
            self._amax[members] = largest
        return self._amax[members]


def _quantize_weight(linear: QuantizedLinearInfo, source: str, values: Any, shared: _SharedAmax) -> Any:
    from quantkit.quantize import block_amax, choose_scale, quantize

    spec = linear.scheme.weight
    amax = block_amax(values, spec.granularity)
    if not amax.isfinite().all():
        raise _not_finite(source)
    if spec.granularity == TENSOR:
        amax = shared.of(linear.name, amax)
    return quantize(values, spec, choose_scale(amax, spec))


def _not_finite(tensor: str) -> CheckpointError:
    return CheckpointError(f"the weight {tensor} holds NaN or infinity; a model with it is ruined, so fetch it again or mend it")


def _input_scale(linear: QuantizedLinearInfo, plan: ExportPlan) -> Any:
    import torch

    from quantkit.quantize import choose_scale

    return choose_scale(torch.tensor([[_static_amax(linear, plan)]]), linear.scheme.input)


def _static_amax(linear: QuantizedLinearInfo, plan: ExportPlan) -> float:
    """The magnitude that a static input scale must reach, over the whole fused set: runtimes keep one scale for it.

    INT8 leaves the first positions out: one enormous token there would take the codes from all others. A float format has range to
    spare and clipping that token costs more.
    """
    seen = [plan.calibration.inputs[member] for member in plan.fused_with.get(linear.name, (linear.name,))]
    with_first = linear.scheme.input.format.kind == "float"
    return max(max(statistics.amax, statistics.first_position_amax if with_first or not statistics.amax else 0.0) for statistics in seen)


def _write_index(partial: Path, names: Sequence[str], shards: Sequence[Sequence[TensorPlan]]) -> None:
    if len(names) == 1:
        return
    weight_map = {tensor.name: name for name, tensors in zip(names, shards) for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_config(partial: Path, plan: ExportPlan) -> None:
    config = dict(plan.checkpoint.config)
    schemes = {name: linear.scheme for name, linear in plan.linears.items()}
    config["quantization_config"] = compressed_tensors_config(schemes, plan.left, plan.options.recipe.scheme, plan.options.recipe.kv_cache is not None)
    write_json(partial / "config.json", config)


def _copy_others(partial: Path, plan: ExportPlan, others: Sequence[Path]) -> None:
    for path in others:
        target = partial / path.relative_to(plan.checkpoint.path)
        target.parent.mkdir(exist_ok=True)
        if path.name != "README.md":
            target.write_bytes(path.read_bytes())
    card = plan.checkpoint.path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if card.is_file() else ""
    write_text(partial / "README.md", text + model_card_section(plan))


def model_card_section(plan: ExportPlan) -> str:
    """What was done to the model, for its card."""
    counts = Counter(linear.scheme for linear in plan.linears.values())
    lines = [f"- {count} Linears in {scheme.name} (weights {scheme.weight}, inputs {scheme.input or 'as they are'})" for scheme, count in counts.items()]
    if plan.calibration:
        described = plan.calibration.description
        lines.append(f"- static scales measured on {described['tokens']} tokens ({', '.join(described['data']['sources'])})")
    if plan.options.recipe.kv_cache:
        lines.append("- scales for an FP8 KV cache")
    unchanged = "; embeddings, norms and lm_head are as they were" if "lm_head" in plan.left else ""
    lines.append(f"- {format_bytes(plan.bytes_before)} of weights became {format_bytes(plan.bytes_after)}{unchanged}")
    return f"## Quantization\n\nQuantized with quantkit {__version__} (format compressed-tensors):\n\n" + "\n".join(lines) + "\n"


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
