"""A checkpoint as a server runs it: quantized Linears that quantize their inputs, and keys and
values kept in FP8.

Codes and scales come from the files as they lie on disk, block by block; any checkpoint that
`layouts` understands can be loaded, whoever wrote it. `hardware` computes what that hardware
computes (`runtimes.as_computed`).
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quantkit.checkpoint.formats import (
    KV_SPEC,
    QuantizationLayout,
    decode_linear,
    kv_scale_module,
    stored_linears,
)
from quantkit.checkpoint.reader import Checkpoint, torch_dtype
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.evaluation.quantized_experts import (
    EXPERTS_IMPLEMENTATION,
    quantize_expert_inputs,
    register_serving_experts,
)
from quantkit.exporter.runtimes import as_computed
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.experts import Restacked
from quantkit.models.linear_views import with_upright_weights
from quantkit.models.null_cache import NullCache
from quantkit.models.skeleton import StoredWeights, build_skeleton
from quantkit.models.weight_map import WeightMap
from quantkit.ops.linear import OPS, QuantizedLinear, kernel_for
from quantkit.ops.reference import QuantizedTensor
from quantkit.schemes.scheme import QuantScheme


class QuantizedCache(NullCache):
    """A KV cache of one window that stores FP8: what attention reads are the quantized keys and
    values.

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


@dataclass(frozen=True)
class ServedModel:
    """A model ready to be judged, its decoder blocks still on disk.

    scheme: the scheme of most Linears, "mixed" with several, or the stored dtype of an unquantized
    model.
    activations_quantized: True, False, or "partial".
    weights_only: Linears whose weights are quantized but whose inputs aren't, though the scheme
    says so: stacked experts that don't all quantize alike, and Linears that transformers computes
    in a way of its own.
    kernels: how many quantized Linears run through each kernel, and under "reference" those that
    don't.
    beyond: quantized Linears that transformers leaves out of the model, so that they aren't judged.
    """

    blocks: BlockwiseModel
    checkpoint: Checkpoint
    scheme: str
    quantized_linears: int
    activations_quantized: bool | str
    weights_only: tuple[str, ...]
    kv_scales: dict[int, tuple[Tensor, Tensor]] | None
    kernels: dict[str, int]
    beyond: tuple[str, ...] = ()

    def new_cache(self) -> DynamicCache | None:
        return QuantizedCache(self.kv_scales) if self.kv_scales else None


def load_served(
    path: Path,
    device: str,
    hardware: str | None = None,
    trust_remote_code: bool = False,
    exec: str = "auto",
) -> ServedModel:
    """Open a checkpoint, quantized or not, for evaluation. exec: "auto" runs kernels where there
    are any, "kernel" refuses Linears that have none.
    """
    checkpoint = Checkpoint.open(path)
    layout = QuantizationLayout.read(checkpoint.config)
    register_serving_experts()
    skeleton = build_skeleton(
        checkpoint, trust_remote_code, experts_implementation=EXPERTS_IMPLEMENTATION
    )
    if layout is None:
        dtype = str(
            checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
        )
        return ServedModel(
            BlockwiseModel(skeleton, StoredWeights(checkpoint), str(path), device),
            checkpoint,
            dtype,
            0,
            False,
            (),
            None,
            {},
        )
    computed = {scheme: as_computed(scheme, hardware) for scheme in layout.schemes}
    weights = QuantizedWeights(checkpoint, layout, skeleton, computed, device, exec != "reference")
    if exec == "kernel":
        weights.require_kernels()
    blocks = BlockwiseModel(skeleton, weights, str(path), device)
    unexpected = set(blocks.unexpected)
    beyond = {
        name
        for name in weights.linears
        if f"{name}.weight" in unexpected and blocks.is_beyond(f"{name}.weight")
    }
    strangers = [
        name for name in weights.linears if f"{name}.weight" in unexpected and name not in beyond
    ]
    if strangers:
        raise CheckpointError(
            f"{path} quantizes {strangers[0]}, which transformers' {type(skeleton).__name__}"
            " doesn't have; it can't be judged"
        )
    schemes = {name: computed[scheme] for name, scheme in weights.linears.items()}
    reached = set(weights.modules) | quantize_expert_inputs(
        blocks, schemes, weights.input_scale, weights.restacked.names
    )
    inputs_quantized = sum(
        computed[weights.linears[name]].input is not None
        for name in weights.linears
        if name in reached
    )
    total = len(weights.linears) - len(beyond)
    activations: bool | str = (
        inputs_quantized == total if inputs_quantized in (0, total) else "partial"
    )
    names = list(dict.fromkeys(scheme.name for scheme in layout.schemes))
    weights_only = [name for name in weights.linears if name not in reached | beyond]
    dropped = tuple(weights_only) if any(scheme.input for scheme in computed.values()) else ()
    on_disk = {
        path.rpartition(".")[0]: name.rpartition(".")[0] for name, path in weights.modules.items()
    }
    kv_scales = _kv_scales(layout, skeleton, weights.kv_tensors, on_disk, device)
    scheme = names[0] if len(names) == 1 else "mixed"
    return ServedModel(
        blocks,
        checkpoint,
        scheme,
        total,
        activations,
        dropped,
        kv_scales,
        weights.count_kernels(beyond),
        tuple(sorted(beyond)),
    )


