"""The interface of a checkpoint format: names and encoding of a quantized Linear's tensors, and
their description in `config.json`.

Shapes are exact, because transformers compares them: `[1]` isn't `[]`, and `[O, 1]` isn't `[O]`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.schemes.number_formats import E8M0, FP8_E4M3
from quantkit.schemes.quant_spec import TENSOR, QuantSpec
from quantkit.schemes.scheme import QuantScheme
from quantkit.schemes.serving import Support

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.ops.reference import QuantizedTensor

KV_SPEC = QuantSpec(FP8_E4M3, TENSOR)
KV_SUFFIXES = ("k_scale", "v_scale")
# Tensors of one Linear: suffix → (safetensors dtype, shape).
StoredTensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class QuantizedLayers:
    """The facts about a model that a `quantization_config` states.

    schemes: Linear → scheme, for every quantized Linear.
    skipped: names of the Linears that aren't quantized.
    default: the scheme of most Linears.
    kv_cache: whether there are scales for an FP8 KV cache.
    by_name: list each Linear even if one scheme could target the class, because a tied
        output head has no tensor of its own.
    skipped_elsewhere: patterns for skipped Linears that a runtime has in another module.
    """

    schemes: Mapping[str, QuantScheme]
    skipped: Sequence[str]
    default: QuantScheme
    kv_cache: bool = False
    by_name: bool = False
    skipped_elsewhere: Sequence[str] = ()


class Format(ABC):
    """One way to store quantized Linears.

    A new format overrides whatever differs from compressed-tensors' unpacked codes and scales. It
    is listed in `checkpoint.formats.FORMATS`.

    name: its name in options, and the value of `quant_method` in config.json.
    label: its name in messages.
    only_scheme: the one scheme that it holds; None if it holds all.
    runtimes: runtime → whether it loads the format; None if that depends on the scheme alone.
    holds_kv_cache: whether it can store the scales of a KV cache.
    scale_suffix: last part of the name of a weight's scales.
    scalar_shape: shape of a scale that a whole tensor shares.
    is_source: whether an export may read such a checkpoint and dequantize it on the way.
    side_file: name of a file next to config.json that repeats the config, or None.
    """

    name: str
    label: str
    only_scheme: QuantScheme | None = None
    runtimes: Mapping[str, Support] | None = None
    holds_kv_cache = True
    scale_suffix = "weight_scale"
    scalar_shape: tuple[int, ...] = (1,)
    is_source = False
    side_file: str | None = None

    # ---- Limits.

    def obstacle(self, schemes: Iterable[QuantScheme], kv_cache: bool) -> str | None:
        """Why a checkpoint of these schemes can't be written in this format, or None."""
        only = self.only_scheme
        others = [
            scheme
            for scheme in schemes
            if only is not None and scheme.same_arithmetic != only.same_arithmetic
        ]
        if only is not None and others:
            return (
                f"`format={self.name!r}` holds {only.name} only, not {others[0].name}; use"
                f" `recipe={only.name!r}`, or `format='compressed-tensors'`"
            )
        if kv_cache and not self.holds_kv_cache:
            return (
                f"`format={self.name!r}` has no place for the scales of a KV cache; leave out"
                " `kv_cache`, or use `format='compressed-tensors'`"
            )
        return None

    def shape_obstacle(self, scheme: QuantScheme, shape: Sequence[int]) -> str | None:
        """Why a Linear [out_features, in_features] can't be stored under the scheme, or None."""
        granularity, columns = scheme.weight.granularity, shape[1]
        if granularity.name == "group" and granularity.columns and columns % granularity.columns:
            return f"in_features {columns} is no multiple of the group size {granularity.columns}"
        return None

    # ---- Tensors.

    def codes_suffix(self, scheme: QuantScheme) -> str:
        """The last part of the name of the tensor that holds a weight's codes."""
        return "weight"

    def code_tensors(self, scheme: QuantScheme, shape: Sequence[int]) -> StoredTensors:
        """The tensors that hold a weight's codes and whatever is needed to read them, without
        scales.
        """
        rows, columns = shape
        return {"weight": (scheme.weight.format.safetensors_name, (rows, columns))}

    def tensors(self, scheme: QuantScheme, shape: Sequence[int]) -> StoredTensors:
        """All tensors of one Linear [out_features, in_features], except its bias."""
        spec = scheme.weight
        tensors = dict(self.code_tensors(scheme, shape))
        tensors[self.scale_suffix] = (
            spec.scale_format.safetensors_name if spec.scale_format else "F32",
            self.scalar_shape
            if spec.granularity == TENSOR
            else spec.granularity.scale_shape(*shape),
        )
        if scheme.needs_calibration:
            tensors["input_scale"] = ("F32", self.scalar_shape)
        return tensors

    @property
    def marks(self) -> tuple[str, ...]:
        """Suffixes that only quantized modules have."""
        return (self.scale_suffix,)

    @property
    def added_suffixes(self) -> tuple[str, ...]:
        """Suffixes of tensors that the original model doesn't have."""
        return (self.scale_suffix, "input_scale", *KV_SUFFIXES)

    def weight_shape(
        self, scheme: QuantScheme, stored: StoredTensors, read: Callable[[str], Tensor] | None
    ) -> tuple[int, ...] | None:
        """The shape [out_features, in_features] of a Linear's weight, or None if its tensors don't
        tell.

        stored: the Linear's tensors.
        read: suffix → the tensor's values; None if only headers are available.
        """
        return stored["weight"][1] if "weight" in stored else None

    # ---- Encoding.

    def encode_codes(self, codes: Tensor, scheme: QuantScheme) -> Tensor:
        """Codes [rows, columns] as the tensor of codes stores them."""
        return codes

    def encode_rows(self, quantized: QuantizedTensor, scheme: QuantScheme) -> dict[str, Tensor]:
        """Whole block rows of a quantized weight as rows of its stored tensors: suffix → tensor.

        These are the codes, and the scales unless all rows share one.
        """
        from quantkit.ops.packing import encode_scales

        tensors = {self.codes_suffix(scheme): self.encode_codes(quantized.qdata, scheme)}
        if scheme.weight.granularity != TENSOR:
            tensors[self.scale_suffix] = encode_scales(quantized.scale, scheme.weight.scale_format)
        return tensors

    def encode_constants(
        self,
        scheme: QuantScheme,
        shape: Sequence[int],
        weight_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of which a Linear stores one value: suffix → tensor.

        shape: [out_features, in_features].
        weight_scale: the scale of a per-tensor scheme, one value.
        input_scale: the static input scale, one value.
        """
        tensors = {}
        if scheme.weight.granularity == TENSOR:
            assert weight_scale is not None, "a per-tensor scheme comes with its weight scale"
            tensors[self.scale_suffix] = weight_scale.float().reshape(self.scalar_shape)
        if scheme.needs_calibration:
            assert input_scale is not None, "a static scheme comes with its input scale"
            tensors["input_scale"] = input_scale.float().reshape(self.scalar_shape)
        return tensors

    # ---- Decoding.

    def decode_codes(self, stored: Tensor, scheme: QuantScheme, columns: int) -> Tensor:
        """Rows of the stored tensor of codes as codes [rows, columns]."""
        return stored

    def decode(
        self, tensors: Mapping[str, Tensor], scheme: QuantScheme, name: str
    ) -> tuple[QuantizedTensor, Tensor | None]:
        """Decode one Linear, whichever tool wrote it: the quantized weight, and its static input
        scale [1] or None.

        tensors: suffix → tensor.
        name: the Linear, for messages.

        Raises CheckpointError if a tensor is missing or has a wrong dtype or shape.
        """
        from quantkit.ops.reference import QuantizedTensor

        self._require_code_dtypes(tensors, scheme, name)
        codes = self._codes(tensors, scheme, name)
        scale = self._scales(tensors, scheme, codes.shape, name)
        if not scheme.needs_calibration:
            return QuantizedTensor(codes, scale, scheme.weight), None
        input_scale = required(tensors, "input_scale", name).float().reshape(-1)
        if input_scale.numel() != 1:
            raise CheckpointError(
                f"{name}.input_scale holds {input_scale.numel()} values; a static scale is one"
            )
        return QuantizedTensor(codes, scale, scheme.weight), input_scale

    def _require_code_dtypes(
        self, tensors: Mapping[str, Tensor], scheme: QuantScheme, name: str
    ) -> None:
        for suffix, wanted in self.torch_dtypes(scheme).items():
            tensor = tensors.get(suffix)
            if tensor is None:
                continue
            if dtype_name(tensor) != wanted:
                raise CheckpointError(
                    f"{name}.{suffix} is stored as {dtype_name(tensor)}; {scheme.name} has {wanted}"
                )
            if suffix == self.codes_suffix(scheme) and tensor.dim() != 2:
                raise CheckpointError(
                    f"{name}.{suffix} has the shape {list(tensor.shape)}; a Linear's weight has two"
                    " dimensions"
                )

    def torch_dtypes(self, scheme: QuantScheme) -> dict[str, str]:
        """Suffix → torch's name of the dtype, for each tensor of `code_tensors`."""
        return {"weight": scheme.weight.format.torch_name}

    def _codes(self, tensors: Mapping[str, Tensor], scheme: QuantScheme, name: str) -> Tensor:
        """The codes [out_features, in_features] of a whole Linear."""
        return required(tensors, "weight", name)

    def _scales(
        self, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: Sequence[int], name: str
    ) -> Tensor:
        """The weight's scales [block rows, block columns], float32."""
        from quantkit.ops.packing import decode_scales

        stored = required(tensors, self.scale_suffix, name)
        expected = scheme.weight.granularity.scale_shape(*shape)
        # Other tools write [O] for [O, 1] and [] for [1]. Any other difference would scale the
        # wrong weights.
        if [size for size in stored.shape if size != 1] != [size for size in expected if size != 1]:
            raise CheckpointError(
                f"{name}.{self.scale_suffix} has the shape {list(stored.shape)}; {scheme.weight} of"
                f" {list(shape)} needs {list(expected)}"
            )
        is_exponent = dtype_name(stored) == E8M0.torch_name
        if is_exponent != (scheme.weight.scale_format == E8M0) or not (
            stored.is_floating_point() or is_exponent
        ):
            raise CheckpointError(
                f"{name}.{self.scale_suffix} is stored as {dtype_name(stored)}, which is not how"
                f" {scheme.name} keeps its scales"
            )
        return decode_scales(stored).reshape(expected)

    # ---- KV cache scales.

    def kv_scale_name(self, module: str, suffix: str) -> str:
        """The name of the tensor with the scale of an attention module's keys or values.

        suffix: "k_scale" or "v_scale".
        """
        return f"{module}.{suffix}"

    def kv_scale_module(self, name: str) -> str | None:
        """The attention module that a KV scale belongs to; None for other tensors."""
        module, _, suffix = name.rpartition(".")
        return module if suffix in KV_SUFFIXES else None

    # ---- Checks.

    def unexpected(
        self, scheme: QuantScheme, shape: Sequence[int], suffixes: Iterable[str]
    ) -> list[str]:
        """Suffixes of a Linear's tensors that its scheme doesn't have in this format."""
        return sorted(set(suffixes) - set(self.tensors(scheme, shape)) - {"bias", *KV_SUFFIXES})

    def tensor_faults(
        self, module: str, scheme: QuantScheme, shape: Sequence[int], stored: StoredTensors
    ) -> list[tuple[str, str]]:
        """Tensors of a Linear that are missing, or stored differently than runtimes read them:
        (tensor, message).
        """
        codes = self.code_tensors(scheme, shape)
        faults = []
        for suffix, (dtype, expected) in self.tensors(scheme, shape).items():
            name = f"{module}.{suffix}"
            if suffix not in stored:
                faults.append((name, f"is missing; {scheme.name} needs it"))
                continue
            its_dtype, its_shape = stored[suffix]
            exponent = E8M0.safetensors_name
            if (suffix in codes and its_dtype != dtype) or (
                suffix == self.scale_suffix and (its_dtype == exponent) != (dtype == exponent)
            ):
                faults.append((name, f"is stored as {its_dtype}; {scheme.name} has {dtype}"))
            elif not self.accepts_shape(its_shape, expected):
                faults.append(
                    (
                        name,
                        f"has the shape {list(its_shape)}; transformers expects exactly"
                        f" {list(expected)}",
                    )
                )
        return faults

    def accepts_shape(self, stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        """Whether runtimes accept a tensor stored in this shape instead of the expected one."""
        return stored == expected

    def config_faults(self, stored: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Faults of a `quantization_config` that can still be read: (key, message)."""
        return []

    # ---- As the source of an export.

    def block_scales(self, stored: StoredTensors, spec: QuantSpec) -> dict[str, str]:
        """Weight → the tensor of its block scales, for a format that an export dequantizes.

        stored: every tensor of the checkpoint, by its full name.

        Raises CheckpointError if codes lack their scales, or scales their codes.
        """
        return {}

    # ---- The config.

    @abstractmethod
    def config(self, layers: QuantizedLayers) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint."""

    @abstractmethod
    def read_config(self, stored: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config` with this format's `quant_method`.

        Raises CheckpointError, RecipeError, KeyError, TypeError or ValueError if it can't be used.
        """

    def side_file_content(self, layers: QuantizedLayers) -> dict[str, Any]:
        """The content of `side_file`."""
        raise NotImplementedError(f"{self.name} has no side file")

    def config_of_side_file(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The `quantization_config` that is equivalent to a side file's content."""
        raise NotImplementedError(f"{self.name} has no side file")


@dataclass(frozen=True)
class QuantizationConfig:
    """A checkpoint's parsed `quantization_config`: the scheme of each module.

    file_format: how the tensors are stored.
    groups: (targets, scheme) of each group; targets are module names, `re:` patterns or class
        names.
    ignore: targets that aren't quantized.
    kv_cache: whether there are scales for an FP8 KV cache.
    """

    file_format: Format
    groups: tuple[tuple[tuple[str, ...], QuantScheme], ...]
    ignore: tuple[str, ...]
    kv_cache: bool

    @property
    def schemes(self) -> list[QuantScheme]:
        """The scheme of each group."""
        return [scheme for _, scheme in self.groups]

    def scheme_of(self, module: str, class_name: str = "Linear") -> QuantScheme | None:
        """The scheme of a module, or None if it is ignored or no group targets it.

        Exact names take precedence over patterns, and patterns over class names.
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


def required(tensors: Mapping[str, Tensor], suffix: str, name: str) -> Tensor:
    """A tensor of a Linear. Raises CheckpointError if it is missing."""
    if suffix not in tensors:
        raise CheckpointError(
            f"the tensor {name}.{suffix} is missing from the checkpoint",
            hint="`quantkit.verify` lists all faults",
        )
    return tensors[suffix]


def dtype_name(tensor: Tensor) -> str:
    """torch's name of a tensor's dtype, such as "float8_e4m3fn"."""
    return str(tensor.dtype).removeprefix("torch.")
