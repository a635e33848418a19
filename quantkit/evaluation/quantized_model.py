"""A checkpoint, loaded as a server runs it: quantized Linears and, if it has one, an FP8 KV cache.

Codes and scales are read from the files block by block. Any checkpoint in one of
`checkpoint.formats` can be loaded, whichever tool wrote it. An unquantized one is loaded too.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import DynamicCache

from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.evaluation.quantized_cache import QuantizedCache, read_kv_scales
from quantkit.evaluation.quantized_experts import (
    EXPERTS_IMPLEMENTATION,
    quantize_expert_inputs,
    register_serving_experts,
)
from quantkit.evaluation.quantized_weights import QuantizedWeights, Role, StoredLinear
from quantkit.exporter.runtimes import as_computed
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.skeleton import StoredWeights, build_skeleton


@dataclass(frozen=True)
class QuantizedModel:
    """A model that is ready to run, with its decoder blocks still on disk.

    blocks: the model, block by block.
    checkpoint: its files.
    scheme: name of the scheme; "mixed" with several, or the stored dtype of an unquantized model.
    quantized_linears: number of Linears that run quantized.
    activations_quantized: whether their inputs are quantized: True, False, or "partial".
    weights_only: Linears whose inputs stay unquantized although their scheme quantizes them:
        stacked experts with different specs, and Linears with a forward of their own.
    kv_scales: layer → (scale of keys, scale of values), each [1]; None without an FP8 KV cache.
    kernels: kernel → number of Linears that run through it; "reference" for those without one.
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
        """A KV cache for one window; None if keys and values aren't quantized."""
        return QuantizedCache(self.kv_scales) if self.kv_scales else None


def load_quantized_model(
    path: Path,
    device: str,
    hardware: str | None = None,
    trust_remote_code: bool = False,
    exec: str = "auto",
) -> QuantizedModel:
    """Open a checkpoint, quantized or not, for evaluation.

    path: the model's directory.
    device: "cpu" or "cuda".
    hardware: compute as this hardware would (`runtimes.as_computed`); None for the scheme's own
        arithmetic.
    trust_remote_code: allow models with code of their own.
    exec: "auto" runs kernels where there are any, "kernel" requires them, "reference" uses none.

    Raises CheckpointError if the files can't be loaded, EvaluationError if `exec` is "kernel" and a
    Linear has none, RuntimeLimitError if the hardware can't run a scheme.
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
        read_kv_scales(config, skeleton, weights.kv_tensors, weights.linears.values(), device),
        weights.count_kernels(present),
        tuple(sorted(absent)),
    )


def _unquantized(checkpoint: Checkpoint, skeleton: nn.Module, device: str) -> QuantizedModel:
    config = checkpoint.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    blocks = BlockwiseModel(skeleton, StoredWeights(checkpoint), str(checkpoint.path), device)
    return QuantizedModel(blocks, checkpoint, dtype, 0, False, (), None, {})


def _require_known(linears: Iterable[StoredLinear], blocks: BlockwiseModel) -> None:
    """Raise CheckpointError for a Linear that neither transformers nor any runtime has."""
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
    """Whether the Linears quantize their inputs: True, False, or "partial" if only some do."""
    count = sum(
        linear.computed.input is not None for linear in present if linear.name in inputs_quantized
    )
    return count == len(present) if count in (0, len(present)) else "partial"
