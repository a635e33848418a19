"""How a quantized Linear lies in a checkpoint: its tensors and the `quantization_config`, written and read.

Written: compressed-tensors, which vLLM, SGLang, TensorRT-LLM and transformers read. Read besides: the `fp8` block format of
DeepSeek's checkpoints. Shapes are exact because transformers compares them: `[1]` not `[]`, `[O, 1]` not `[O]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import E8M0, FP8_E4M3, INT8
from quantkit.scheme import TENSOR, QuantScheme, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.quantize import QuantizedTensor

KV_SPEC = QuantSpec(FP8_E4M3, TENSOR)
CODES_PER_WORD = 4  # INT8 codes in one 32-bit word of `packing`
FP8_BLOCK_SUFFIX = "weight_scale_inv"  # it multiplies; the name is history


def layout_name(scheme: QuantScheme) -> str:
    """compressed-tensors' `format` of this scheme."""
    if scheme.weight.scale_format is E8M0:
        return "mxfp8-quantized"
    if scheme.input is None:
        return "pack-quantized" if scheme.weight.format is INT8 else "naive-quantized"
    return "int-quantized" if scheme.weight.format is INT8 else "float-quantized"


def shape_obstacle(scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
    """Why a Linear of this shape can't be stored under the scheme, or None."""
    columns = shape[1]
    if scheme.weight.granularity.name == "group" and columns % scheme.weight.granularity.columns:
        return f"in_features {columns} is no multiple of the group size {scheme.weight.granularity.columns}"
    if layout_name(scheme) == "pack-quantized" and columns % CODES_PER_WORD:
        return f"in_features {columns} is no multiple of {CODES_PER_WORD}, the codes of a packed word"
    return None


def linear_tensors(scheme: QuantScheme, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one Linear: suffix → (safetensors dtype, shape)."""
    rows, columns = shape
    weight = scheme.weight
    scale_shape = (1,) if weight.granularity == TENSOR else weight.granularity.scale_shape(rows, columns)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    if layout_name(scheme) == "pack-quantized":
        tensors["weight_packed"] = ("I32", (rows, columns // CODES_PER_WORD))
        tensors["weight_shape"] = ("I64", (2,))
    else:
        tensors["weight"] = (weight.format.safetensors_name, (rows, columns))
    tensors["weight_scale"] = ("U8" if weight.scale_format is E8M0 else "F32", scale_shape)
    if scheme.needs_calibration:
        tensors["input_scale"] = ("F32", (1,))
    return tensors


def encode_linear(quantized: QuantizedTensor, scheme: QuantScheme, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """One quantized weight as the tensors of `linear_tensors`."""
    import torch

    from quantkit.packing import pack_int8

    shape = tuple(quantized.qdata.shape)
    tensors = {}
    for suffix, (_, tensor_shape) in linear_tensors(scheme, shape).items():
        if suffix == "weight":
            tensors[suffix] = quantized.qdata
        elif suffix == "weight_packed":
            tensors[suffix] = pack_int8(quantized.qdata)
        elif suffix == "weight_shape":
            tensors[suffix] = torch.tensor(shape, dtype=torch.int64)
        elif suffix == "weight_scale":
            scale = quantized.scale
            tensors[suffix] = _exponent_bytes(scale) if scheme.weight.scale_format is E8M0 else scale.reshape(tensor_shape)
        elif suffix == "input_scale":
            assert input_scale is not None, "a static scheme comes with its input scale"
            tensors[suffix] = input_scale.float().reshape(tensor_shape)
    return tensors


def decode_linear(tensors: Mapping[str, Tensor], scheme: QuantScheme, name: str) -> tuple[QuantizedTensor, Tensor | None]:
    """Read back one Linear, whoever wrote it: the quantized weight and its static input scale [1], if it has one."""
    import torch

    from quantkit.packing import unpack_int8
    from quantkit.quantize import QuantizedTensor

    for suffix, tensor in tensors.items():
        wanted = {"weight": scheme.weight.format.torch_name, "weight_packed": "int32", "weight_shape": "int64"}.get(suffix)
        if wanted is not None and str(tensor.dtype) != f"torch.{wanted}":
            raise CheckpointError(f"{name}.{suffix} is stored as {str(tensor.dtype).removeprefix('torch.')}; {scheme.name} has {wanted}")
        if suffix in ("weight", "weight_packed") and tensor.dim() != 2:
            raise CheckpointError(f"{name}.{suffix} has the shape {list(tensor.shape)}; a Linear's weight has two dimensions")
    if layout_name(scheme) == "pack-quantized":
        rows, columns = map(int, _required(tensors, "weight_shape", name))
        codes = unpack_int8(_required(tensors, "weight_packed", name))[:rows, :columns]
    else:
        codes = _required(tensors, "weight", name)
    scale_name = FP8_BLOCK_SUFFIX if FP8_BLOCK_SUFFIX in tensors else "weight_scale"
    stored = _required(tensors, scale_name, name)
    expected = scheme.weight.granularity.scale_shape(*codes.shape)
    # Others write [O] for [O, 1] and [] for [1]; anything else that differs would scale the wrong weights.
    if [size for size in stored.shape if size != 1] != [size for size in expected if size != 1]:
        raise CheckpointError(f"{name}.{scale_name} has the shape {list(stored.shape)}; {scheme.weight} of {list(codes.shape)} needs {list(expected)}")
    if (stored.dtype == torch.uint8) != (scheme.weight.scale_format is E8M0) or not (stored.is_floating_point() or stored.dtype == torch.uint8):
        raise CheckpointError(f"{name}.{scale_name} is stored as {str(stored.dtype).removeprefix('torch.')}, which is not how {scheme.name} keeps its scales")
    scale = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
    input_scale = _required(tensors, "input_scale", name).float().reshape(-1) if scheme.needs_calibration else None
    if input_scale is not None and input_scale.numel() != 1:
        raise CheckpointError(f"{name}.input_scale holds {input_scale.numel()} values; a static scale is one")
    return QuantizedTensor(codes, scale.reshape(expected), scheme.weight), input_scale


def _required(tensors: Mapping[str, Tensor], suffix: str, name: str) -> Tensor:
    if suffix not in tensors:
        raise CheckpointError(f"the tensor {name}.{suffix} is missing from the checkpoint; `quantkit verify` lists all faults")
    return tensors[suffix]


def _exponent_bytes(scale: Tensor) -> Tensor:
    import torch

    return (torch.log2(scale).round() + 127).to(torch.uint8)


def compressed_tensors_config(schemes: Mapping[str, QuantScheme], left: Sequence[str], default: QuantScheme, kv_cache: bool) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    schemes: Linear → scheme, of every quantized one; left: Linears that stay; default: the scheme that most have.
    One group targets the class name, which every runtime takes; several name their modules, because TensorRT-LLM matches
    names only and no class name.
    """
    groups: dict[QuantScheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    ordered = sorted(groups, key=lambda scheme: (scheme != default, -len(groups[scheme])))
    config_groups = {}
    for number, scheme in enumerate(ordered):
        entry: dict[str, Any] = {"targets": ["Linear"] if len(groups) == 1 else groups[scheme], "weights": scheme.weight.to_arguments()}
        if scheme.input is not None:
            entry["input_activations"] = scheme.input.to_arguments()
        if len(groups) > 1:
            entry["format"] = layout_name(scheme)
        config_groups[f"group_{number}"] = entry
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout_name(ordered[0]) if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(left),
        "config_groups": config_groups,
    }
    if kv_cache:
        config["kv_cache_scheme"] = KV_SPEC.to_arguments()
    return config


@dataclass(frozen=True)
class QuantizationLayout:
    """A checkpoint's `quantization_config`, understood: which scheme a module has."""

    method: str
    groups: tuple[tuple[tuple[str, ...], QuantScheme], ...]
    ignore: tuple[str, ...]
    kv_cache: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> QuantizationLayout | None:
        """From a model's config.json; None when the model is not quantized."""
        stored = config.get("quantization_config")
        if stored is None:
            return None
        if not isinstance(stored, Mapping):
            raise CheckpointError("config.json has a quantization_config that is not an object")
        method = stored.get("quant_method")
        try:
            if method == "compressed-tensors":
                return cls._compressed_tensors(stored)
            if method == "fp8":
                return cls._fp8_block(stored)
        except (RecipeError, KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"the quantization_config can't be used: {reason}") from None
        raise CheckpointError(f"the checkpoint is quantized with '{method}', which quantkit doesn't read; it reads compressed-tensors and block fp8")

    @classmethod
    def _compressed_tensors(cls, stored: Mapping[str, Any]) -> QuantizationLayout:
        groups = []
        for target in [*(stored.get("ignore") or ()), *(target for entry in stored["config_groups"].values() for target in entry["targets"])]:
            if target.startswith("re:"):
                re.compile(target[3:])
        for name, entry in stored["config_groups"].items():
            description = {"weights": entry["weights"], "input_activations": entry.get("input_activations")}
            groups.append((tuple(entry["targets"]), QuantScheme.parse(description, name)))
        kv_scheme = stored.get("kv_cache_scheme")
        if kv_scheme is not None and QuantSpec.from_arguments(kv_scheme, "kv_cache_scheme") != KV_SPEC:
            raise CheckpointError("the kv_cache_scheme is not static FP8 per tensor, the one that quantkit reads")
        return cls("compressed-tensors", tuple(groups), tuple(stored.get("ignore") or ()), kv_scheme is not None)

    @classmethod
    def _fp8_block(cls, stored: Mapping[str, Any]) -> QuantizationLayout:
        if not stored.get("weight_block_size") or stored.get("activation_scheme") != "dynamic":
            raise CheckpointError("the 'fp8' checkpoint is not in blocks with dynamic inputs, the only such form that quantkit reads")
        rows, columns = stored["weight_block_size"]
        weight = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [rows, columns]}
        inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": columns, "dynamic": True}
        scheme = QuantScheme.parse({"weights": weight, "input_activations": inputs})
        ignore = tuple("re:.*" + re.escape(part) for part in stored.get("modules_to_not_convert") or ())
        return cls("fp8", ((("Linear",), scheme),), ignore, False)

    @property
    def schemes(self) -> list[QuantScheme]:
        return [scheme for _, scheme in self.groups]

    def scheme_of(self, module: str, class_name: str = "Linear") -> QuantScheme | None:
        """The scheme of a module, or None where it is ignored or no group targets it. Exact names win over patterns, patterns over classes."""
        if any(_matches(entry, module, class_name) for entry in self.ignore):
            return None
        for rank in (_is_exact, _is_pattern, _is_class):
            for targets, scheme in self.groups:
                if any(rank(target, module, class_name) for target in targets):
                    return scheme
        return None


def _is_exact(target: str, module: str, _: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str, _: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_class(target: str, _: str, class_name: str) -> bool:
    return target == class_name


def _matches(target: str, module: str, class_name: str) -> bool:
    return any(rank(target, module, class_name) for rank in (_is_exact, _is_pattern, _is_class))


def stored_linears(tensor_names: Iterable[str]) -> dict[str, list[str]]:
    """Modules that hold quantized tensors: module → the suffixes of its tensors."""
    marks = ("weight_scale", FP8_BLOCK_SUFFIX, "weight_packed")
    tensor_names = list(tensor_names)
    modules = {name.rpartition(".")[0]: [] for name in tensor_names if name.rpartition(".")[2] in marks}
    for name in tensor_names:
        module, _, suffix = name.rpartition(".")
        if module in modules:
            modules[module].append(suffix)
    return modules