class QuantizedWeights:
    """The tensors of a quantized checkpoint, and the QuantizedLinears that take the place of
    Linears.

    linears: each quantized module of the checkpoint and its scheme. modules: those of them that are
    Linears of the module tree, and their paths there; others go into the model dequantized: those
    that are merged into stacked experts, by transformers or (restacked) here, or that compute in a
    way of their own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: QuantizationLayout,
        skeleton: nn.Module,
        computed: Mapping[QuantScheme, QuantScheme],
        device: str,
        use_kernels: bool = True,
    ) -> None:
        checkpoint = with_upright_weights(checkpoint)
        self._checkpoint, self._computed, self._device, self._use_kernels = (
            checkpoint,
            computed,
            device,
            use_kernels,
        )
        self._dtype = skeleton.config.dtype
        self._stored = stored_linears(checkpoint.tensors)
        self.linears: dict[str, QuantScheme] = {}
        for module in self._stored:
            scheme = layout.scheme_of(module)
            if scheme is None:
                raise CheckpointError(
                    f"{module} has quantized tensors but quantization_config ignores it; `quantkit"
                    f" verify {shlex.quote(str(checkpoint.path))}` lists all faults"
                )
            self.linears[module] = scheme
            self._require_readable(module)
        # One with a forward of its own (DeepSeek V4's grouped projection) keeps it, and gets its
        # weight dequantized.
        trees = {
            name
            for name, module in skeleton.named_modules()
            if isinstance(module, nn.Linear) and _computes_as_linear(type(module))
        }
        found = WeightMap(skeleton, [f"{name}.weight" for name in self.linears])
        paths = {
            weight.removesuffix(".weight"): path.removesuffix(".weight")
            for weight, path in found.target_of.items()
        }
        self.modules = {name: path for name, path in paths.items() if path in trees}
        name_of = {path: name for name, path in self.modules.items()}
        shared = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in found.shared.items()
        }
        self._places = {
            path: name_of[shared.get(path, path)]
            for path in (*name_of, *shared)
            if shared.get(path, path) in name_of
        }
        self.restacked = Restacked.of(
            skeleton, [name for name in self.linears if name not in self.modules]
        )
        self.kv_tensors: dict[str, Tensor] = {}
        self._others = []
        for name, info in checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            attention = kv_scale_module(name)
            if attention is not None:
                self.kv_tensors[f"{attention}.{suffix}"] = checkpoint.read(name).float().reshape(-1)
            elif module not in self._stored:
                if info.dtype in ("I8", "F8_E4M3", "F8_E5M2", "U8"):
                    raise CheckpointError(
                        f"{name} holds codes, but {module}.weight_scale is missing; `quantkit"
                        f" verify {shlex.quote(str(checkpoint.path))}` lists all faults"
                    )
                self._others.append(name)

    def input_scale(self, module: str) -> Tensor:
        """The static scale of a Linear's input, [1]."""
        return self._decoded(module)[1]

    def _kernel_for(self, module: str) -> tuple[str | None, str]:
        if module not in self.modules:
            return (
                None,
                (
                    "transformers stacks it with other experts, or computes it in a way of its own;"
                    " such run with dequantized weights"
                ),
            )
        scheme = self._computed[self.linears[module]]
        return kernel_for(
            scheme.weight,
            scheme.input,
            self._weight_shape(module, self._stored[module])[1],
            self._dtype,
            self._device,
        )

    def require_kernels(self) -> None:
        for module in self.linears:
            kernel, why_not = self._kernel_for(module)
            if kernel is None:
                raise EvaluationError(
                    f"--exec kernel: {module} of {self._checkpoint.path} has none: {why_not}; use"
                    " --exec auto or reference"
                )

    def count_kernels(self, beyond: Container[str] = ()) -> dict[str, int]:
        kernels = [
            self._kernel_for(module)[0] if self._use_kernels else None
            for module in self.linears
            if module not in beyond
        ]
        return {name or "reference": kernels.count(name) for name in dict.fromkeys(kernels)}

    def _require_readable(self, module: str) -> None:
        """Refuse now, from headers alone, what would be found when the module's block has its
        turn.
        """
        tensors = {}
        for suffix in self._stored[module]:
            info = self._checkpoint.tensors[f"{module}.{suffix}"]
            tensors[suffix] = (
                self._checkpoint.read(info.name)
                if suffix == "weight_shape"
                else torch.empty(info.shape, dtype=torch_dtype(info), device="meta")
            )
        decode_linear(tensors, self.linears[module], module)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = {name: self._checkpoint.tensors[name].shape for name in self._others}
        merged = self.restacked.parts()
        shapes |= self.restacked.shapes
        for module, suffixes in self._stored.items():
            if module in merged:
                continue
            shapes[f"{module}.weight"] = self._weight_shape(module, suffixes)
            if "bias" in suffixes:
                shapes[f"{module}.bias"] = self._checkpoint.tensors[f"{module}.bias"].shape
        return shapes

    def _weight_shape(self, module: str, suffixes: Sequence[str]) -> tuple[int, ...]:
        if "weight" in suffixes:
            return self._checkpoint.tensors[f"{module}.weight"].shape
        return tuple(self._decoded(module)[0].qdata.shape)

    def _decoded(self, module: str) -> tuple[QuantizedTensor, Tensor | None]:
        tensors = {
            suffix: self._checkpoint.read(f"{module}.{suffix}") for suffix in self._stored[module]
        }
        return decode_linear(tensors, self.linears[module], module)

    def read(self, name: str) -> Tensor:
        """A tensor as transformers shall have it. A weight whose codes come in its place later is a
        shape alone.
        """
        if name in self.restacked.shapes:
            return self.restacked.read(
                name, lambda linear: self._decoded(linear)[0].dequantize().to(self._dtype)
            )
        module, _, suffix = name.rpartition(".")
        if module not in self.linears or suffix != "weight":
            return self._checkpoint.read(name)
        if module in self.modules:
            return torch.zeros((), dtype=self._dtype).expand(
                self._weight_shape(module, self._stored[module])
            )
        return self._decoded(module)[0].dequantize().to(self._dtype)

    def finish(self, model: nn.Module, prefix: str) -> None:
        """Put QuantizedLinears in place of the Linears under `prefix` that have their weights; of
        all outside of the blocks with "".
        """
        for path, name in [
            item for item in self._places.items() if item[0].startswith(f"{prefix}.") or not prefix
        ]:
            linear = model.get_submodule(path)
            if not isinstance(linear, nn.Linear) or linear.weight.is_meta:
                continue
            weight, input_scale = self._decoded(name)
            weight = replace(
                weight, qdata=weight.qdata.to(self._device), scale=weight.scale.to(self._device)
            )
            input_scale = None if input_scale is None else input_scale.to(self._device)
            model.set_submodule(path, self._linear(name, weight, input_scale, linear.bias))

    def _linear(
        self, name: str, weight: QuantizedTensor, input_scale: Tensor | None, bias: Tensor | None
    ) -> QuantizedLinear:
        return QuantizedLinear(
            weight,
            self._computed[self.linears[name]],
            input_scale,
            bias,
            self._dtype,
            self._use_kernels,
        )


