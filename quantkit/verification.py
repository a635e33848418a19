"""`verify`: is a checkpoint whole, finite and consistent, and will a runtime load it?

A fault is something that a runtime would refuse or, worse, wouldn't notice: a missing scale, a NaN code, two scales in one fused set.
A warning names a runtime that can't load a checkpoint which is sound in itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.layouts import FP8_BLOCK_SUFFIX, QuantizationLayout, decode_linear, layout_name, linear_tensors, stored_linears
from quantkit.model import classify_tensors, fused_sets
from quantkit.runtimes import RUNTIMES, QuantizedLinearInfo, runtime_problems
from quantkit.scheme import TENSOR, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

# Rounding to 8 bits keeps 30 dB or more; below this a weight was not rounded but changed.
LEAST_PLAUSIBLE_SQNR_DB = 15.0


@dataclass
class Verification:
    """What `verify` found. sqnr_db: Linear → weight SQNR against the base, where one was given."""

    path: Path
    tensors: int = 0
    quantized: int = 0
    left: tuple[str, ...] = ()
    faults: list[tuple[str, str]] = field(default_factory=list)  # (tensor, message)
    warnings: list[str] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)

    def fault(self, tensor: str, message: str) -> None:
        self.faults.append((tensor, message))

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.faults,
            "faults": [{"tensor": tensor, "message": message} for tensor, message in self.faults],
            "warnings": list(self.warnings),
            "path": str(self.path),
            "tensors": self.tensors,
            "quantized": self.quantized,
            "left": list(self.left),
            "layers": [{"name": name, "weight_sqnr_db": value} for name, value in sorted(self.sqnr_db.items(), key=lambda item: item[1])],
        }


def verify(
    path: Path, base: Path | None = None, runtime: str | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Check every tensor of a checkpoint. on_progress(tensors done, tensors in all)."""
    checkpoint = Checkpoint.open(path)
    base_checkpoint = Checkpoint.open(base) if base else None
    if base_checkpoint is not None and QuantizationLayout.read(base_checkpoint.config) is not None:
        raise CheckpointError(f"the base {base} is quantized itself; give the original model")
    layout = QuantizationLayout.read(checkpoint.config)
    found = Verification(path, tensors=len(checkpoint.tensors))
    stored = stored_linears(checkpoint.tensors)
    linears = _check_names(found, checkpoint, layout, stored) if layout else {}
    if layout and layout.method == "compressed-tensors":
        _check_formats(found, checkpoint.config["quantization_config"])
    if layout is None:
        for module in stored:
            found.fault(module, "has quantized tensors but config.json has no quantization_config: a runtime would read the codes as weights")
        if not stored:
            found.warnings.append("the checkpoint is not quantized")
    found.quantized = len(linears)
    _check_values(found, checkpoint, linears, on_progress)
    if layout and layout.kv_cache:
        _check_kv_scales(found, checkpoint)
    _check_fused_sets(found, checkpoint, linears)
    infos = [QuantizedLinearInfo(name, shape, scheme) for name, (scheme, shape) in linears.items()]
    for name in [runtime] if runtime else RUNTIMES:
        for problem in runtime_problems(name, infos, found.left):
            if runtime:
                found.fault("", problem)
            else:
                found.warnings.append(problem)
    if base_checkpoint is not None:
        _check_against_base(found, checkpoint, base_checkpoint, layout, stored, linears)
    return found


