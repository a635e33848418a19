"""How a quantized Linear lies in a checkpoint: its tensors and the `quantization_config`, written
and read.

compressed-tensors   every scheme; vLLM, SGLang, TensorRT-LLM and transformers read it
fp8                  128×128 blocks of E4M3, as DeepSeek ships them
modelopt             static per-tensor E4M3, for TensorRT-LLM

Shapes are exact, because transformers compares them (`[1]` not `[]`, `[O, 1]` not `[O]`) and
ModelOpt's scales are scalars.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.errors import CheckpointError, RecipeError
from quantkit.schemes.number_formats import E8M0, FP8_E4M3, INT8
from quantkit.schemes.scheme import SCHEMES, TENSOR, QuantScheme, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.ops.reference import QuantizedTensor

FORMATS = ("compressed-tensors", "fp8", "modelopt")
# The one scheme that a format holds; compressed-tensors holds all.
_ONLY_SCHEME = {"fp8": SCHEMES["fp8-block"], "modelopt": SCHEMES["fp8-tensor"]}
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


def format_obstacle(layout: str, schemes: Iterable[QuantScheme], kv_cache: bool) -> str | None:
    """Why a checkpoint of these schemes can't be written in this format, or None."""
    only = _ONLY_SCHEME.get(layout)
    others = [
        scheme
        for scheme in schemes
        if only is not None and scheme.same_arithmetic != only.same_arithmetic
    ]
    if others:
        return (
            f"--format {layout} holds {only.name} only, not {others[0].name}; use --scheme"
            f" {only.name}, or --format compressed-tensors"
        )
    if layout == "fp8" and kv_cache:
        return (
            "--format fp8 has no place for the scales of a KV cache; leave out --kv-cache, or use"
            " --format compressed-tensors"
        )
    return None


