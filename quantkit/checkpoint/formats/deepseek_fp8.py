"""fp8: 128×128 blocks of E4M3, as DeepSeek ships its models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.formats.format import (
    Format,
    QuantizationConfig,
    QuantizedLayers,
    StoredTensors,
)
from quantkit.errors import CheckpointError
from quantkit.schemes.number_formats import FP8_E4M3
from quantkit.schemes.quant_spec import QuantSpec, block, group
from quantkit.schemes.scheme import SCHEMES, QuantScheme
from quantkit.schemes.serving import MULTIPLES_OF_128, YES


class DeepseekFP8(Format):
    name = "fp8"
    label = "block fp8"
    only_scheme = SCHEMES["fp8-block"]
    runtimes = {
        "vllm": MULTIPLES_OF_128,
        "sglang": MULTIPLES_OF_128,
        "tensorrt-llm": YES,
        "transformers": MULTIPLES_OF_128,
    }
    holds_kv_cache = False
    scale_suffix = "weight_scale_inv"  # codes are multiplied by it; the name is history
    is_source = True

    def block_scales(self, stored: StoredTensors, spec: QuantSpec) -> dict[str, str]:
        scales = {}
        for name, (dtype, shape) in stored.items():
            module, _, suffix = name.rpartition(".")
            if suffix != self.scale_suffix:
                continue
            weight_dtype, weight_shape = stored.get(f"{module}.weight", ("", ()))
            if weight_dtype != spec.format.safetensors_name or len(weight_shape) != 2:
                raise CheckpointError(
                    f"{name} scales no matrix of FP8 codes called {module}.weight; fetch the model"
                    " again"
                )
            expected = spec.granularity.scale_shape(*weight_shape)
            if shape != expected or dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(
                    f"{name} is {dtype} {list(shape)}: blocks of {list(weight_shape)} need"
                    f" floating-point scales {list(expected)}; fetch the model again"
                )
            scales[f"{module}.weight"] = name
        for name, (dtype, _) in stored.items():
            if dtype.startswith("F8_") and name not in scales:
                raise CheckpointError(
                    f"{name} holds FP8 codes without {self.scale_suffix}, the scales of their"
                    " blocks; fetch the model again"
                )
        return scales

    def config(self, layers: QuantizedLayers) -> dict[str, Any]:
        granularity = self.only_scheme.weight.granularity
        # Full names, for each member of fused layers: runtimes match prefixes, patterns or names,
        # and these mean the same to all of them.
        return {
            "quant_method": self.name,
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [granularity.rows, granularity.columns],
            "modules_to_not_convert": list(layers.skipped),
        }

    def read_config(self, stored: Mapping[str, Any]) -> QuantizationConfig:
        size = stored.get("weight_block_size")
        if not size or stored.get("activation_scheme") != "dynamic":
            raise CheckpointError(
                "the 'fp8' checkpoint is not in blocks with dynamic inputs, the only such form that"
                " quantkit reads"
            )
        if not isinstance(size, list) or len(size) != 2:
            raise CheckpointError(
                f"the fp8 checkpoint's weight_block_size is {size!r}, not [rows, columns]; fetch"
                " its config.json again"
            )
        rows, columns = size
        scheme = QuantScheme.of(
            QuantSpec(FP8_E4M3, block(rows, columns)),
            QuantSpec(FP8_E4M3, group(columns), dynamic=True),
        )
        # A name skips the module and all modules in it, wherever its path begins.
        ignore = tuple(
            rf"re:(.*\.)?{re.escape(part)}(\.|\Z)"
            for part in stored.get("modules_to_not_convert") or stored.get("ignored_layers") or ()
        )
        return QuantizationConfig(self, ((("Linear",), scheme),), ignore, False)
