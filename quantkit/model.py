"""Walking a model: from tensor names and shapes alone, and as a module tree.

`export` never builds the model, so it must know a Linear by its name and shape: a two-dimensional `….weight` inside a numbered
decoder block that is no norm, embedding or router. What can't be told apart that way is refused, never guessed. Tensors are those of `matrices.as_matrices`.
`calibrate` and `eval` walk the module tree that transformers builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.matrices import ALTERNATING, BIASED, FLAT, alternates, as_matrices, has_biases
from quantkit.scheme import Pattern
from quantkit.task import CAUSAL, MASKED, task_of

if TYPE_CHECKING:
    from torch import nn

# A block's number: the first path component that is a number, after a list's name (`layers.3.`, `h.3.`, `block.3.`).
BLOCK = re.compile(r"^(?P<prefix>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(?P<number>\d+)\.")
# Stacks of experts have larger last dimensions than any convolution's kernel.
_LEAST_MATRIX = 16
_NORM = re.compile(r"(^|_)(norm|layernorm|rmsnorm|ln)\d*($|_)|(^|_)ln_\w+$|norm$|layernorm$", re.IGNORECASE)
_SHARD = re.compile(r"shard_\d+")
# Not what projects embeddings (Electra's, RemBERT's, Gemma 3n's altup_unembed_projections), which is a Linear.
_EMBEDDING = re.compile(r"embed(?!.*(proj|mapping))|^wte$|^wpe$|^relative_attention_bias$", re.IGNORECASE)
# By name, because nothing else tells them where no model is built. dt_proj: the step size of a Mamba mixer, whose kernel reads the weight; no forward
# pass calls it, but only `calibrate` has one to see that (tests compare the two). eh_proj: what joins a further token's embedding to the hidden states;
# transformers leaves such layers out, so that no pass runs it. weights_proj: the weights of an indexer's heads (DeepSeek V3.2, GLM-5), called as any
# Linear, but merged with an unquantized one by runtimes, and in full precision in published FP8 checkpoints too.
_USED_DIRECTLY = ("dt_proj", "eh_proj", "weights_proj")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|multi_modal_projector|mm_projector|connector", re.IGNORECASE)


@dataclass(frozen=True)
class ModuleInfo:
    """One weight of the checkpoint and what it is.

    kind: "linear", or why it is left: "lm_head", "embedding", "norm", "router", "other tower", "outside the blocks", "used directly",
    "not a matrix"; "unreached" is a weight that should be quantized but that quantkit can't handle.
    """

    name: str  # the module's, without ".weight"
    tensor: str
    shape: tuple[int, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a checkpoint, each Linear as one matrix, and the role of each. Made by `linears_of` alone.

    stored: the checkpoint as it was opened.
    checkpoint: the same with each Linear as a view [out_features, in_features] (`matrices.as_matrices`).
    roles: tensor of `checkpoint` → its role.
    """

    stored: Checkpoint
    checkpoint: Checkpoint
    roles: Mapping[str, ModuleInfo]

    def modules(self, *kinds: str) -> dict[str, ModuleInfo]:
        """Module → role, for each weight of one of these kinds; of all kinds where none is named."""
        return {role.name: role for role in self.roles.values() if role.tensor.endswith(".weight") and (not kinds or role.kind in kinds)}

    def is_transposed(self, module: str) -> bool:
        """Whether a Linear is stored as [in_features, out_features] in a tensor of its own (Conv1D)."""
        tensor = f"{module}.weight"
        return tensor in self.stored.tensors and not self.checkpoint.tensors[tensor].is_dense


def linears_of(checkpoint: Checkpoint) -> ModelTensors:
    """The Linears of a checkpoint and what else is in it, from names and shapes alone."""
    matrices = as_matrices(checkpoint)
    shapes = {name: info.shape for name, info in matrices.tensors.items()}
    roles = {tensor: ModuleInfo(tensor.removesuffix(".weight"), tensor, shape, *_kind(tensor, shape, shapes)) for tensor, shape in shapes.items()}
    return ModelTensors(checkpoint, matrices, roles)


