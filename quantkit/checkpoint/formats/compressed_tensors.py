"""compressed-tensors: holds every scheme; vLLM, SGLang, TensorRT-LLM and transformers read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.formats.format import (
    KV_SPEC,
    Format,
    QuantizationConfig,
    QuantizedLayers,
    StoredTensors,
    required,
)
from quantkit.errors import CheckpointError
from quantkit.schemes.number_formats import E8M0
from quantkit.schemes.quant_spec import QuantSpec
from quantkit.schemes.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor


def compression_format(scheme: QuantScheme) -> str:
    """compressed-tensors' `format` of this scheme: how runtimes decompress it."""
    if scheme.weight.scale_format == E8M0:
        return "mxfp8-quantized"
    if scheme.input is None:
        return "pack-quantized" if scheme.weight.format.kind == "int" else "naive-quantized"
    return f"{scheme.weight.format.kind}-quantized"


def is_packed(scheme: QuantScheme) -> bool:
    """Whether codes are stored in 32-bit words."""
    return compression_format(scheme) == "pack-quantized"


class CompressedTensors(Format):
    name = "compressed-tensors"
    label = "compressed-tensors"

    def shape_obstacle(self, scheme: QuantScheme, shape: Sequence[int]) -> str | None:
        obstacle, per_word = super().shape_obstacle(scheme, shape), _codes_per_word(scheme)
        if obstacle is None and is_packed(scheme) and shape[1] % per_word:
            return (
                f"in_features {shape[1]} is no multiple of {per_word}, the codes of a packed word"
            )
        return obstacle

    # ---- Tensors: weight-only integers are packed into words.

    def codes_suffix(self, scheme: QuantScheme) -> str:
        return "weight_packed" if is_packed(scheme) else "weight"

    def code_tensors(self, scheme: QuantScheme, shape: Sequence[int]) -> StoredTensors:
        if not is_packed(scheme):
            return super().code_tensors(scheme, shape)
        rows, columns = shape
        return {
            "weight_packed": ("I32", (rows, columns // _codes_per_word(scheme))),
            "weight_shape": ("I64", (2,)),
        }

    def torch_dtypes(self, scheme: QuantScheme) -> dict[str, str]:
        if not is_packed(scheme):
            return super().torch_dtypes(scheme)
        return {"weight_packed": "int32", "weight_shape": "int64"}

    @property
    def marks(self) -> tuple[str, ...]:
        return (*super().marks, "weight_packed")

    @property
    def added_suffixes(self) -> tuple[str, ...]:
        return (*super().added_suffixes, "weight_packed", "weight_shape")

    def weight_shape(
        self, scheme: QuantScheme, stored: StoredTensors, read: Callable[[str], Tensor] | None
    ) -> tuple[int, ...] | None:
        if "weight_packed" not in stored:
            return super().weight_shape(scheme, stored, read)
        if read is not None and "weight_shape" in stored and stored["weight_shape"][1] == (2,):
            rows, columns = read("weight_shape").tolist()
            return int(rows), int(columns)
        words = stored["weight_packed"][1]
        return (words[0], words[1] * _codes_per_word(scheme)) if len(words) == 2 else None

    def encode_codes(self, codes: Tensor, scheme: QuantScheme) -> Tensor:
        from quantkit.ops.packing import pack_codes

        return pack_codes(codes, scheme.weight.format) if is_packed(scheme) else codes

    def encode_constants(
        self,
        scheme: QuantScheme,
        shape: Sequence[int],
        weight_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Also the shape of a packed weight."""
        import torch

        tensors = super().encode_constants(scheme, shape, weight_scale, input_scale)
        if is_packed(scheme):
            tensors["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
        return tensors

    def decode_codes(self, stored: Tensor, scheme: QuantScheme, columns: int) -> Tensor:
        from quantkit.ops.packing import unpack_codes

        if not is_packed(scheme):
            return stored
        return unpack_codes(stored, scheme.weight.format)[:, :columns]

    def _codes(self, tensors: Mapping[str, Tensor], scheme: QuantScheme, name: str) -> Tensor:
        if not is_packed(scheme):
            return super()._codes(tensors, scheme, name)
        rows, columns = map(int, required(tensors, "weight_shape", name))
        return self.decode_codes(required(tensors, "weight_packed", name), scheme, columns)[:rows]

    # ---- The config.

    def config(self, layers: QuantizedLayers) -> dict[str, Any]:
        """One group targets the class name, which every runtime takes. Several name their modules,
        because TensorRT-LLM matches names only and no class name.
        """
        groups: dict[QuantScheme, list[str]] = {}
        for name, scheme in layers.schemes.items():
            groups.setdefault(scheme, []).append(name)
        ordered = sorted(
            groups, key=lambda scheme: (scheme != layers.default, -len(groups[scheme]))
        )
        config_groups = {}
        for number, scheme in enumerate(ordered):
            entry: dict[str, Any] = {
                "targets": groups[scheme] if len(groups) > 1 or layers.by_name else ["Linear"],
                "weights": scheme.weight.to_arguments(),
            }
            if scheme.input is not None:
                entry["input_activations"] = scheme.input.to_arguments()
            if len(groups) > 1:
                entry["format"] = compression_format(scheme)
            config_groups[f"group_{number}"] = entry
        config: dict[str, Any] = {
            "quant_method": self.name,
            "format": compression_format(ordered[0]) if len(groups) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": [*layers.skipped, *layers.skipped_elsewhere],
            "config_groups": config_groups,
        }
        if layers.kv_cache:
            config["kv_cache_scheme"] = KV_SPEC.to_arguments()
        return config

    def read_config(self, stored: Mapping[str, Any]) -> QuantizationConfig:
        groups, ignore = stored["config_groups"], tuple(stored.get("ignore") or ())
        for target in [*ignore, *(name for entry in groups.values() for name in entry["targets"])]:
            if target.startswith("re:"):
                re.compile(target[3:])
        kv_scheme = stored.get("kv_cache_scheme")
        schemes = tuple(
            (tuple(entry["targets"]), _scheme(entry, name)) for name, entry in groups.items()
        )
        if (
            kv_scheme is not None
            and QuantSpec.from_arguments(kv_scheme, "kv_cache_scheme") != KV_SPEC
        ):
            raise CheckpointError(
                "the kv_cache_scheme is not static FP8 per tensor, the one that quantkit reads"
            )
        return QuantizationConfig(self, schemes, ignore, kv_scheme is not None)

    def config_faults(self, stored: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Groups whose `format` isn't one that runtimes decompress the scheme with."""
        faults = []
        for name, entry in stored["config_groups"].items():
            scheme = _scheme(entry, name)
            needed = compression_format(scheme)
            # Codes that are stored plainly are read alike under either name.
            plain = {"naive-quantized", f"{scheme.weight.format.kind}-quantized"}
            allowed = plain if needed in plain else {needed}
            declared = entry.get("format") or stored.get("format")
            if declared not in allowed:
                message = (
                    f"declares the format {declared!r}; {scheme.name} is stored as"
                    f" {' or '.join(sorted(allowed))}"
                )
                faults.append((f"quantization_config.{name}", message))
        return faults


def _codes_per_word(scheme: QuantScheme) -> int:
    return scheme.weight.format.codes_per_word


def _scheme(entry: Mapping[str, Any], name: str) -> QuantScheme:
    inputs = entry.get("input_activations")
    return QuantScheme.parse({"weights": entry["weights"], "input_activations": inputs}, name)
