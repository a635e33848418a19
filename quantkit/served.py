"""A checkpoint as a server runs it: quantized Linears that quantize their inputs, and keys and values kept in FP8.

Codes and scales come from the files as they lie on disk, never from a model in memory; any checkpoint that `layouts` understands can be loaded,
whoever wrote it. `hardware` computes what that hardware computes (`runtimes.as_computed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.layouts import KV_SPEC, QuantizationLayout, decode_linear, kv_scale_module, stored_linears
from quantkit.model import auto_config, load_model, require_no_missing
from quantkit.quantize import QuantizedTensor, quantize, quantized_linear
from quantkit.runtimes import as_computed
from quantkit.scheme import QuantScheme


class QuantizedLinear(nn.Module):
    """One Linear computed from its codes; the arithmetic is `quantize.quantized_linear`.

    input_scale: [1], of a static scheme; bias: [out_features] or None.
    """

    def __init__(self, weight: QuantizedTensor, scheme: QuantScheme, input_scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        codes = weight.qdata
        # bfloat16 holds every E4M3 value exactly, and torch converts it tens of times faster.
        self.codes = codes.bfloat16() if codes.dtype == torch.float8_e4m3fn else codes
        self.scale = weight.scale
        self.spec, self.scheme, self.input_scale, self.bias = weight.spec, scheme, input_scale, bias
        self.in_features, self.out_features = codes.shape[1], codes.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        weight = QuantizedTensor(self.codes, self.scale, self.spec)
        input_scale = self.input_scale if self.scheme.needs_calibration else None
        output = quantized_linear(inputs.reshape(-1, self.in_features), weight, self.scheme.input, input_scale, self.bias)
        return output.reshape(*inputs.shape[:-1], self.out_features)


class QuantizedCache(DynamicCache):
    """A KV cache of one window that stores FP8: what attention reads are the quantized keys and values.

    scales: layer → (scale of keys, scale of values), each [1].
    """

    def __init__(self, scales: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._scales = scales

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        key_scale, value_scale = self._scales[layer_idx]
        return _through_fp8(key_states, key_scale), _through_fp8(value_states, value_scale)


def _through_fp8(states: Tensor, scale: Tensor) -> Tensor:
    rows = states.reshape(-1, states.shape[-1])
    return quantize(rows, KV_SPEC, scale.reshape(1, 1)).dequantize().reshape(states.shape).to(states.dtype)


@dataclass(frozen=True)
class ServedModel:
    """A model ready to be judged.

    scheme: the scheme of most Linears, "mixed" with several, or the stored dtype of an unquantized model.
    activations_quantized: True, False, or "partial".
    weights_only: Linears whose weights are quantized but whose inputs aren't, though the scheme says so: fused experts.
    """

    model: nn.Module
    checkpoint: Checkpoint
    scheme: str
    quantized_linears: int
    activations_quantized: bool | str
    weights_only: tuple[str, ...]
    kv_scales: dict[int, tuple[Tensor, Tensor]] | None

    def new_cache(self) -> DynamicCache | None:
        return QuantizedCache(self.kv_scales) if self.kv_scales else None


def load_served(path: Path, device: str, hardware: str | None = None, trust_remote_code: bool = False) -> ServedModel:
    """Load a checkpoint, quantized or not, for evaluation."""
    checkpoint = Checkpoint.open(path)
    layout = QuantizationLayout.read(checkpoint.config)
    if layout is None:
        dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
        return ServedModel(load_model(path, device, trust_remote_code=trust_remote_code), checkpoint, dtype, 0, False, (), None)
    config, skeleton = _skeleton(path, trust_remote_code)
    state, linears, kv_tensors = _read(checkpoint, layout, skeleton)
    model = _build(path, config, type(skeleton), state, linears, device)
    del state
    modules = dict(model.named_modules())
    weights_only = []
    computed = {scheme: as_computed(scheme, hardware) for scheme in layout.schemes}
    inputs_quantized = 0
    for name in list(linears):
        weight, scheme, input_scale = linears.pop(name)
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            # Experts that transformers keeps in one three-dimensional parameter: their dequantized weights are in it.
            weights_only.append(name)
            continue
        parent, _, leaf = name.rpartition(".")
        weight = replace(weight, qdata=weight.qdata.to(device), scale=weight.scale.to(device))
        input_scale = None if input_scale is None else input_scale.to(device)
        setattr(modules[parent] if parent else model, leaf, QuantizedLinear(weight, computed[scheme], input_scale, module.bias))
        inputs_quantized += computed[scheme].input is not None
    total = sum(isinstance(module, QuantizedLinear) for module in model.modules()) + len(weights_only)
    activations: bool | str = inputs_quantized == total if inputs_quantized in (0, total) else "partial"
    names = list(dict.fromkeys(scheme.name for scheme in layout.schemes))
    dropped = tuple(weights_only) if any(scheme.input for scheme in computed.values()) else ()
    return ServedModel(model, checkpoint, names[0] if len(names) == 1 else "mixed", total, activations, dropped, _kv_scales(layout, model, kv_tensors, device))


def _skeleton(path: Path, trust_remote_code: bool) -> tuple[Any, nn.Module]:
    """The model's configuration, as if it were not quantized, and its modules without memory."""
    config = auto_config(path, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if not isinstance(getattr(config, "dtype", None), torch.dtype):
        config.dtype = torch.bfloat16
    try:
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises every kind
        raise CheckpointError(f"transformers can't build {path}: {' '.join(str(error).split())[:300]}") from None


def _read(checkpoint: Checkpoint, layout: QuantizationLayout, skeleton: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """All tensors: a state dict for transformers, the quantized Linears, and the scales of keys and values.

    A quantized weight that is a Linear's stands in the state dict as a shape alone, since codes replace it; one that transformers
    merges into another tensor (experts) is dequantized.
    """
    dtype = skeleton.config.dtype
    own_module = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    state: dict[str, Tensor] = {}
    linears: dict[str, Any] = {}
    stored = stored_linears(checkpoint.tensors)
    for module, suffixes in stored.items():
        scheme = layout.scheme_of(module)
        if scheme is None:
            raise CheckpointError(f"{module} has quantized tensors but quantization_config ignores it; `quantkit verify {checkpoint.path}` lists all faults")
        tensors = {suffix: checkpoint.read(f"{module}.{suffix}") for suffix in suffixes}
        weight, input_scale = decode_linear(tensors, scheme, module)
        linears[module] = (weight, scheme, input_scale)
        placeholder = torch.zeros((), dtype=dtype).expand(weight.qdata.shape)
        state[f"{module}.weight"] = placeholder if module in own_module else weight.dequantize().to(dtype)
        if "bias" in tensors:
            state[f"{module}.bias"] = tensors["bias"]
    kv_tensors = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        attention = kv_scale_module(name)
        if attention is not None:
            kv_tensors[f"{attention}.{suffix}"] = checkpoint.read(name).float().reshape(-1)
        elif module not in stored:
            if checkpoint.tensors[name].dtype in ("I8", "F8_E4M3", "F8_E5M2", "U8"):
                raise CheckpointError(f"{name} holds codes, but {module}.weight_scale is missing; `quantkit verify {checkpoint.path}` lists all faults")
            state[name] = checkpoint.read(name)
    return state, linears, kv_tensors


def _build(path: Path, config: Any, architecture: type, state: dict[str, Tensor], linears: Mapping[str, Any], device: str) -> nn.Module:
    try:
        model, report = architecture.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype, output_loading_info=True)
    except Exception as error:  # transformers and its backends raise every kind
        raise CheckpointError(f"transformers can't build {path}: {' '.join(str(error).split())[:300]}") from None
    require_no_missing(path, report["missing_keys"])
    strangers = [name for name in linears if f"{name}.weight" in report["unexpected_keys"]]
    if strangers:
        raise CheckpointError(f"{path} quantizes {strangers[0]}, which transformers' {architecture.__name__} doesn't have; it can't be judged")
    return model.to(device).eval().requires_grad_(False)


def _kv_scales(layout: QuantizationLayout, model: nn.Module, tensors: Mapping[str, Tensor], device: str) -> dict[int, tuple[Tensor, Tensor]] | None:
    if not layout.kv_cache:
        return None
    scales = {}
    for name, module in model.named_modules():
        key = tensors.get(f"{name}.k_scale")
        if key is not None:
            value = tensors.get(f"{name}.v_scale")
            if value is None or key.numel() != 1 or value.numel() != 1:
                raise CheckpointError(f"{name} has no pair of per-tensor k_scale and v_scale; export it again")
            scales[module.layer_idx] = (key.to(device), value.to(device))
    attentions = {
        module.layer_idx
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and any(isinstance(child, (nn.Linear, QuantizedLinear)) for child in module.children())
    }
    if attentions - set(scales):
        raise CheckpointError(
            "the checkpoint has a kv_cache_scheme but layers without k_scale and v_scale: a server would use the scale 1; export it again with --kv-cache fp8"
        )
    return scales