def _check_names(
    found: Verification, checkpoint: Checkpoint, layout: QuantizationLayout, stored: Mapping[str, list[str]]
) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
    """Every Linear is either quantized with all its tensors in the right shapes, or ignored by the config. Returns the former."""
    linears: dict[str, tuple[QuantScheme, tuple[int, int]]] = {}
    for module, suffixes in stored.items():
        scheme = layout.scheme_of(module)
        if scheme is None:
            found.fault(module, "has quantized tensors, but quantization_config doesn't target it: a runtime would read the codes as weights")
            continue
        shape = _logical_shape(checkpoint, module)
        if shape is None:
            found.fault(f"{module}.weight", "is missing, though its scales are there")
            continue
        whole = True
        for suffix in set(suffixes) - set(linear_tensors(scheme, shape)) - {"bias", FP8_BLOCK_SUFFIX, "k_scale", "v_scale"}:
            found.fault(f"{module}.{suffix}", f"is not a tensor of {scheme.name}")
        for suffix, (dtype, expected) in linear_tensors(scheme, shape).items():
            name = f"{module}.{suffix}"
            if layout.method == "fp8" and suffix == "weight_scale":
                name = f"{module}.{FP8_BLOCK_SUFFIX}"
            info = checkpoint.tensors.get(name)
            if info is None:
                found.fault(name, f"is missing; {scheme.name} needs it")
                whole = False
            elif (
                suffix in ("weight", "weight_packed", "weight_shape")
                and info.dtype != dtype
                or suffix == "weight_scale"
                and (info.dtype == "U8") != (dtype == "U8")
            ):
                found.fault(name, f"is stored as {info.dtype}; {scheme.name} has {dtype}")
                whole = False
            elif info.shape != expected:
                found.fault(name, f"has the shape {list(info.shape)}; transformers expects exactly {list(expected)}")
                whole = False
        if whole:
            linears[module] = (scheme, shape)
    left = []
    for info in classify_tensors({name: i.shape for name, i in checkpoint.tensors.items()}).values():
        if info.kind not in ("linear", "lm_head", "router") or info.name in stored or not info.tensor.endswith(".weight"):
            continue
        if layout.scheme_of(info.name) is None:
            left.append(info.name)
        elif info.kind == "linear" or checkpoint.tensors[info.tensor].dtype not in ("BF16", "F16", "F32"):
            found.fault(info.tensor, "is neither quantized nor ignored in quantization_config: vLLM would use scales that were never loaded")
        else:
            found.fault(info.tensor, "is not quantized but quantization_config targets it; add it to 'ignore'")
    if "lm_head" not in left and checkpoint.config.get("tie_word_embeddings") and layout.scheme_of("lm_head") is None:
        left.append("lm_head")  # tied: the module is there, the tensor is not
    found.left = tuple(left)
    return linears


def _check_formats(found: Verification, stored: Mapping[str, Any]) -> None:
    """Each group's `format` is one that runtimes decompress this scheme with."""
    for name, entry in stored["config_groups"].items():
        description = {"weights": entry["weights"], "input_activations": entry.get("input_activations")}
        scheme = QuantScheme.parse(description, name)
        plain = {"naive-quantized", f"{scheme.weight.format.kind}-quantized"}
        allowed = {layout_name(scheme)} if layout_name(scheme) in ("pack-quantized", "mxfp8-quantized") else plain
        declared = entry.get("format") or stored.get("format")
        if declared not in allowed:
            found.fault(f"quantization_config.{name}", f"declares the format {declared!r}; {scheme.name} is stored as {' or '.join(sorted(allowed))}")


def _logical_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
    packed = checkpoint.tensors.get(f"{module}.weight_packed")
    if packed is not None:
        shape = checkpoint.tensors.get(f"{module}.weight_shape")
        if shape is None or shape.shape != (2,):
            return (packed.shape[0], packed.shape[1] * 4) if len(packed.shape) == 2 else None
        rows, columns = checkpoint.read(shape.name).tolist()
        return int(rows), int(columns)
    weight = checkpoint.tensors.get(f"{module}.weight")
    return weight.shape if weight is not None and len(weight.shape) == 2 else None


