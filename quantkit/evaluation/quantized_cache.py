"""The FP8 KV cache of a quantized model, and its scales in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from quantkit.checkpoint.formats import KV_SPEC, QuantizationConfig
from quantkit.errors import CheckpointError
from quantkit.evaluation.quantized_weights import Role, StoredLinear
from quantkit.models.null_cache import NullCache
from quantkit.ops.linear import OPS, QuantizedLinear


class QuantizedCache(NullCache):
    """A KV cache of one window that stores FP8: attention reads quantized keys and values.

    scales: layer → (scale of keys, scale of values), each [1].
    """

    def __init__(self, scales: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._scales = scales

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        key_scale, value_scale = self._scales[layer_idx]
        return _through_fp8(key_states, key_scale), _through_fp8(value_states, value_scale)


def _through_fp8(states: Tensor, scale: Tensor) -> Tensor:
    codes = OPS.quantize_kv(states, scale, KV_SPEC.format.name)
    return (codes.float() * scale).to(states.dtype)


def read_kv_scales(
    config: QuantizationConfig,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    linears: Iterable[StoredLinear],
    device: str,
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """Layer → (scale of keys, scale of values), each [1]; None without an FP8 KV cache.

    tensors: name in the checkpoint → scale.
    linears: the quantized Linears, from which the checkpoint's names of modules are known.

    Raises CheckpointError if a layer has no pair of scales.
    """
    if not config.kv_cache:
        return None
    stored_names = {
        linear.path.rpartition(".")[0]: linear.name.rpartition(".")[0]
        for linear in linears
        if linear.role is Role.LINEAR
    }
    attentions: dict[str, Any] = dict(model.named_modules())
    scales = {}
    for name, module in attentions.items():
        stored = stored_names.get(name, name)
        key, value = (tensors.get(f"{stored}.{which}_scale") for which in ("k", "v"))
        if key is None:
            continue
        if value is None or key.numel() != 1 or value.numel() != 1:
            raise CheckpointError(
                f"{name} has no pair of per-tensor k_scale and v_scale; export it again"
            )
        scales[module.layer_idx] = (key.to(device), value.to(device))
    needed = {
        module.layer_idx
        for module in attentions.values()
        if isinstance(getattr(module, "layer_idx", None), int)
        and any(isinstance(child, (nn.Linear, QuantizedLinear)) for child in module.children())
    }
    if needed - set(scales):
        raise CheckpointError(
            "the checkpoint has a kv_cache_scheme but layers without k_scale and v_scale: a server"
            " would use the scale 1",
            hint="export it again with `kv_cache='fp8'`",
        )
    return scales
