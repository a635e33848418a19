"""A checkpoint as a server runs it: quantized Linears that quantize their inputs, and keys and
values stored in FP8.

Codes and scales are read from the files block by block; any checkpoint that `checkpoint/formats.py`
understands can be loaded, whoever wrote it. `hardware` computes what that hardware computes
(`runtimes.as_computed`).
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quantkit.checkpoint.formats import (
    KV_SPEC,
    QuantizationConfig,
    kv_scale_module,
    read_quantization_config,
    stored_linears,
)
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tensor_reader import torch_dtype
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.evaluation.quantized_experts import (
    EXPERTS_IMPLEMENTATION,
    quantize_expert_inputs,
    register_serving_experts,
)
from quantkit.exporter.runtimes import as_computed
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.experts import Restacked
from quantkit.models.linear_views import conv1d_as_linear
from quantkit.models.null_cache import NullCache
from quantkit.models.skeleton import StoredWeights, build_skeleton
from quantkit.models.weight_map import WeightMap
from quantkit.ops.linear import OPS, QuantizedLinear, kernel_for
from quantkit.ops.reference import QuantizedTensor
from quantkit.schemes.number_formats import holds_codes
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
class QuantizedModel:
    """A model ready to be evaluated, its decoder blocks still on disk.

    blocks: the model.
    checkpoint: its files.
    scheme: the scheme of all Linears, "mixed" with several, or the stored dtype of an unquantized
    model.
    quantized_linears: how many are evaluated quantized.
    activations_quantized: True, False, or "partial".
    weights_only: Linears whose weights are quantized but whose inputs aren't, though the scheme
    says so: stacked experts that don't all quantize alike, and Linears with a forward of their own.
    kv_scales: layer → scales of keys and values, or None.
    kernels: how many quantized Linears run through each kernel, and under "reference" those that
    don't.
    not_in_model: quantized Linears that transformers doesn't build; they aren't evaluated.
    """

    blocks: BlockwiseModel
    checkpoint: Checkpoint
    scheme: str
    quantized_linears: int
    activations_quantized: bool | str
    weights_only: tuple[str, ...]
    kv_scales: dict[int, tuple[Tensor, Tensor]] | None
    kernels: dict[str, int]
    not_in_model: tuple[str, ...] = ()

    def new_cache(self) -> DynamicCache | None:
        return QuantizedCache(self.kv_scales) if self.kv_scales else None


def load_quantized_model(
    path: Path,
    device: str,
    hardware: str | None = None,
    trust_remote_code: bool = False,
    exec: str = "auto",
) -> QuantizedModel:
    """Open a checkpoint, quantized or not, for evaluation. exec: "auto" runs kernels where there
    are any, "kernel" refuses Linears that have none.
    """
    checkpoint = Checkpoint.open(path)
    config = read_quantization_config(checkpoint.config)
    register_serving_experts()
    skeleton = build_skeleton(
        checkpoint, trust_remote_code, experts_implementation=EXPERTS_IMPLEMENTATION
    )
    if config is None:
        return _unquantized(checkpoint, skeleton, device)
    computed = {scheme: as_computed(scheme, hardware) for scheme in config.schemes}
    weights = QuantizedWeights(checkpoint, config, skeleton, computed, device, exec != "reference")
    if exec == "kernel":
        weights.require_kernels()
    blocks = BlockwiseModel(skeleton, weights, str(path), device)
    _require_known(weights.linears.values(), blocks)
    absent = [each.name for each in weights.linears.values() if each.role is Role.NOT_IN_MODEL]
    present = [each for each in weights.linears.values() if each.role is not Role.NOT_IN_MODEL]
    inputs_quantized = {linear.name for linear in present if linear.role is Role.LINEAR}
    inputs_quantized |= quantize_expert_inputs(
        blocks,
        {name: linear.computed for name, linear in weights.linears.items()},
        weights.input_scale,
        weights.restacked.names,
    )
    scheme_names = list(dict.fromkeys(scheme.name for scheme in config.schemes))
    return QuantizedModel(
        blocks,
        checkpoint,
        scheme_names[0] if len(scheme_names) == 1 else "mixed",
        len(present),
        _activations_quantized(present, inputs_quantized),
        tuple(linear.name for linear in present if linear.name not in inputs_quantized)
        if any(scheme.input for scheme in computed.values())
        else (),
        _kv_scales(config, skeleton, weights.kv_tensors, weights.linears.values(), device),
        weights.count_kernels(present),
        tuple(sorted(absent)),
    )


def _unquantized(checkpoint: Checkpoint, skeleton: nn.Module, device: str) -> QuantizedModel:
    config = checkpoint.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    blocks = BlockwiseModel(skeleton, StoredWeights(checkpoint), str(checkpoint.path), device)
    return QuantizedModel(blocks, checkpoint, dtype, 0, False, (), None, {})


def _require_known(linears: Iterable[StoredLinear], blocks: BlockwiseModel) -> None:
    """Refuse a Linear that neither transformers nor any runtime has."""
    for linear in linears:
        if linear.role is Role.NOT_IN_MODEL and not blocks.is_omitted_by_transformers(
            f"{linear.name}.weight"
        ):
            raise CheckpointError(
                f"{blocks.where} quantizes {linear.name}, which transformers'"
                f" {type(blocks.model).__name__} doesn't have; it can't be evaluated"
            )


def _activations_quantized(
    present: Sequence[StoredLinear], inputs_quantized: Container[str]
) -> bool | str:
    count = sum(
        linear.computed.input is not None for linear in present if linear.name in inputs_quantized
    )
    return count == len(present) if count in (0, len(present)) else "partial"


# ---- The Linears of a quantized checkpoint.


class Role(Enum):
    """What transformers' model makes of a stored Linear."""

    LINEAR = "a Linear, which a QuantizedLinear replaces"
    STACKED_EXPERT = "a part of stacked experts, dequantized"
    OWN_FORWARD = "a Linear that computes in a way of its own, dequantized"
    NOT_IN_MODEL = "nothing"