def _check_values(found: Verification, checkpoint: Checkpoint, linears: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> None:
    """No NaN, no infinity, no scale that is zero or negative; one tensor in memory at a time."""
    import torch

    for number, (name, info) in enumerate(checkpoint.tensors.items(), 1):
        tensor = checkpoint.read(name)
        suffix = name.rpartition(".")[2]
        if suffix.endswith("_scale") or suffix == FP8_BLOCK_SUFFIX:
            if tensor.dtype == torch.uint8:
                if (tensor == 255).any():
                    found.fault(name, "holds NaN scales (the byte 255)")
            elif not torch.isfinite(tensor.float()).all():
                found.fault(name, "holds NaN or infinite scales")
            elif (tensor.float() <= 0).any():
                found.fault(name, "holds scales that are zero or negative")
        elif info.dtype in ("F8_E4M3", "F8_E5M2"):
            if _has_nonfinite_codes(tensor):
                found.fault(name, "holds NaN or infinite codes")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            found.fault(name, "holds NaN or infinity")
        on_progress(number, found.tensors)


def _has_nonfinite_codes(tensor: Tensor) -> bool:
    import torch

    magnitude = tensor.view(torch.uint8) & 0x7F
    # E4M3 has NaN at 0x7F alone; E5M2 has infinity at 0x7C and NaN above.
    return bool((magnitude >= (0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C)).any())


def _check_kv_scales(found: Verification, checkpoint: Checkpoint) -> None:
    keys = {name.removesuffix(".k_scale") for name in checkpoint.tensors if name.endswith(".k_scale")}
    values = {name.removesuffix(".v_scale") for name in checkpoint.tensors if name.endswith(".v_scale")}
    for module in sorted(keys ^ values):
        found.fault(module, "has only one of k_scale and v_scale")
    attentions = {name.rpartition(".")[0].rpartition(".")[0] for name in checkpoint.tensors if ".k_proj." in name}
    for module in sorted(attentions - keys - values) or ([""] if not keys else []):
        found.fault(f"{module}.k_scale" if module else "", "is missing, though there is a kv_cache_scheme: a server would use the scale 1")


def _check_fused_sets(found: Verification, checkpoint: Checkpoint, linears: Mapping[str, tuple[QuantScheme, Any]]) -> None:
    """Where a runtime merges Linears and a scale is per tensor, all members must carry the same one."""
    for members in fused_sets(linears):
        schemes = [linears[member][0] for member in members]
        suffixes = []
        if all(scheme.weight.granularity == TENSOR for scheme in schemes):
            suffixes.append("weight_scale")
        if all(scheme.needs_calibration for scheme in schemes):
            suffixes.append("input_scale")
        for suffix in suffixes:
            scales = [float(checkpoint.read(f"{member}.{suffix}").float().reshape(-1)[0]) for member in members]
            if len(set(scales)) > 1:
                found.fault(
                    f"{members[0]}.{suffix}",
                    f"differs among {', '.join(member.rpartition('.')[2] for member in members)}, which runtimes merge under one scale",
                )


def _check_against_base(
    found: Verification, checkpoint: Checkpoint, base: Checkpoint, layout: QuantizationLayout | None,
    stored: Mapping[str, list[str]], linears: Mapping[str, tuple[QuantScheme, Any]],
) -> None:  # fmt: skip
    import torch

    from quantkit.quantize import sqnr_db

    for name, original in base.tensors.items():
        module = name.rpartition(".")[0]
        if module in stored and name.endswith(".weight"):
            if module not in linears:
                continue
            weight, _ = decode_linear({suffix: checkpoint.read(f"{module}.{suffix}") for suffix in stored[module]}, linears[module][0], module)
            if tuple(weight.qdata.shape) != original.shape:
                found.fault(name, f"stands for the shape {list(weight.qdata.shape)}; the base has {list(original.shape)}")
                continue
            found.sqnr_db[module] = float(sqnr_db(base.read(name), weight.dequantize()))
            if not found.sqnr_db[module] > LEAST_PLAUSIBLE_SQNR_DB:
                found.fault(name, f"is {found.sqnr_db[module]:.1f} dB from the base's weight; rounding to 8 bits leaves 30 dB or more")
        elif name not in checkpoint.tensors:
            found.fault(name, "is in the base but not in this checkpoint")
        elif (checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype) != (original.shape, original.dtype) or not torch.equal(
            checkpoint.read(name), base.read(name)
        ):
            found.warnings.append(f"{name} differs from the base's, though it isn't quantized")
    scales = ("weight_scale", FP8_BLOCK_SUFFIX, "input_scale", "weight_shape", "weight_packed", "k_scale", "v_scale")
    for name in checkpoint.tensors:
        if name not in base.tensors and name.rpartition(".")[2] not in scales:
            found.fault(name, "is not in the base")
