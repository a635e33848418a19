"""Everything that is obtained from transformers: a model without weights, its configuration, its
weights from a checkpoint, and its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.checkpoint.header import DTYPES
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.stream import block_scales, source_spec
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.models.experts import adopt_experts
from quantkit.models.linear_views import conv1d_as_linear
from quantkit.models.task import CAUSAL, MASKED, task_of
from quantkit.models.tensor_roles import is_of_other_tower


def linears_for_conv1d(model: nn.Module) -> None:
    """Replace each Conv1D by a Linear, which computes the same from the transposed weight
    (`linear_views.conv1d_as_linear`).
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            model.set_submodule(
                name, nn.Linear(in_features, out_features, dtype=module.weight.dtype)
            )


def auto_class(config: Any) -> Any:
    """transformers' auto class that builds a model with its output head from a configuration.

    It is a text model, or a multimodal one if the configuration belongs to no text model.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
    )

    task = task_of(config.to_dict(), config.name_or_path or "the model")
    if task != CAUSAL:
        return AutoModelForMaskedLM if task == MASKED else AutoModelForSeq2SeqLM
    others = (
        ()
        if type(config) in AutoModelForCausalLM._model_mapping
        else (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    )
    return next(
        (auto for auto in others if type(config) in auto._model_mapping), AutoModelForCausalLM
    )


def body_name(model: Any) -> str | None:
    """The child module that computes hidden states from tokens; None if the model is its own body,
    without an output head.
    """
    name = model.base_model_prefix
    if getattr(model, name, None) is not None:
        return None if getattr(model, name) is model else name
    head = model.get_output_embeddings()
    children = {name: child for name, child in model.named_children() if child is not head}
    if "decoder" in children:
        return "decoder"
    return (
        max(
            children,
            key=lambda name: sum(parameter.numel() for parameter in children[name].parameters()),
        )
        if head is not None and children
        else None
    )


def require_no_missing(path: Any, missing: Iterable[str]) -> None:
    """Raise CheckpointError if weights are missing: transformers would initialize them randomly."""
    missing = sorted(missing)
    if missing:
        raise CheckpointError(
            f"{path} lacks the weight"
            f" {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; fetch or"
            " export it again"
        )


def auto_config(path: Any, trust_remote_code: bool) -> Any:
    """transformers' configuration of a checkpoint.

    Raises CheckpointError if transformers doesn't support the model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers' validation raises exceptions of many kinds
        hint = "pass `trust_remote_code=True` to run the code in the checkpoint"
        raise CheckpointError(
            f"transformers doesn't know the model in {path}: {' '.join(str(error).split())[:300]}",
            hint=hint if "trust_remote_code" in str(error) else "",
        ) from None


def pick_device(requested: str) -> str:
    """The device to compute on: `auto` is a CUDA device if torch finds one, else the CPU.

    Raises QuantkitError for an unknown or unavailable device.
    """
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise QuantkitError(f"unknown device '{requested}'; choose auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise QuantkitError(f"the device '{requested}' isn't supported; choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise QuantkitError(
            f"`device={requested!r}`: this torch finds no CUDA device", hint="use `device='cpu'`"
        )
    return requested


class Weights(Protocol):
    """The source of a model's tensors, by the names that an unquantized checkpoint has."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name → shape, for all tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor by its name."""
        ...

    def finish(self, model: nn.Module, prefix: str) -> None:
        """Called after the parameters under `prefix` were loaded, to replace modules there if
        needed.
        """