@dataclass(frozen=True)
class StoredLinear:
    """A quantized Linear of a checkpoint.

    name: in the checkpoint.
    suffixes: of its tensors, such as weight_packed.
    scheme: as it is stored.
    computed: as the hardware computes it.
    role: in the model.
    path: of the module that its weight goes into, "" where there is none.
    shared_by: paths of further Linears that are tied to it.
    """

    name: str
    suffixes: tuple[str, ...]
    scheme: QuantScheme
    computed: QuantScheme
    role: Role
    path: str = ""
    shared_by: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of the Linears that a QuantizedLinear replaces."""
        return (self.path, *self.shared_by) if self.role is Role.LINEAR else ()


def _stored_linears(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    skeleton: nn.Module,
    computed: Mapping[QuantScheme, QuantScheme],
) -> dict[str, StoredLinear]:
    """Each by its name."""
    suffixes = stored_linears(checkpoint.tensors)
    found = WeightMap(skeleton, [f"{name}.weight" for name in suffixes])
    modules = dict(skeleton.named_modules())
    shared: dict[str, list[str]] = {}
    for target, source in found.shared.items():
        shared.setdefault(source.removesuffix(".weight"), []).append(target.removesuffix(".weight"))
    linears = {}
    for name in suffixes:
        scheme = config.scheme_of(name)
        if scheme is None:
            raise CheckpointError(
                f"{name} has quantized tensors but quantization_config ignores it; `quantkit verify"
                f" {shlex.quote(str(checkpoint.path))}` lists all faults"
            )
        path = found.target_of.get(f"{name}.weight", "").removesuffix(".weight")
        linears[name] = StoredLinear(
            name,
            tuple(suffixes[name]),
            scheme,
            computed[scheme],
            _role(path, modules),
            path,
            tuple(shared.get(path, ())),
        )
    return linears


def _role(path: str, modules: Mapping[str, nn.Module]) -> Role:
    """path: of the module, or of the parameter where experts are merged into one."""
    if not path:
        return Role.NOT_IN_MODEL
    if path not in modules:
        return Role.STACKED_EXPERT
    kind: Any = type(modules[path])
    is_linear = issubclass(kind, nn.Linear) and _computes_as_linear(kind)
    # DeepSeek V4's grouped projection has a forward of its own.
    return Role.LINEAR if is_linear else Role.OWN_FORWARD


class QuantizedWeights:
    """The tensors of a quantized checkpoint, and the QuantizedLinears that take the place of
    Linears.

    linears: the quantized Linears, by their names in the checkpoint.
    restacked: experts among them that are quantized one by one, where transformers looks for
    stacks alone.
    kv_tensors: scales of keys and values, by their names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: QuantizationConfig,
        skeleton: nn.Module,
        computed: Mapping[QuantScheme, QuantScheme],
        device: str,
        use_kernels: bool = True,
    ) -> None:
        checkpoint = conv1d_as_linear(checkpoint)
        self._checkpoint, self._device, self._use_kernels = checkpoint, device, use_kernels
        model_config: Any = skeleton.config
        self._dtype: torch.dtype = model_config.dtype
        self._file_format = config.file_format
        self.linears = _stored_linears(checkpoint, config, skeleton, computed)
        for linear in self.linears.values():
            self._require_readable(linear)
        self.restacked = Restacked.of(
            skeleton,
            [name for name, linear in self.linears.items() if linear.role is not Role.LINEAR],
        )
        for name in self.restacked.parts() & set(self.linears):
            self.linears[name] = replace(self.linears[name], role=Role.STACKED_EXPERT)
        self.kv_tensors: dict[str, Tensor] = {}
        self._others = []
        for name, info in checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            attention = kv_scale_module(name)
            if attention is not None:
                self.kv_tensors[f"{attention}.{suffix}"] = checkpoint.read(name).float().reshape(-1)
            elif module not in self.linears:
                if holds_codes(info.dtype):
                    raise CheckpointError(
                        f"{name} holds codes, but {module}.weight_scale is missing; `quantkit"
                        f" verify {shlex.quote(str(checkpoint.path))}` lists all faults"
                    )
                self._others.append(name)

    def input_scale(self, name: str) -> Tensor:
        """The static scale of a Linear's input, [1]."""
        scale = self._decoded(self.linears[name])[1]
        assert scale is not None, name
        return scale

    def _kernel_for(self, linear: StoredLinear) -> tuple[str | None, str]:
        if linear.role is not Role.LINEAR:
            return (
                None,
                (
                    "transformers stacks it with other experts, or computes it in a way of its own;"
                    " such run with dequantized weights"
                ),
            )
        return kernel_for(
            linear.computed.weight,
            linear.computed.input,
            self._weight_shape(linear)[1],
            self._dtype,
            self._device,
        )

    def require_kernels(self) -> None:
        for linear in self.linears.values():
            kernel, why_not = self._kernel_for(linear)
            if kernel is None:
                raise EvaluationError(
                    f"--exec kernel: {linear.name} of {self._checkpoint.path} has none: {why_not};"
                    " use --exec auto or reference"
                )

    def count_kernels(self, linears: Iterable[StoredLinear]) -> dict[str, int]:
        kernels = [self._kernel_for(each)[0] if self._use_kernels else None for each in linears]
        return {name or "reference": kernels.count(name) for name in dict.fromkeys(kernels)}

    def _require_readable(self, linear: StoredLinear) -> None:
        """Refuse now, from headers alone, what would be found when the Linear's block is loaded."""
        tensors = {}
        for suffix in linear.suffixes:
            info = self._checkpoint.tensors[f"{linear.name}.{suffix}"]
            tensors[suffix] = (
                self._checkpoint.read(info.name)
                if suffix == "weight_shape"
                else torch.empty(info.shape, dtype=torch_dtype(info), device="meta")
            )
        self._file_format.decode(tensors, linear.scheme, linear.name)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = {name: self._checkpoint.tensors[name].shape for name in self._others}
        merged = self.restacked.parts()
        shapes |= self.restacked.shapes
        for name, linear in self.linears.items():
            if name in merged:
                continue
            shapes[f"{name}.weight"] = self._weight_shape(linear)
            if "bias" in linear.suffixes:
                shapes[f"{name}.bias"] = self._checkpoint.tensors[f"{name}.bias"].shape
        return shapes

    def _weight_shape(self, linear: StoredLinear) -> tuple[int, ...]:
        if "weight" in linear.suffixes:
            return self._checkpoint.tensors[f"{linear.name}.weight"].shape
        return tuple(self._decoded(linear)[0].qdata.shape)

    def _decoded(self, linear: StoredLinear) -> tuple[QuantizedTensor, Tensor | None]:
        tensors = {
            suffix: self._checkpoint.read(f"{linear.name}.{suffix}") for suffix in linear.suffixes
        }
        return self._file_format.decode(tensors, linear.scheme, linear.name)

    def _dequantized(self, name: str) -> Tensor:
        return self._decoded(self.linears[name])[0].dequantize().to(self._dtype)

    def read(self, name: str) -> Tensor:
        """A tensor as transformers shall have it. A weight whose codes come in its place later is a
        shape alone.
        """
        if name in self.restacked.shapes:
            return self.restacked.read(name, self._dequantized)
        module, _, suffix = name.rpartition(".")
        linear = self.linears.get(module)
        if linear is None or suffix != "weight":
            return self._checkpoint.read(name)
        if linear.role is Role.LINEAR:
            return torch.zeros((), dtype=self._dtype).expand(self._weight_shape(linear))
        return self._dequantized(module)

    def finish(self, model: nn.Module, prefix: str) -> None:
        """Put QuantizedLinears in place of the Linears under `prefix` that have their weights; of
        all outside of the blocks with "".
        """
        for stored in self.linears.values():
            for path in stored.places:
                if prefix and not path.startswith(f"{prefix}."):
                    continue
                linear = model.get_submodule(path)
                if isinstance(linear, nn.Linear) and not linear.weight.is_meta:
                    model.set_submodule(path, self._quantized_linear(stored, linear.bias))

    def _quantized_linear(self, linear: StoredLinear, bias: Tensor | None) -> QuantizedLinear:
        weight, input_scale = self._decoded(linear)
        weight = replace(
            weight, qdata=weight.qdata.to(self._device), scale=weight.scale.to(self._device)
        )
        return QuantizedLinear(
            weight,
            linear.computed,
            None if input_scale is None else input_scale.to(self._device),
            bias,
            self._dtype,
            self._use_kernels,
        )


@functools.cache
def _computes_as_linear(kind: Any) -> bool:
    """Whether the forward of a subclass of nn.Linear is Linear's, or gives the same on a small one
    (Falcon's writes it out).
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
    config: QuantizationConfig,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    linears: Iterable[StoredLinear],
    device: str,
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """Scale of keys and of values by layer. tensors: by their names in the checkpoint; linears:
    tell what modules are called there.
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
            " would use the scale 1; export it again with --kv-cache fp8"
        )
    return scales