@functools.cache
def _computes_as_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class's forward is Linear's, or gives the same on a small one (Falcon's writes it
    out).
    """
    if kind.forward is nn.Linear.forward:
        return True
    small = nn.utils.skip_init(nn.Linear, 3, 2).requires_grad_(False)
    for place, parameter in enumerate(small.parameters()):
        parameter.copy_(torch.arange(float(parameter.numel())).reshape(parameter.shape) - place - 1)
    inputs = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]])
    try:
        return torch.allclose(kind.forward(small, inputs), small(inputs))
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ):  # it asks for what a Linear doesn't have
        return False


def _kv_scales(
    layout: QuantizationLayout,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    on_disk: Mapping[str, str],
    device: str,
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """Scale of keys and of values by layer. on_disk: what modules are called in the checkpoint,
    where that is known.
    """
    if not layout.kv_cache:
        return None
    scales = {}
    for name, module in model.named_modules():
        stored = on_disk.get(name, name)
        key = tensors.get(f"{stored}.k_scale")
        if key is not None:
            value = tensors.get(f"{stored}.v_scale")
            if value is None or key.numel() != 1 or value.numel() != 1:
                raise CheckpointError(
                    f"{name} has no pair of per-tensor k_scale and v_scale; export it again"
                )
            scales[module.layer_idx] = (key.to(device), value.to(device))
    attentions = {
        module.layer_idx
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and any(isinstance(child, (nn.Linear, QuantizedLinear)) for child in module.children())
    }
    if attentions - set(scales):
        raise CheckpointError(
            "the checkpoint has a kv_cache_scheme but layers without k_scale and v_scale: a server"
            " would use the scale 1; export it again with --kv-cache fp8"
        )
    return scales
