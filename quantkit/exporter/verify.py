"""`verify`: is a checkpoint whole, finite and consistent, and will a runtime load it?

A fault is something that a runtime would refuse or, worse, wouldn't notice: a missing scale, a NaN
code, two scales in one fused set. A warning names a runtime that can't load a checkpoint which is
sound in itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit import ops
from quantkit.checkpoint.files import blake3_file, cores
from quantkit.checkpoint.formats import (
    FP8_BLOCK_SUFFIX,
    QuantizationLayout,
    kv_scale_module,
    layout_name,
    linear_tensors,
    stored_linears,
)
from quantkit.checkpoint.output_dir import MANIFEST_FILE, changed_tensors
from quantkit.checkpoint.reader import Checkpoint, read_json
from quantkit.checkpoint.stream import WeightStream
from quantkit.errors import CheckpointError
from quantkit.exporter.runtimes import RUNTIMES, not_found_by_transformers, runtime_problems
from quantkit.models.assignment import QuantizedLinearInfo
from quantkit.models.linear_views import as_matrices
from quantkit.models.tensor_roles import ModelTensors, fused_sets, linears_of
from quantkit.ops.packing import unpack_int8
from quantkit.ops.reference import QuantizedTensor, power_ratio_db_of_floats
from quantkit.schemes.scheme import TENSOR, QuantScheme

# Rounding to 8 bits keeps 30 dB or more; below this a weight was not rounded but changed.
LEAST_PLAUSIBLE_SQNR_DB = 15.0
CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")
# What formats call the scales of weights, inputs, keys and values, queries and probabilities.
_SCALES = (
    "weight_scale",
    "input_scale",
    "activation_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
    FP8_BLOCK_SUFFIX,
)


@dataclass
class Verification:
    """What `verify` found. left: Linear that isn't quantized → why. sqnr_db: Linear → weight SQNR
    against the base, where one was given.

    changed: tensors that algorithms changed, by the manifest; they differ from the base's on
    purpose and aren't compared with it.
    """

    path: Path
    tensors: int = 0
    quantized: int = 0
    left: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)  # (tensor, message)
    warnings: list[str] = field(default_factory=list)
    # fused sets with several scales, as faults are written
    unequal: list[tuple[str, str]] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    def fault(self, tensor: str, message: str) -> None:
        self.faults.append((tensor, message))

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "faults": [{"tensor": tensor, "message": message} for tensor, message in self.faults],
            "warnings": list(self.warnings),
            "path": str(self.path),
            "tensors": self.tensors,
            "quantized": self.quantized,
            "changed": len(self.changed),
            "left": [{"name": name, "reason": reason} for name, reason in self.left.items()],
            "layers": [{"name": name, "weight_sqnr_db": value} for name, value in self.worst_first],
        }

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def worst_first(self) -> list[tuple[str, float]]:
        return sorted(self.sqnr_db.items(), key=lambda item: item[1])


def verify(
    path: Path,
    base: Path | None = None,
    runtime: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    as_stored: bool = False,
) -> Verification:
    """Check every tensor of a checkpoint. on_progress(tensors done, tensors in all).

    as_stored: ask only whether it can be computed as it is stored; that its files were changed
    since they were exported, or that a fused set has several scales, is no fault then.
    """
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        if not (path / "config.json").is_file():
            raise  # no checkpoint to find faults in
        return Verification(path, faults=[("", f"can't be opened: {error}")])
    model_tensors = linears_of(checkpoint)
    checkpoint = model_tensors.checkpoint
    base_checkpoint = as_matrices(Checkpoint.open(base)) if base else None
    base_layout = QuantizationLayout.read(base_checkpoint.config) if base_checkpoint else None
    if base_layout is not None and base_layout.method != "fp8":
        raise CheckpointError(f"the base {base} is quantized itself; give the original model")
    layout = QuantizationLayout.read(checkpoint.config)
    found = Verification(path, tensors=len(checkpoint.tensors), changed=changed_tensors(path))
    stored = stored_linears(checkpoint.tensors)
    linears = _check_names(found, model_tensors, layout, stored) if layout else {}
    if layout and layout.method == "compressed-tensors":
        _check_formats(found, checkpoint.config["quantization_config"])
    if layout is None:
        for module in stored:
            found.fault(
                module,
                "has quantized tensors but config.json has no quantization_config: a runtime would"
                " read the codes as weights",
            )
        if not stored:
            found.warnings.append("the checkpoint is not quantized")
    found.quantized = len(linears)
    if base_checkpoint is not None:
        _check_config_against_base(found, checkpoint, base_checkpoint)
        _check_names_against_base(found, checkpoint, base_checkpoint, stored)
    _check_values(found, checkpoint, base_checkpoint, stored, linears, on_progress)
    if not as_stored:
        _check_manifest(found, checkpoint)
    if layout and layout.kv_cache:
        _check_kv_scales(found, checkpoint)
    _check_fused_sets(found, checkpoint, linears)
    if not as_stored:
        found.faults += found.unequal
    turned = {name for name, info in checkpoint.tensors.items() if not info.is_dense}
    infos = [
        QuantizedLinearInfo(name, shape, scheme, f"{name}.weight" in turned)
        for name, (scheme, shape) in linears.items()
    ]
    for name in [runtime] if runtime else RUNTIMES:
        for problem in runtime_problems(
            name, infos, found.left, layout.method if layout else "compressed-tensors"
        ):
            if runtime:
                found.fault("", problem)
            else:
                found.warnings.append(problem)
    if runtime == "transformers" and (problem := not_found_by_transformers(checkpoint, linears)):
        found.fault("", problem)
    return found


def _check_names(
    found: Verification,
    model_tensors: ModelTensors,
    layout: QuantizationLayout,
    stored: Mapping[str, list[str]],
) -> dict[str, tuple[QuantScheme, tuple[int, int]]]:
    """Every Linear is either quantized with all its tensors in the right shapes, or ignored by the
    config. Returns the former.
    """
    checkpoint = model_tensors.checkpoint
    linears: dict[str, tuple[QuantScheme, tuple[int, int]]] = {}
    for module, suffixes in stored.items():
        scheme = layout.scheme_of(module)
        if scheme is None:
            found.fault(
                module,
                "has quantized tensors, but quantization_config doesn't target it: a runtime would"
                " read the codes as weights",
            )
            continue
        shape = _logical_shape(checkpoint, module)
        if shape is None:
            found.fault(f"{module}.weight", "is missing, though its scales are there")
            continue
        whole = True
        expected_tensors = linear_tensors(scheme, shape, layout.method)
        for suffix in set(suffixes) - set(expected_tensors) - {"bias", "k_scale", "v_scale"}:
            found.fault(f"{module}.{suffix}", f"is not a tensor of {scheme.name}")
        for suffix, (dtype, expected) in expected_tensors.items():
            name = f"{module}.{suffix}"
            info = checkpoint.tensors.get(name)
            if info is None:
                found.fault(name, f"is missing; {scheme.name} needs it")
                whole = False
            elif (
                suffix in ("weight", "weight_packed", "weight_shape")
                and info.dtype != dtype
                or suffix in ("weight_scale", FP8_BLOCK_SUFFIX)
                and (info.dtype == "U8") != (dtype == "U8")
            ):
                found.fault(name, f"is stored as {info.dtype}; {scheme.name} has {dtype}")
                whole = False
            elif info.shape != expected and not (
                layout.method == "modelopt" and (info.shape, expected) == ((1,), ())
            ):
                found.fault(
                    name,
                    f"has the shape {list(info.shape)}; transformers expects exactly"
                    f" {list(expected)}",
                )
                whole = False
        if whole:
            linears[module] = (scheme, shape)
    left: dict[str, str] = {}
    for info in model_tensors.modules("linear", "lm_head", "router", "used directly").values():
        if info.name in stored:
            continue
        if layout.scheme_of(info.name) is None:
            left[info.name] = info.reason or "ignored in quantization_config"
        elif checkpoint.tensors[info.tensor].dtype in CODES:
            found.fault(info.tensor, "holds codes, but their scales are missing")
        elif info.kind == "linear" or checkpoint.tensors[info.tensor].dtype not in (
            "BF16",
            "F16",
            "F32",
        ):
            found.fault(
                info.tensor,
                "is neither quantized nor ignored in quantization_config: vLLM would use scales"
                " that were never loaded",
            )
        else:
            found.fault(
                info.tensor,
                "is not quantized but quantization_config targets it; add it to 'ignore'",
            )
    if (
        "lm_head" not in left
        and checkpoint.config.get("tie_word_embeddings")
        and layout.scheme_of("lm_head") is None
    ):
        left["lm_head"] = "tied to the embedding"  # the module is there, the tensor is not
    found.left = left
    return linears


def _check_formats(found: Verification, stored: Mapping[str, Any]) -> None:
    """Each group's `format` is one that runtimes decompress this scheme with."""
    for name, entry in stored["config_groups"].items():
        description = {
            "weights": entry["weights"],
            "input_activations": entry.get("input_activations"),
        }
        scheme = QuantScheme.parse(description, name)
        plain = {"naive-quantized", f"{scheme.weight.format.kind}-quantized"}
        allowed = (
            {layout_name(scheme)}
            if layout_name(scheme) in ("pack-quantized", "mxfp8-quantized")
            else plain
        )
        declared = entry.get("format") or stored.get("format")
        if declared not in allowed:
            found.fault(
                f"quantization_config.{name}",
                f"declares the format {declared!r}; {scheme.name} is stored as"
                f" {' or '.join(sorted(allowed))}",
            )


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


