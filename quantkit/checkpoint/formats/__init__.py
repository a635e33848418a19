"""Checkpoint formats: how the tensors of a quantized Linear are stored, and the
`quantization_config` that describes them.

    compressed-tensors   every scheme; vLLM, SGLang, TensorRT-LLM and transformers read it
    fp8                  128×128 blocks of E4M3, as in DeepSeek's checkpoints
    modelopt             static per-tensor E4M3, for TensorRT-LLM

A new format is a subclass of `format.Format` in a file of its own, and an entry in FORMATS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.checkpoint.formats.compressed_tensors import CompressedTensors
from quantkit.checkpoint.formats.deepseek_fp8 import DeepseekFP8
from quantkit.checkpoint.formats.format import (
    KV_SPEC,
    KV_SUFFIXES,
    Format,
    QuantizationConfig,
    QuantizedLayers,
)
from quantkit.checkpoint.formats.modelopt import ModelOpt
from quantkit.errors import CheckpointError, RecipeError

__all__ = [
    "DEFAULT_FORMAT",
    "FORMATS",
    "KV_SPEC",
    "KV_SUFFIXES",
    "Format",
    "QuantizationConfig",
    "QuantizedLayers",
    "added_suffixes",
    "config_of_side_file",
    "kv_scale_module",
    "read_quantization_config",
    "side_files",
    "stored_linears",
    "weight_scale_suffixes",
]

DEFAULT_FORMAT = "compressed-tensors"
# By name, which is also the value of `quant_method` in config.json.
FORMATS: dict[str, Format] = {
    file_format.name: file_format
    for file_format in (CompressedTensors(), DeepseekFP8(), ModelOpt())
}


def read_quantization_config(config: Mapping[str, Any]) -> QuantizationConfig | None:
    """The parsed `quantization_config` of a model's config.json, or None if the model isn't
    quantized.

    Raises CheckpointError if it can't be used.
    """
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, Mapping):
        raise CheckpointError("config.json has a quantization_config that is not an object")
    method = stored.get("quant_method")
    file_format = FORMATS.get(method) if isinstance(method, str) else None
    if file_format is None:
        *others, last = (known.label for known in FORMATS.values())
        raise CheckpointError(
            f"the checkpoint is quantized with '{method}', which quantkit doesn't read; it reads"
            f" {', '.join(others)} and {last}"
        )
    try:
        return file_format.read_config(stored)
    except (RecipeError, KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"config.json's quantization_config ({method}) can't be used: {reason}; give the"
            " original model, or fetch this one again"
        ) from None


def side_files() -> dict[str, Format]:
    """File name → format, for files next to config.json that repeat its `quantization_config`."""
    known = FORMATS.values()
    return {each.side_file: each for each in known if each.side_file is not None}


def config_of_side_file(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` that is equivalent to a side file's content."""
    return side_files()[name].config_of_side_file(content)


def stored_linears(tensor_names: Iterable[str]) -> dict[str, list[str]]:
    """Modules that hold quantized tensors, in any format: module → the suffixes of its tensors."""
    marks = {mark for file_format in FORMATS.values() for mark in file_format.marks}
    tensor_names = list(tensor_names)
    modules: dict[str, list[str]] = {
        name.rpartition(".")[0]: [] for name in tensor_names if name.rpartition(".")[2] in marks
    }
    for name in tensor_names:
        module, _, suffix = name.rpartition(".")
        if module in modules:
            modules[module].append(suffix)
    return modules


def weight_scale_suffixes() -> set[str]:
    """The suffixes that the formats give to a weight's scales."""
    return {file_format.scale_suffix for file_format in FORMATS.values()}


def added_suffixes() -> set[str]:
    """The suffixes of tensors that the formats add to those of the original model."""
    return {suffix for each in FORMATS.values() for suffix in each.added_suffixes}


def kv_scale_module(name: str) -> str | None:
    """The attention module that a KV scale belongs to, under any format's naming; None for other
    tensors.
    """
    found = (file_format.kv_scale_module(name) for file_format in FORMATS.values())
    return min((module for module in found if module is not None), key=len, default=None)
