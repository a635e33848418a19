"""modelopt: static per-tensor E4M3 with scalar scales, for TensorRT-LLM."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from quantkit import __version__
from quantkit.checkpoint.formats.format import Format, QuantizationConfig, QuantizedLayers
from quantkit.errors import CheckpointError
from quantkit.schemes.scheme import SCHEMES
from quantkit.schemes.serving import YES, Support

# Readers recognize a file without a quant_method as ModelOpt's by this name.
_PRODUCER = {"name": "modelopt", "version": f"written by quantkit {__version__}"}


class ModelOpt(Format):
    """ModelOpt's tensors and config: E4M3 codes with one static scale for weights and one for
    inputs.
    """

    name = "modelopt"
    label = "modelopt FP8"
    only_scheme = SCHEMES["fp8-tensor"]
    runtimes = {
        "vllm": YES,
        "sglang": YES,
        "tensorrt-llm": YES,
        "transformers": Support(False, "reads ModelOpt's codes as weights in silence"),
    }
    scalar_shape = ()
    side_file = "hf_quant_config.json"

    def accepts_shape(self, stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        return stored == expected or (stored, expected) == ((1,), ())

    def kv_scale_name(self, module: str, suffix: str) -> str:
        return f"{module}.{suffix[0]}_proj.{suffix}"

    def kv_scale_module(self, name: str) -> str | None:
        module, suffix = super().kv_scale_module(name), name.rpartition(".")[2]
        projection = f".{suffix[:1]}_proj"
        if module is None or not module.endswith(projection):
            return None
        return module.removesuffix(projection)

    def config(self, layers: QuantizedLayers) -> dict[str, Any]:
        tensor = {"num_bits": 8, "type": "float", "dynamic": False}
        config = {
            "quant_method": self.name,
            "quant_algo": "FP8",
            "producer": _PRODUCER,
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": tensor, "input_activations": tensor}
            },
            "ignore": list(layers.skipped),
        }
        return config | ({"kv_cache_scheme": tensor} if layers.kv_cache else {})

    def side_file_content(self, layers: QuantizedLayers) -> dict[str, Any]:
        """The same settings as in `config`: TensorRT-LLM prefers this file, vLLM and SGLang
        config.json.
        """
        return {
            "producer": _PRODUCER,
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8" if layers.kv_cache else None,
                "exclude_modules": list(layers.skipped),
            },
        }

    def config_of_side_file(self, content: Mapping[str, Any]) -> dict[str, Any]:
        stored = content.get("quantization")
        return {"quant_method": self.name} | (stored if isinstance(stored, dict) else {})

    def read_config(self, stored: Mapping[str, Any]) -> QuantizationConfig:
        if stored.get("quant_algo") != "FP8":
            raise CheckpointError(
                f"the ModelOpt checkpoint is in {stored.get('quant_algo')!r}; quantkit reads its"
                " static per-tensor FP8 only"
            )
        skipped = stored.get("exclude_modules") or stored.get("ignore") or ()
        # A pattern also skips all modules inside the one that it names.
        ignore = tuple(
            "re:" + fnmatch.translate(entry).removesuffix(r"\Z") + r"(\.|\Z)" for entry in skipped
        )
        kv_cache = stored.get("kv_cache_quant_algo") == "FP8" or isinstance(
            stored.get("kv_cache_scheme"), Mapping
        )
        return QuantizationConfig(self, ((("Linear",), self.only_scheme),), ignore, kv_cache)
