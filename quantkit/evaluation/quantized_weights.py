"""The tensors of a quantized checkpoint, and the QuantizedLinears that run them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.formats import QuantizationConfig, kv_scale_module, stored_linears
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tensor_reader import torch_dtype
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.models.experts import Restacked
from quantkit.models.linear_views import conv1d_as_linear
from quantkit.models.weight_map import WeightMap
from quantkit.ops.linear import QuantizedLinear, kernel_for
from quantkit.ops.reference import QuantizedTensor
from quantkit.schemes.number_formats import holds_codes
from quantkit.schemes.scheme import QuantScheme


class Role(Enum):
    """What a stored Linear is in transformers' model."""

    LINEAR = "a Linear, which a QuantizedLinear replaces"
    STACKED_EXPERT = "one expert in a stacked tensor, dequantized"
    OWN_FORWARD = "a Linear with a forward of its own, dequantized"
    NOT_IN_MODEL = "not in the model"


@dataclass(frozen=True)
class StoredLinear:
    """A quantized Linear of a checkpoint.

    name: its name in the checkpoint.
    suffixes: suffixes of its tensors, such as "weight_packed".
    scheme: the scheme that it is stored in.
    computed: the scheme that the hardware computes.
    role: what it is in transformers' model.
    path: path of the module that gets its weight; "" if there is none.
    shared_by: paths of further Linears that share its weight.
    """

    name: str
    suffixes: tuple[str, ...]
    scheme: QuantScheme
    computed: QuantScheme
    role: Role
    path: str = ""
    shared_by: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the Linears that a QuantizedLinear replaces."""
        return (self.path, *self.shared_by) if self.role is Role.LINEAR else ()


def _stored_linears(
    checkpoint: Checkpoint,
    config: QuantizationConfig,
    skeleton: nn.Module,
    computed: Mapping[QuantScheme, QuantScheme],
) -> dict[str, StoredLinear]:
    """The quantized Linears by name. Raises CheckpointError for one that the config ignores.

    computed: stored scheme → the scheme that the hardware computes.
    """
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
                f"{name} has quantized tensors but quantization_config ignores it",
                hint=f"`quantkit.verify({str(checkpoint.path)!r})` lists all faults",
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
    """path: path of the module, or of the parameter if experts are stacked in one."""
    if not path:
        return Role.NOT_IN_MODEL
    if path not in modules:
        return Role.STACKED_EXPERT
    kind: Any = type(modules[path])
    is_linear = issubclass(kind, nn.Linear) and _computes_as_linear(kind)
    # DeepSeek V4's grouped projection has a forward of its own.
    return Role.LINEAR if is_linear else Role.OWN_FORWARD


class QuantizedWeights:
    """Loads the tensors of a quantized checkpoint, and replaces Linears by QuantizedLinears.

    linears: name in the checkpoint → quantized Linear.
    restacked: experts that are stored one by one, but that transformers loads as a stack.
    kv_tensors: "ATTENTION.k_scale" or "ATTENTION.v_scale" → scale, [1] float32.

    Raises CheckpointError if a Linear's tensors can't be read or have no scheme.
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
                        f"{name} holds codes, but {module}.weight_scale is missing",
                        hint=f"`quantkit.verify({str(checkpoint.path)!r})` lists all faults",
                    )
                self._others.append(name)

    def input_scale(self, name: str) -> Tensor:
        """The static scale of a Linear's input, [1] float32."""
        scale = self._decoded(self.linears[name])[1]
        assert scale is not None, name
        return scale

    def _kernel_for(self, linear: StoredLinear) -> tuple[str | None, str]:
        """The kernel that runs a Linear, or None and the reason why there is none."""
        if linear.role is not Role.LINEAR:
            return (
                None,
                (
                    "transformers stacks it with other experts, or gives it a forward of its own,"
                    " so it runs with dequantized weights"
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
        """Raise EvaluationError if a Linear has no kernel."""
        for linear in self.linears.values():
            kernel, why_not = self._kernel_for(linear)
            if kernel is None:
                raise EvaluationError(
                    f"`exec='kernel'`: {linear.name} of {self._checkpoint.path} has no kernel:"
                    f" {why_not}",
                    hint="use `exec='auto'` or `exec='reference'`",
                )

    def count_kernels(self, linears: Iterable[StoredLinear]) -> dict[str, int]:
        """Kernel, or "reference" → number of Linears that run through it."""
        kernels = [self._kernel_for(each)[0] if self._use_kernels else None for each in linears]
        return {name or "reference": kernels.count(name) for name in dict.fromkeys(kernels)}

    def _require_readable(self, linear: StoredLinear) -> None:
        """Decode the Linear's headers, to find faults now and not when its block is loaded."""
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
        """Parameter name, as transformers loads it → shape."""
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
        """A parameter for transformers. The weight of a Linear that a QuantizedLinear will replace
        is a placeholder: zeros of the right shape that take no memory.
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
        """Replace the loaded Linears under `prefix` by QuantizedLinears.

        prefix: path of a block; "" for all Linears outside of the blocks.
        """
        for stored in self.linears.values():
            for path in stored.paths:
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
    """Whether a subclass of nn.Linear computes the same as nn.Linear: it has the same forward, or
    one that gives the same result on a small example (Falcon's).
    """
    if kind.forward is nn.Linear.forward:
        return True
    small = nn.utils.skip_init(nn.Linear, 3, 2).requires_grad_(False)
    for place, parameter in enumerate(small.parameters()):
        parameter.copy_(torch.arange(float(parameter.numel())).reshape(parameter.shape) - place - 1)
    inputs = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]]])
    try:
        return torch.allclose(kind.forward(small, inputs), small(inputs))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False  # its forward needs attributes that nn.Linear doesn't have
