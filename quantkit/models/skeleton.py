"""What transformers is asked for: a model without its weights, its weights from a checkpoint, its
configuration, and the device it runs on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import DTYPES, Checkpoint
from quantkit.checkpoint.stream import block_scales, source_spec
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.models.experts import adopt_experts
from quantkit.models.linear_views import with_upright_weights
from quantkit.models.task import CAUSAL, MASKED, task_of
from quantkit.models.tensor_roles import is_of_other_tower


def linears_for_conv1d(model: nn.Module) -> None:
    """Put a Linear in place of each Conv1D, which computes the same from the transposed weight
    (`linear_views.with_upright_weights`).
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
    """transformers' class that builds the model of a configuration with its output head: a text
    model, or one that sees or hears beside reading text.
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
    """The child of a model that makes hidden states from tokens; None of a model that is its own
    body, without an output head.
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
    """Refuse a checkpoint that lacks weights: transformers would fill them with random numbers."""
    missing = sorted(missing)
    if missing:
        raise CheckpointError(
            f"{path} lacks the weight"
            f" {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; fetch or"
            " export it again"
        )


def auto_config(path: Any, trust_remote_code: bool) -> Any:
    """transformers' configuration of a checkpoint."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers validates with many libraries' exceptions
        hint = (
            " (pass --trust-remote-code to run the code in the checkpoint)"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise CheckpointError(
            f"transformers doesn't know the model in {path}{hint}:"
            f" {' '.join(str(error).split())[:300]}"
        ) from None


def pick_device(requested: str) -> str:
    """`auto` is a CUDA device where torch finds one, else the CPU."""
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
        raise QuantkitError("--device cuda: this torch finds no CUDA device; use --device cpu")
    return requested


class Weights(Protocol):
    """Where a model's tensors come from, under the names of an unquantized checkpoint."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...

    def finish(self, model: nn.Module, prefix: str) -> None:
        """Called when the parameters under `prefix` are in place: put other modules there, if
        any.
        """


class StoredWeights:
    """The tensors of an unquantized checkpoint, as they are, or of one in FP8 blocks, dequantized.
    require_finite: NaN or infinity in one is an error that names it.
    """

    def __init__(self, checkpoint: Checkpoint, require_finite: bool = False) -> None:
        self._checkpoint, self._require_finite = with_upright_weights(checkpoint), require_finite
        self._scales = block_scales(checkpoint)
        self._block = source_spec(checkpoint).granularity if self._scales else None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        scales = set(self._scales.values())
        return {
            name: info.shape
            for name, info in self._checkpoint.tensors.items()
            if name not in scales
        }

    def read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name)
        if self._block is not None and name in self._scales:
            scale = self._checkpoint.read(self._scales[name]).float()
            tensor = torch.ops.quantkit.dequantize_blocks(
                tensor, scale, self._block.rows, self._block.columns
            )
        # The extremes are NaN where any value is; finding them takes no memory, and less time than
        # the reading.
        if (
            self._require_finite
            and tensor.is_floating_point()
            and tensor.numel()
            and not torch.isfinite(torch.stack(tensor.aminmax())).all()
        ):
            raise CheckpointError(
                f"the weight {name} of {self._checkpoint.path} holds NaN or infinity; a model with"
                " it is ruined, so fetch it again or mend it"
            )
        return tensor

    def finish(self, model: nn.Module, prefix: str) -> None:
        pass


def build_skeleton(
    checkpoint: Checkpoint, trust_remote_code: bool = False, untied: bool = False, **settings: Any
) -> nn.Module:
    """The model in its stored dtype with parameters that have shapes but no memory; buffers that no
    checkpoint holds are filled.

    untied: its output head is a tensor of its own, whatever the configuration says. settings: of
    transformers' configuration, such as `experts_implementation`.
    """
    task_of(checkpoint.config, checkpoint.path)
    config = auto_config(checkpoint.path, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "rescale_every", 0):
        # RWKV halves hidden states every few blocks, and weights to match, lest float16 overflow:
        # the same result
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
    except Exception as error:  # transformers raises every kind
        raise CheckpointError(
            f"transformers can't build {checkpoint.path}: {' '.join(str(error).split())[:300]}"
        ) from None
    adopt_experts(model, settings.get("experts_implementation", ""))
    return model.eval().requires_grad_(False)


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or a buffer in the place of the one of this name in the module tree."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating-point tensor, as transformers chooses where the configuration
    doesn't say.
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
    """The name and list of a model's decoder blocks: as many as its configuration says layers, and
    the largest such list that neither sees nor hears.
    """
    config = model.config.get_text_config()
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    # LongCat counts attentions as hidden layers, two in each block.
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