def _check_values(
    found: Verification,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    stored: Mapping[str, list[str]],
    linears: Mapping[str, tuple[QuantScheme, tuple[int, int]]],
    on_progress: Callable[[int, int], None],
) -> None:
    """No NaN, no infinity, no scale that is zero or negative, and what the base has; some rows in
    memory for each of as many threads as there are cores.
    """
    reader = _ValueReader(
        found,
        WeightStream(checkpoint, dequantizing=False),
        WeightStream(base) if base else None,
        stored,
        linears,
    )
    threads_before = torch.get_num_threads()
    done = 0
    with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        units = [
            [f"{module}.{suffix}" for suffix in suffixes] for module, suffixes in stored.items()
        ]
        units += [[name] for name in checkpoint.tensors if name.rpartition(".")[0] not in stored]
        futures = {pool.submit(reader.check, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                for tensor, message in future.result():
                    found.fault(tensor, message)
                done += len(futures[future])
                on_progress(done, found.tensors)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_before)
    # Threads finish in any order; what is reported doesn't depend on it.
    order = {name: number for number, name in enumerate(checkpoint.tensors)}
    found.faults.sort(key=lambda fault: order.get(fault[0], -1))
    if reader.differing:
        others = f" (and {len(reader.differing) - 1} more)" if len(reader.differing) > 1 else ""
        found.warnings.append(
            f"{min(reader.differing, key=order.get)} differs from the base's, though it isn't"
            f" quantized{others}"
        )
    found.warnings.sort()


@dataclass
class _ValueReader:
    """Checks the values of a Linear's tensors, or of one tensor, against rules and against the
    base.
    """

    found: Verification
    stream: WeightStream
    base: WeightStream | None
    stored: Mapping[str, list[str]]
    linears: Mapping[str, tuple[QuantScheme, tuple[int, int]]]
    # tensors that aren't quantized, and a little other than the base's
    differing: list[str] = field(default_factory=list)

    def check(self, names: list[str]) -> list[tuple[str, str]]:
        faults = []
        for name in names:
            message = self._values_fault(name)
            if message:
                faults.append((name, message))
        module = names[0].rpartition(".")[0]
        if self.base is not None and module in self.stored:
            faults += (
                self._against_base(module, f"{module}.weight")
                if not faults and module in self.linears
                else []
            )
        elif self.base is not None and names[0] in self.base.checkpoint.tensors and not faults:
            faults += self._left_against_base(names[0])
        return faults

    def _values_fault(self, name: str) -> str | None:
        """What is wrong with the values of one tensor, if anything."""
        suffix = name.rpartition(".")[2]
        is_scale = suffix in _SCALES  # a model may have others of its own, negative ones too
        for first, last in self.stream.steps(name):
            with self.stream.stored_rows(name, first, last) as rows:
                if is_scale and rows.dtype == torch.uint8:
                    if (rows == 255).any():
                        return "holds NaN scales (the byte 255)"
                elif is_scale:
                    if not torch.isfinite(rows.float()).all():
                        return "holds NaN or infinite scales"
                    if (rows.float() <= 0).any():
                        return "holds scales that are zero or negative"
                elif rows.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                    if _has_nonfinite_codes(rows):
                        return "holds NaN or infinite codes"
                elif rows.is_floating_point() and not torch.isfinite(rows).all():
                    return "holds NaN or infinity"
        return None

    def _left_against_base(self, name: str) -> list[tuple[str, str]]:
        """A tensor that isn't quantized is the base's; one that some algorithm has changed a little
        is worth a warning.
        """
        ours, theirs = self.stream.checkpoint.tensors[name], self.base.checkpoint.tensors[name]
        if ours.shape != theirs.shape:
            return [(name, f"has the shape {list(ours.shape)}; the base has {list(theirs.shape)}")]
        if ours.dtype in CODES or name in self.found.changed:
            # codes without their scales are a fault already; what algorithms changed is no longer
            # the base's
            return []
        signal = noise = 0.0
        for first, last in self.base.steps(name):
            with (
                self.stream.stored_rows(name, first, last) as rows,
                self.base.rows(name, first, last) as expected,
            ):
                if not torch.equal(rows, expected.to(rows.dtype)):
                    expected, difference = expected.double(), rows.double() - expected.double()
                    noise += float(difference.square().sum())
                signal += float(expected.double().square().sum())
        sqnr = power_ratio_db_of_floats(signal, noise)
        if not sqnr > LEAST_PLAUSIBLE_SQNR_DB:
            return [
                (
                    name,
                    f"isn't quantized but is {sqnr:.1f} dB from the base's: it is another tensor",
                )
            ]
        if noise or ours.dtype != theirs.dtype and name not in self.base.block_scales:
            self.differing.append(name)
        return []

    def _against_base(self, module: str, name: str) -> list[tuple[str, str]]:
        original = self.base.checkpoint.tensors.get(name)
        scheme, shape = self.linears[module]
        if original is None:
            return []
        if original.shape != shape:
            return [
                (name, f"stands for the shape {list(shape)}; the base has {list(original.shape)}")
            ]
        if name in self.found.changed:
            return []
        signal = noise = 0.0
        block_rows = scheme.weight.granularity.rows or 1
        # The scales are a few kilobytes to a megabyte; the codes come in steps.
        scales = self._scales(module, scheme, shape)
        codes_name = (
            f"{module}.weight_packed"
            if f"{module}.weight_packed" in self.stream.checkpoint.tensors
            else name
        )
        for first, last in self.base.steps(name, block_rows):
            scale = (
                scales
                if scales.shape[0] == 1 and scheme.weight.granularity == TENSOR
                else scales[first // block_rows : -(-last // block_rows)]
            )
            with (
                self.stream.stored_rows(codes_name, first, last) as stored,
                self.base.rows(name, first, last) as expected,
            ):
                codes = unpack_int8(stored)[:, : shape[1]] if codes_name != name else stored
                values = expected.float()
                rounded = ops.dequantize(QuantizedTensor(codes, scale, scheme.weight))
                # float32 within a step, float64 over the steps: good to 0.001 dB.
                signal += float(torch.dot(values.flatten(), values.flatten()))
                difference = (
                    values.sub_(rounded).flatten()
                    if values is not expected
                    else (values - rounded).flatten()
                )
                noise += float(torch.dot(difference, difference))
        sqnr = self.found.sqnr_db[module] = power_ratio_db_of_floats(signal, noise)
        if not sqnr > LEAST_PLAUSIBLE_SQNR_DB:
            return [
                (
                    name,
                    (
                        f"is {sqnr:.1f} dB from the base's weight; rounding to 8 bits leaves 30 dB"
                        " or more"
                    ),
                )
            ]
        return []

    def _scales(self, module: str, scheme: QuantScheme, shape: tuple[int, int]) -> Tensor:
        """The weight's scales in float32, [block rows, block columns], however the checkpoint
        stores them.
        """
        suffix = (
            FP8_BLOCK_SUFFIX
            if f"{module}.{FP8_BLOCK_SUFFIX}" in self.stream.checkpoint.tensors
            else "weight_scale"
        )
        stored = self.stream.checkpoint.read(f"{module}.{suffix}")
        scale = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
        return scale.reshape(scheme.weight.granularity.scale_shape(*shape))


def _check_manifest(found: Verification, checkpoint: Checkpoint) -> None:
    """Files that quantkit wrote are the ones that lie here now. Weights must be; a config,
    tokenizer or card may have been edited since.
    """
    path = checkpoint.path / MANIFEST_FILE
    if not path.is_file():
        return
    files = read_json(path, "").get("files")
    if not isinstance(files, Mapping) or not all(
        isinstance(entry, Mapping) for entry in files.values()
    ):
        found.warnings.append(
            f"{MANIFEST_FILE} is damaged, so files can't be compared with what was exported"
        )
        return
    present = {
        name: entry
        for name, entry in files.items()
        if name == Path(name).as_posix()
        and ".." not in Path(name).parts
        and (checkpoint.path / name).is_file()
    }
    digests = {name: blake3_file(checkpoint.path / name) for name in present}
    for name, entry in files.items():
        if digests.get(name) == entry.get("blake3"):
            continue
        message = (
            "is not the file that was exported"
            if name in digests
            else "was exported but is not here"
        )
        if name.endswith((".safetensors", ".index.json")):
            found.fault(
                name, f"{message} (its hash in {MANIFEST_FILE} differs); export or copy it again"
            )
        else:
            found.warnings.append(f"{name} {message}")


def _has_nonfinite_codes(tensor: Tensor) -> bool:
    magnitude = tensor.view(torch.uint8) & 0x7F
    # E4M3 has NaN at 0x7F alone; E5M2 has infinity at 0x7C and NaN above.
    return bool((magnitude >= (0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C)).any())


def _check_kv_scales(found: Verification, checkpoint: Checkpoint) -> None:
    by_suffix: dict[str, set[str]] = {"k_scale": set(), "v_scale": set()}
    for name in checkpoint.tensors:
        module = kv_scale_module(name)
        if module is not None:
            by_suffix[name.rpartition(".")[2]].add(module)
    keys, values = by_suffix.values()
    for module in sorted(keys ^ values):
        found.fault(module, "has only one of k_scale and v_scale")
    attentions = {
        name.rpartition(".")[0].rpartition(".")[0]
        for name in checkpoint.tensors
        if ".k_proj." in name
    }
    for module in sorted(attentions - keys - values) or ([""] if not keys else []):
        found.fault(
            f"{module}.k_scale" if module else "",
            "is missing, though there is a kv_cache_scheme: a server would use the scale 1",
        )


def _check_fused_sets(
    found: Verification, checkpoint: Checkpoint, linears: Mapping[str, tuple[QuantScheme, Any]]
) -> None:
    """Where a runtime merges Linears and a scale is per tensor, all members must carry the same
    one.
    """
    for members in fused_sets(linears):
        schemes = [linears[member][0] for member in members]
        suffixes = []
        if all(scheme.weight.granularity == TENSOR for scheme in schemes):
            suffixes.append("weight_scale")
        if all(scheme.needs_calibration for scheme in schemes):
            suffixes.append("input_scale")
        for suffix in suffixes:
            scales = [
                float(checkpoint.read(f"{member}.{suffix}").float().reshape(-1)[0])
                for member in members
            ]
            if len(set(scales)) > 1:
                names = ", ".join(member.rpartition(".")[2] for member in members)
                found.unequal.append(
                    (
                        f"{members[0]}.{suffix}",
                        f"differs among {names}, which runtimes merge under one scale",
                    )
                )


def _check_config_against_base(
    found: Verification, checkpoint: Checkpoint, base: Checkpoint
) -> None:
    """The model is the base's: what decides its shapes is the same, and what else differs is
    said.
    """
    quiet = {"quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    shaping = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    for key in sorted((checkpoint.config.keys() | base.config.keys()) - quiet):
        ours, theirs = checkpoint.config.get(key), base.config.get(key)
        # An output head that an algorithm changed is no longer the embedding.
        if ours == theirs or (
            key == "tie_word_embeddings"
            and ours is False
            and any(name not in base.tensors for name in found.changed)
        ):
            continue
        if key in ("hidden_size", "vocab_size", "model_type"):
            raise CheckpointError(
                f"{base.path} has {key} {theirs} and {checkpoint.path} {ours}: it is not the model"
                " that was quantized; give its own base"
            )
        if key in shaping:
            found.fault("config.json", f"has {key} {ours}; the base has {theirs}")
        else:
            found.warnings.append(f"config.json has {key} {ours!r}; the base has {theirs!r}")


def _check_names_against_base(
    found: Verification, checkpoint: Checkpoint, base: Checkpoint, stored: Mapping[str, list[str]]
) -> None:
    """Every tensor of the base is here, as it was or quantized, and nothing else is."""
    for name in base.tensors:
        module, _, suffix = name.rpartition(".")
        if (
            name not in checkpoint.tensors
            and not (suffix == "weight" and module in stored)
            and suffix != FP8_BLOCK_SUFFIX
        ):
            found.fault(name, "is in the base but not in this checkpoint")
    scales = (
        "weight_scale",
        FP8_BLOCK_SUFFIX,
        "input_scale",
        "weight_shape",
        "weight_packed",
        "k_scale",
        "v_scale",
    )
    for name in checkpoint.tensors:
        if (
            name not in base.tensors
            and name.rpartition(".")[2] not in scales
            and name not in found.changed
        ):
            found.fault(name, "is not in the base")