class StoredWeights:
    """The tensors of an unquantized checkpoint as stored, or of one in FP8 blocks, dequantized.

    require_finite: raise CheckpointError for a tensor that holds NaN or infinity.
    """

    def __init__(self, checkpoint: Checkpoint, require_finite: bool = False) -> None:
        self._checkpoint, self._require_finite = conv1d_as_linear(checkpoint), require_finite
        self._scales = block_scales(checkpoint)
        self._block = source_spec(checkpoint).granularity if self._scales else None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name → shape, without the tensors of block scales."""
        scales = set(self._scales.values())
        return {
            name: info.shape
            for name, info in self._checkpoint.tensors.items()
            if name not in scales
        }

    def read(self, name: str) -> Tensor:
        """One tensor by its name; weights in FP8 blocks as float32. Raises CheckpointError for NaN
        or infinity if `require_finite`.
        """
        tensor = self._checkpoint.read(name)
        if self._block is not None and name in self._scales:
            scale = self._checkpoint.read(self._scales[name]).float()
            tensor = torch.ops.quantkit.dequantize_blocks(
                tensor, scale, self._block.rows, self._block.columns
            )
        # Minimum and maximum are NaN if any value is. Computing them takes no memory, and less time
        # than reading the tensor.
        if (
            self._require_finite
            and tensor.is_floating_point()
            and tensor.numel()
            and not torch.isfinite(torch.stack(tensor.aminmax())).all()
        ):
            raise CheckpointError(
                f"the weight {name} of {self._checkpoint.path} holds NaN or infinity; a model with"
                " it is unusable, so fetch it again or repair it"
            )
        return tensor

    def finish(self, model: nn.Module, prefix: str) -> None:
        """Nothing to replace: the model's own modules use these weights."""
        pass


def build_skeleton(
    checkpoint: Checkpoint, trust_remote_code: bool = False, untied: bool = False, **settings: Any
) -> nn.Module:
    """The model on the meta device in its stored dtype; buffers that no checkpoint holds have their
    values.

    untied: give the output head a tensor of its own, whatever the configuration says.
    settings: settings of transformers' configuration, such as `experts_implementation`.

    Raises CheckpointError if transformers can't build the model.
    """
    task_of(checkpoint.config, checkpoint.path)
    config = auto_config(checkpoint.path, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "rescale_every", 0):
        # RWKV halves hidden states every few blocks, with halved weights to match, so that float16
        # doesn't overflow. Without it, the result is the same.
        config.rescale_every = 0
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    dtype = (
        config.dtype
        if isinstance(getattr(config, "dtype", None), torch.dtype)
        else _stored_dtype(checkpoint)
    )
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(
                config, trust_remote_code=trust_remote_code, dtype=dtype, **settings
            )
            linears_for_conv1d(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor._is_hf_initialized = True
        for name, buffer in list(model.named_non_persistent_buffers()):
            put_tensor(model, name, torch.empty_like(buffer, device="cpu"))
        model.initialize_weights()
    except Exception as error:  # transformers raises exceptions of every kind
        raise CheckpointError(
            f"transformers can't build {checkpoint.path}: {' '.join(str(error).split())[:300]}"
        ) from None
    adopt_experts(model, settings.get("experts_implementation", ""))
    return model.eval().requires_grad_(False)


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or a buffer of the module tree.

    name: its path.
    """
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating-point tensor, which transformers uses too if the
    configuration has none.
    """
    names = ("BF16", "F16", "F32", "F64")
    return next(
        (
            getattr(torch, DTYPES[info.dtype][1])
            for info in checkpoint.tensors.values()
            if info.dtype in names
        ),
        torch.bfloat16,
    )


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder blocks.

    It is the largest list with as many modules as the configuration has layers, outside of vision
    and audio towers.

    Raises CheckpointError if there is none.
    """
    config = model.config.get_text_config()
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    # LongCat's num_hidden_layers counts attention layers, of which each block has two.
    counts = [
        getattr(config, name)
        for name in ("num_hidden_layers", "num_layers")
        if isinstance(getattr(config, name, None), int)
    ]
    for layers in counts:
        found = [item for item in lists if len(item[1]) == layers]
        if found:
            return max(
                found,
                key=lambda item: (
                    not is_of_other_tower(item[0]),
                    sum(parameter.numel() for parameter in item[1].parameters()),
                ),
            )
    blocks = f"{counts[0]} decoder blocks" if counts else "decoder blocks"
    raise CheckpointError(
        f"{type(model).__name__} has no list of {blocks}; quantkit runs decoder-only language"
        " models"
    )