def shape_obstacle(scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
    """Why a Linear of this shape can't be stored under the scheme, or None."""
    columns = shape[1]
    if scheme.weight.granularity.name == "group" and columns % scheme.weight.granularity.columns:
        return (
            f"in_features {columns} is no multiple of the group size"
            f" {scheme.weight.granularity.columns}"
        )
    if layout_name(scheme) == "pack-quantized" and columns % CODES_PER_WORD:
        return (
            f"in_features {columns} is no multiple of {CODES_PER_WORD}, the codes of a packed word"
        )
    return None


def linear_tensors(
    scheme: QuantScheme, shape: tuple[int, int], layout: str = "compressed-tensors"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one Linear: suffix → (safetensors dtype, shape)."""
    rows, columns = shape
    weight = scheme.weight
    one = () if layout == "modelopt" else (1,)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    if layout_name(scheme) == "pack-quantized":
        tensors["weight_packed"] = ("I32", (rows, columns // CODES_PER_WORD))
        tensors["weight_shape"] = ("I64", (2,))
    else:
        tensors["weight"] = (weight.format.safetensors_name, (rows, columns))
    scale_shape = (
        one if weight.granularity == TENSOR else weight.granularity.scale_shape(rows, columns)
    )
    tensors[FP8_BLOCK_SUFFIX if layout == "fp8" else "weight_scale"] = (
        "U8" if weight.scale_format is E8M0 else "F32",
        scale_shape,
    )
    if scheme.needs_calibration:
        tensors["input_scale"] = ("F32", one)
    return tensors


def encode_rows(
    quantized: QuantizedTensor, scheme: QuantScheme, layout: str = "compressed-tensors"
) -> dict[str, Tensor]:
    """Some whole block rows of a quantized weight as rows of its tensors: the codes, and the scales
    unless all rows share one.
    """
    from quantkit.ops.packing import pack_int8

    tensors = {}
    for suffix in linear_tensors(scheme, tuple(quantized.qdata.shape), layout):
        if suffix == "weight":
            tensors[suffix] = quantized.qdata
        elif suffix == "weight_packed":
            tensors[suffix] = pack_int8(quantized.qdata)
        elif suffix in ("weight_scale", FP8_BLOCK_SUFFIX) and scheme.weight.granularity != TENSOR:
            tensors[suffix] = (
                _exponent_bytes(quantized.scale)
                if scheme.weight.scale_format is E8M0
                else quantized.scale
            )
    return tensors


def encode_constants(
    scheme: QuantScheme,
    shape: tuple[int, int],
    layout: str = "compressed-tensors",
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a Linear stores once: its shape if the codes are packed, one scale of all its weights,
    its static input scale.
    """
    import torch

    tensors = {}
    for suffix, (_, tensor_shape) in linear_tensors(scheme, shape, layout).items():
        if suffix == "weight_shape":
            tensors[suffix] = torch.tensor(shape, dtype=torch.int64)
        elif suffix == "weight_scale" and scheme.weight.granularity == TENSOR:
            assert weight_scale is not None, "a per-tensor scheme comes with its weight scale"
            tensors[suffix] = weight_scale.float().reshape(tensor_shape)
        elif suffix == "input_scale":
            assert input_scale is not None, "a static scheme comes with its input scale"
            tensors[suffix] = input_scale.float().reshape(tensor_shape)
    return tensors


def decode_linear(
    tensors: Mapping[str, Tensor], scheme: QuantScheme, name: str
) -> tuple[QuantizedTensor, Tensor | None]:
    """Read back one Linear, whoever wrote it: the quantized weight and its static input scale [1],
    if it has one.
    """
    import torch

    from quantkit.ops.packing import unpack_int8
    from quantkit.ops.reference import QuantizedTensor

    for suffix, tensor in tensors.items():
        wanted = {
            "weight": scheme.weight.format.torch_name,
            "weight_packed": "int32",
            "weight_shape": "int64",
        }.get(suffix)
        if wanted is not None and str(tensor.dtype) != f"torch.{wanted}":
            raise CheckpointError(
                f"{name}.{suffix} is stored as {str(tensor.dtype).removeprefix('torch.')};"
                f" {scheme.name} has {wanted}"
            )
        if suffix in ("weight", "weight_packed") and tensor.dim() != 2:
            raise CheckpointError(
                f"{name}.{suffix} has the shape {list(tensor.shape)}; a Linear's weight has two"
                " dimensions"
            )
    if layout_name(scheme) == "pack-quantized":
        rows, columns = map(int, _required(tensors, "weight_shape", name))
        codes = unpack_int8(_required(tensors, "weight_packed", name))[:rows, :columns]
    else:
        codes = _required(tensors, "weight", name)
    scale_name = FP8_BLOCK_SUFFIX if FP8_BLOCK_SUFFIX in tensors else "weight_scale"
    stored = _required(tensors, scale_name, name)
    expected = scheme.weight.granularity.scale_shape(*codes.shape)
    # Others write [O] for [O, 1] and [] for [1]; anything else that differs would scale the wrong
    # weights.
    if [size for size in stored.shape if size != 1] != [size for size in expected if size != 1]:
        raise CheckpointError(
            f"{name}.{scale_name} has the shape {list(stored.shape)}; {scheme.weight} of"
            f" {list(codes.shape)} needs {list(expected)}"
        )
    if (stored.dtype == torch.uint8) != (scheme.weight.scale_format is E8M0) or not (
        stored.is_floating_point() or stored.dtype == torch.uint8
    ):
        raise CheckpointError(
            f"{name}.{scale_name} is stored as {str(stored.dtype).removeprefix('torch.')}, which is"
            f" not how {scheme.name} keeps its scales"
        )
    scale = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
    input_scale = (
        _required(tensors, "input_scale", name).float().reshape(-1)
        if scheme.needs_calibration
        else None
    )
    if input_scale is not None and input_scale.numel() != 1:
        raise CheckpointError(
            f"{name}.input_scale holds {input_scale.numel()} values; a static scale is one"
        )
    return QuantizedTensor(codes, scale.reshape(expected), scheme.weight), input_scale


def _required(tensors: Mapping[str, Tensor], suffix: str, name: str) -> Tensor:
    if suffix not in tensors:
        raise CheckpointError(
            f"the tensor {name}.{suffix} is missing from the checkpoint; `quantkit verify` lists"
            " all faults"
        )
    return tensors[suffix]


def _exponent_bytes(scale: Tensor) -> Tensor:
    import torch

    return (torch.log2(scale).round() + 127).to(torch.uint8)


def quantization_config(
    layout: str,
    schemes: Mapping[str, QuantScheme],
    left: Sequence[str],
    default: QuantScheme,
    kv_cache: bool,
    by_name: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint in this format; arguments as for
    `compressed_tensors_config`.
    """
    if layout == "compressed-tensors":
        return compressed_tensors_config(schemes, left, default, kv_cache, by_name)
    if layout == "fp8":
        granularity = _ONLY_SCHEME["fp8"].weight.granularity
        block_size = [granularity.rows, granularity.columns]
        # Full names, each member of a fused set: runtimes match prefixes, patterns or names, and
        # these mean the same to all of them.
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": block_size,
            "modules_to_not_convert": list(left),
        }
    tensor = {"num_bits": 8, "type": "float", "dynamic": False}
    config = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": _PRODUCER,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": tensor, "input_activations": tensor}
        },
        "ignore": list(left),
    }
    return config | ({"kv_cache_scheme": tensor} if kv_cache else {})


def modelopt_file(left: Sequence[str], kv_cache: bool) -> dict[str, Any]:
    """hf_quant_config.json, the same facts again: TensorRT-LLM prefers it, vLLM and SGLang prefer
    config.json.
    """
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if kv_cache else None,
            "exclude_modules": list(left),
        },
    }


# Readers take a file without a quant_method for ModelOpt's by this name.
_PRODUCER = {"name": "modelopt", "version": f"written by quantkit {__version__}"}


def kv_scale_name(module: str, suffix: str, layout: str = "compressed-tensors") -> str:
    """The tensor with the scale of an attention module's keys (suffix "k_scale") or values
    ("v_scale").
    """
    return f"{module}.{suffix[0]}_proj.{suffix}" if layout == "modelopt" else f"{module}.{suffix}"


def kv_scale_module(name: str) -> str | None:
    """The attention module whose KV scale this tensor is, in any format's spelling; None for other
    tensors.
    """
    module, _, suffix = name.rpartition(".")
    if suffix not in ("k_scale", "v_scale"):
        return None
    return module.removesuffix(f".{suffix[0]}_proj")


def compressed_tensors_config(
    schemes: Mapping[str, QuantScheme],
    left: Sequence[str],
    default: QuantScheme,
    kv_cache: bool,
    by_name: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    schemes: Linear → scheme, of every quantized one; left: Linears that stay; default: the scheme
    that most have.
    One group targets the class name, which every runtime takes; several name their modules, because
    TensorRT-LLM matches names only and no class name. by_name: name them even so, where a model has
    Linears that no tensor tells of (a tied output head).
    """
    groups: dict[QuantScheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    ordered = sorted(groups, key=lambda scheme: (scheme != default, -len(groups[scheme])))
    config_groups = {}
    for number, scheme in enumerate(ordered):
        entry: dict[str, Any] = {
            "targets": ["Linear"] if len(groups) == 1 and not by_name else groups[scheme],
            "weights": scheme.weight.to_arguments(),
        }
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
            if method == "modelopt":
                return cls._modelopt(stored)
        except (RecipeError, KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"config.json's quantization_config ({method}) can't be used: {reason}; give the"
                " original model, or fetch this one again"
            ) from None
        raise CheckpointError(
            f"the checkpoint is quantized with '{method}', which quantkit doesn't read; it reads"
            " compressed-tensors, block fp8 and modelopt FP8"
        )

    @classmethod
    def _compressed_tensors(cls, stored: Mapping[str, Any]) -> QuantizationLayout:
        groups = []
        for target in [
            *(stored.get("ignore") or ()),
            *(target for entry in stored["config_groups"].values() for target in entry["targets"]),
        ]:
            if target.startswith("re:"):
                re.compile(target[3:])
        for name, entry in stored["config_groups"].items():
            description = {
                "weights": entry["weights"],
                "input_activations": entry.get("input_activations"),
            }
            groups.append((tuple(entry["targets"]), QuantScheme.parse(description, name)))
        kv_scheme = stored.get("kv_cache_scheme")
        if (
            kv_scheme is not None
            and QuantSpec.from_arguments(kv_scheme, "kv_cache_scheme") != KV_SPEC
        ):
            raise CheckpointError(
                "the kv_cache_scheme is not static FP8 per tensor, the one that quantkit reads"
            )
        return cls(
            "compressed-tensors",
            tuple(groups),
            tuple(stored.get("ignore") or ()),
            kv_scheme is not None,
        )

    @classmethod
    def _fp8_block(cls, stored: Mapping[str, Any]) -> QuantizationLayout:
        if not stored.get("weight_block_size") or stored.get("activation_scheme") != "dynamic":
            raise CheckpointError(
                "the 'fp8' checkpoint is not in blocks with dynamic inputs, the only such form that"
                " quantkit reads"
            )
        if (
            not isinstance(stored["weight_block_size"], list)
            or len(stored["weight_block_size"]) != 2
        ):
            raise CheckpointError(
                f"the fp8 checkpoint's weight_block_size is {stored['weight_block_size']!r}, not"
                " [rows, columns]; fetch its config.json again"
            )
        rows, columns = stored["weight_block_size"]
        weight = {
            "num_bits": 8,
            "type": "float",
            "strategy": "block",
            "block_structure": [rows, columns],
        }
        inputs = {
            "num_bits": 8,
            "type": "float",
            "strategy": "group",
            "group_size": columns,
            "dynamic": True,
        }
        scheme = QuantScheme.parse({"weights": weight, "input_activations": inputs})
        # A name leaves the module and all below it, wherever its path begins.
        ignore = tuple(
            rf"re:(.*\.)?{re.escape(part)}(\.|\Z)"
            for part in stored.get("modules_to_not_convert") or stored.get("ignored_layers") or ()
        )
        return cls("fp8", ((("Linear",), scheme),), ignore, False)

    @classmethod
    def _modelopt(cls, stored: Mapping[str, Any]) -> QuantizationLayout:
        if stored.get("quant_algo") != "FP8":
            raise CheckpointError(
                f"the ModelOpt checkpoint is in {stored.get('quant_algo')!r}; quantkit reads its"
                " static per-tensor FP8 only"
            )
        left = stored.get("exclude_modules") or stored.get("ignore") or ()
        # A pattern leaves also what lies below the module that it names.
        ignore = tuple(
            "re:" + fnmatch.translate(entry).removesuffix(r"\Z") + r"(\.|\Z)" for entry in left
        )
        kv_cache = stored.get("kv_cache_quant_algo") == "FP8" or isinstance(
            stored.get("kv_cache_scheme"), Mapping
        )
        return cls("modelopt", ((("Linear",), _ONLY_SCHEME["modelopt"]),), ignore, kv_cache)

    @property
    def schemes(self) -> list[QuantScheme]:
        return [scheme for _, scheme in self.groups]

    def scheme_of(self, module: str, class_name: str = "Linear") -> QuantScheme | None:
        """The scheme of a module, or None where it is ignored or no group targets it. Exact names
        win over patterns, patterns over classes.
        """
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
    modules = {
        name.rpartition(".")[0]: [] for name in tensor_names if name.rpartition(".")[2] in marks
    }
    for name in tensor_names:
        module, _, suffix = name.rpartition(".")
        if module in modules:
            modules[module].append(suffix)
    return modules