def _kind(tensor: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    module, _, parameter = tensor.rpartition(".")
    parts = module.split(".")
    leaf = parts[-1]
    if leaf == "lm_head":
        return "lm_head", "lm_head is left by rule"
    # A layer that transformers leaves out as well. Its shape is lm_head's, but so is k_proj's where a vocabulary is as small as a byte's.
    if parts[-2:] == ["shared_head", "head"]:
        return "lm_head", "the head of a layer that predicts further tokens is left like lm_head"
    if is_of_other_tower(module):
        return "other tower", "not part of the language model"
    block = BLOCK.match(tensor)
    is_embedding = _EMBEDDING.search(parts[-2] if _SHARD.fullmatch(leaf) and len(parts) > 1 else leaf)
    if block is None or "." not in tensor[block.end() :]:
        return ("embedding", "embeddings are left by rule") if is_embedding else ("outside the blocks", "outside the decoder blocks")
    if _NORM.search(leaf):
        return "norm", "norms are left by rule"
    if is_embedding:
        return "embedding", "embeddings are left by rule"
    if _is_router(leaf, parts, shapes):
        return "router", "routers are left by rule"
    if parameter in ("bias", "weight") and len(shape) < 2:
        return "not a matrix", "a vector"
    if "experts" in parts and len(shape) > 1 and has_biases(tensor.removesuffix("_bias"), shapes):
        return "unreached", BIASED
    if alternates(tensor, shapes):
        return "unreached", ALTERNATING
    if _is_block_diagonal(module, shape, shapes):
        return "used directly", "blocks of a block-diagonal matrix, which is no Linear in runtimes"
    if len(shape) == 3 and f"{module}.A_log" in shapes:
        return "used directly", "a matrix for each head of a state space, which is no Linear in runtimes"
    if len(shape) == 3 and ("experts" in (*parts, parameter) or min(shape[-2:]) >= _LEAST_MATRIX):
        return "unreached", "a stack of matrices in one tensor of 3 dimensions that is no layer's pair of experts' weights"
    if "experts" in parts and parameter not in ("weight", "bias") and len(shape) == 2:
        return "unreached", FLAT if parameter in ("w1", "v1", "w2") else "experts whose names quantkit doesn't know"
    if parameter != "weight" or len(shape) != 2:
        return "not a matrix", "not a Linear's weight"
    if leaf in _USED_DIRECTLY:
        return "used directly", f"{leaf} is no Linear in runtimes, which use its weight directly or keep it unquantized"
    if 0 in shape:
        return "unreached", f"has the empty shape {list(shape)}"
    return "linear", ""


def _is_block_diagonal(module: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether square blocks [blocks, size, size] act on as many features as a vector beside them has, each block on its own (RG-LRU's gates)."""
    if len(shape) != 3 or shape[1] != shape[2] or "experts" in module.split("."):
        return False
    return any(len(other) == 1 and other[0] == shape[0] * shape[1] and name.rpartition(".")[0] == module for name, other in shapes.items())


def is_of_other_tower(module: str) -> bool:
    """Whether a module, by its name, sees or hears, and is no part of the language model."""
    return any(_OTHER_TOWER.search(part) for part in module.split("."))


def _is_router(leaf: str, parts: list[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if leaf == "shared_expert_gate" or any("router" in part for part in parts):
        return True
    if "gate" not in parts:
        return False
    # `gate` beside `experts` routes, and so does what is in it (HunYuan's `gate.wg`); `gate` elsewhere may be an ordinary Linear.
    parent = ".".join(parts[: parts.index("gate")])
    return any(name.startswith((f"{parent}.experts.", f"{parent}.shared_expert")) for name in shapes)


# Attention whose queries read other hidden states than its keys and values (BART's, Whisper's, Mllama's), where runtimes merge only the latter two.
_CROSS_ATTENTION = re.compile(r"encoder_attn|cross_?att", re.IGNORECASE)
# Linears that runtimes merge into one. Their members must share one scheme, and one scale where a scale is per tensor.
# Names of projections, not of architectures: a set exists where all its members stand side by side.
_QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
FUSED_SETS: tuple[tuple[str, ...], ...] = (
    *_QUERY_KEY_VALUE, ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
)  # fmt: skip


def fused_sets(linears: Iterable[str]) -> list[tuple[str, ...]]:
    """The Linears that runtimes merge, as tuples of module names; a Linear in none of them doesn't appear."""
    names = dict.fromkeys(linears)
    sets = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        crosses = any(_CROSS_ATTENTION.search(part) for part in parent.split(".")[-2:])
        for members in FUSED_SETS:
            if crosses and members in _QUERY_KEY_VALUE:
                members = members[1:]
            candidates = tuple(f"{parent}.{member}" if parent else member for member in members)
            if leaf == members[0] and all(candidate in names for candidate in candidates):
                sets.append(candidates)
    return sets


def covering_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """As few patterns for --ignore as match all of `names` and none of `others`: a whole module where all in it is meant, numbers as `*`, or a whole block."""
    others = list(others)
    patterns: list[Pattern] = []
    refused: set[str] = set()
    for name in names:
        if any(pattern.matches(name) for pattern in patterns):
            continue
        numberless = ".".join("*" if part.isdigit() else part for part in name.split("."))
        block = BLOCK.match(name)
        for text in (f"{numberless.rpartition('.')[0]}.*", numberless, f"{block[0]}*" if block else name, name):
            pattern = Pattern(text)
            if text == name or (text not in refused and not any(pattern.matches(other) for other in others)):
                patterns.append(pattern)
                break
            refused.add(text)
    return [pattern.text for pattern in patterns]


def linears_for_conv1d(model: nn.Module) -> None:
    """Put a Linear in place of each Conv1D, which computes the same from the transposed weight (`matrices.with_upright_weights`)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, leaf = name.rpartition(".")
            in_features, out_features = module.weight.shape
            setattr(model.get_submodule(parent), leaf, nn.Linear(in_features, out_features, dtype=module.weight.dtype))


def auto_class(config: Any) -> Any:
    """transformers' class that builds the model of a configuration with its output head: a text model, or one that sees or hears beside reading text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM

    task = task_of(config.to_dict(), config.name_or_path or "the model")
    if task != CAUSAL:
        return AutoModelForMaskedLM if task == MASKED else AutoModelForSeq2SeqLM
    others = () if type(config) in AutoModelForCausalLM._model_mapping else (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    return next((auto for auto in others if type(config) in auto._model_mapping), AutoModelForCausalLM)


def body_name(model: nn.Module) -> str | None:
    """The child of a model that makes hidden states from tokens; None of a model that is its own body, without an output head."""
    name = model.base_model_prefix
    if getattr(model, name, None) is not None:
        return None if getattr(model, name) is model else name
    head = model.get_output_embeddings()
    children = {name: child for name, child in model.named_children() if child is not head}
    if "decoder" in children:
        return "decoder"
    return max(children, key=lambda name: sum(parameter.numel() for parameter in children[name].parameters())) if head is not None and children else None


def require_no_missing(path: Any, missing: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights: transformers would fill them with random numbers."""
    missing = sorted(missing)
    if missing:
        raise CheckpointError(f"{path} lacks the weight {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; fetch or export it again")


def auto_config(path: Any, trust_remote_code: bool) -> Any:
    """transformers' configuration of a checkpoint."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers validates with many libraries' exceptions
        hint = " (pass --trust-remote-code to run the code in the checkpoint)" if "trust_remote_code" in str(error) else ""
        raise CheckpointError(f"transformers doesn't know the model in {path}{hint}: {' '.join(str(error).split())[:300]}") from None


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
