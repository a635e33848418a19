"""The role of each tensor of a checkpoint, decided from names and shapes alone.

`export` never builds the model. A Linear is therefore a 2-D `….weight` inside a numbered decoder
block that isn't a norm, embedding or router. An ambiguous tensor is refused, not guessed. Tensors
are those of `linear_views.as_linear_views`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.linear_views import (
    ALTERNATING,
    BIASED,
    FLAT,
    alternates,
    as_linear_views,
    has_biases,
)
from quantkit.schemes.pattern import BLOCK

# The least size of a matrix in a stack of experts, larger than any convolution's kernel.
_LEAST_MATRIX = 16
_NORM = re.compile(
    r"(^|_)(norm|layernorm|rmsnorm|ln)\d*($|_)|(^|_)ln_\w+$|norm$|layernorm$", re.IGNORECASE
)
_SHARD = re.compile(r"shard_\d+")
# Projections of embeddings are Linears (Electra's, RemBERT's, Gemma 3n's
# altup_unembed_projections).
_EMBEDDING = re.compile(
    r"embed(?!.*(proj|mapping))|^wte$|^wpe$|^relative_attention_bias$", re.IGNORECASE
)
# Linears that stay unquantized. Without a model, only their names identify them.
# dt_proj: the step size of a Mamba mixer. Its kernel reads the weight, so no forward calls the
#     Linear; `calibrate` sees that, and tests compare the two.
# eh_proj: joins a token's embedding to the hidden states in a layer for multi-token prediction.
#     transformers omits such layers, so no forward runs it.
# weights_proj: the head weights of an indexer (DeepSeek V3.2, GLM-5). Runtimes merge it with an
#     unquantized Linear, and published FP8 checkpoints keep it in full precision.
_USED_DIRECTLY = ("dt_proj", "eh_proj", "weights_proj")
_OTHER_TOWER = re.compile(
    r"vision|visual|image|audio|multi_modal_projector|mm_projector|connector", re.IGNORECASE
)


@dataclass(frozen=True)
class ModuleInfo:
    """One tensor of the checkpoint and its role.

    name: its module; the tensor's name without ".weight".
    tensor: its name.
    shape: elements in each dimension, of the view.
    kind: "linear", or why it is skipped: "lm_head", "embedding", "norm", "router", "other tower",
        "outside the blocks", "used directly", "not a matrix"; "unreached" is a weight that should
        be quantized but isn't supported.
    reason: the kind in words, for reports; "" for a Linear.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a checkpoint, each Linear as one view, and the role of each. Only `linears_of`
    makes it.

    stored: the checkpoint as it was opened.
    checkpoint: the same with each Linear as a view [out_features, in_features]
        (`linear_views.as_linear_views`).
    roles: tensor of `checkpoint` → its role.
    """

    stored: Checkpoint
    checkpoint: Checkpoint
    roles: Mapping[str, ModuleInfo]

    def modules(self, *kinds: str) -> dict[str, ModuleInfo]:
        """Module → role, for each weight of one of these kinds; without arguments, of all kinds."""
        return {
            role.name: role
            for role in self.roles.values()
            if role.tensor.endswith(".weight") and (not kinds or role.kind in kinds)
        }

    def is_transposed(self, module: str) -> bool:
        """Whether a Linear is stored as [in_features, out_features] in a tensor of its own
        (Conv1D).
        """
        tensor = f"{module}.weight"
        return tensor in self.stored.tensors and not self.checkpoint.tensors[tensor].is_dense


def linears_of(checkpoint: Checkpoint) -> ModelTensors:
    """The tensors of a checkpoint with their roles, from names and shapes alone."""
    views = as_linear_views(checkpoint)
    shapes = {name: info.shape for name, info in views.tensors.items()}
    roles = {
        tensor: ModuleInfo(
            tensor.removesuffix(".weight"), tensor, shape, *_kind(tensor, shape, shapes)
        )
        for tensor, shape in shapes.items()
    }
    return ModelTensors(checkpoint, views, roles)


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the rules below see it.

    name: such as "a.b.weight"; then module is "a.b", parameter "weight", parts ["a", "b"], leaf
        "b".
    shape: elements in each dimension.
    shapes: tensor name → shape, for the whole checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @cached_property
    def parameter(self) -> str:
        return self.name.rpartition(".")[2]

    @cached_property
    def parts(self) -> list[str]:
        return self.module.split(".")

    @property
    def leaf(self) -> str:
        return self.parts[-1]

    @property
    def is_of_experts(self) -> bool:
        """Whether it belongs to a module of experts."""
        return "experts" in self.parts

    @property
    def is_in_block(self) -> bool:
        """Whether it belongs to a module inside a numbered decoder block."""
        block = BLOCK.match(self.name)
        return block is not None and "." in self.name[block.end() :]

    @property
    def is_embedding(self) -> bool:
        """Whether its module is an embedding, or a shard of one, by its name."""
        is_shard = _SHARD.fullmatch(self.leaf) and len(self.parts) > 1
        return bool(_EMBEDDING.search(self.parts[-2] if is_shard else self.leaf))


@dataclass(frozen=True)
class _Rule:
    """A rule that gives tensors their kind.

    applies: whether the rule applies to a tensor.
    kind: see ModuleInfo.
    reason: see ModuleInfo; or a function that makes it.
    """

    applies: Callable[[_Tensor], bool]
    kind: str
    reason: str | Callable[[_Tensor], str]


# The first rule that applies decides; the last one always applies. The order matters, because
# rules overlap: an embedding or lm_head is also outside the blocks, an indexer's k_norm is also a
# vector, a router may be a matrix like any Linear.
_RULES = (
    _Rule(lambda tensor: tensor.leaf == "lm_head", "lm_head", "lm_head is skipped by rule"),
    # transformers omits this layer. Its shape doesn't identify it: with a vocabulary of bytes,
    # k_proj may have the shape of lm_head too.
    _Rule(
        lambda tensor: tensor.parts[-2:] == ["shared_head", "head"],
        "lm_head",
        "the head of a layer for multi-token prediction is skipped like lm_head",
    ),
    _Rule(
        lambda tensor: is_of_other_tower(tensor.module),
        "other tower",
        "not part of the language model",
    ),
    _Rule(
        lambda tensor: tensor.is_embedding and not tensor.is_in_block,
        "embedding",
        "embeddings are skipped by rule",
    ),
    _Rule(
        lambda tensor: not tensor.is_in_block, "outside the blocks", "outside the decoder blocks"
    ),
    _Rule(lambda tensor: bool(_NORM.search(tensor.leaf)), "norm", "norms are skipped by rule"),
    _Rule(lambda tensor: tensor.is_embedding, "embedding", "embeddings are skipped by rule"),
    _Rule(
        lambda tensor: _is_router(tensor.leaf, tensor.parts, tensor.shapes),
        "router",
        "routers are skipped by rule",
    ),
    _Rule(
        lambda tensor: tensor.parameter in ("bias", "weight") and len(tensor.shape) < 2,
        "not a matrix",
        "a vector",
    ),
    _Rule(
        lambda tensor: (
            tensor.is_of_experts
            and len(tensor.shape) > 1
            and has_biases(tensor.name.removesuffix("_bias"), tensor.shapes)
        ),
        "unreached",
        BIASED,
    ),
    _Rule(lambda tensor: alternates(tensor.name, tensor.shapes), "unreached", ALTERNATING),
    _Rule(
        lambda tensor: _is_block_diagonal(tensor.module, tensor.shape, tensor.shapes),
        "used directly",
        "blocks of a block-diagonal matrix, which is no Linear in runtimes",
    ),
    _Rule(
        lambda tensor: len(tensor.shape) == 3 and f"{tensor.module}.A_log" in tensor.shapes,
        "used directly",
        "a matrix for each head of a state space, which is no Linear in runtimes",
    ),
    _Rule(
        lambda tensor: (
            len(tensor.shape) == 3
            and (
                tensor.is_of_experts
                or tensor.parameter == "experts"
                or min(tensor.shape[-2:]) >= _LEAST_MATRIX
            )
        ),
        "unreached",
        "a stack of matrices in one tensor of 3 dimensions that is no layer's pair of experts'"
        " weights",
    ),
    _Rule(
        lambda tensor: (
            tensor.is_of_experts
            and tensor.parameter not in ("weight", "bias")
            and len(tensor.shape) == 2
        ),
        "unreached",
        lambda tensor: (
            FLAT
            if tensor.parameter in ("w1", "v1", "w2")
            else "experts whose names quantkit doesn't know"
        ),
    ),
    _Rule(
        lambda tensor: tensor.parameter != "weight" or len(tensor.shape) != 2,
        "not a matrix",
        "not a Linear's weight",
    ),
    _Rule(
        lambda tensor: tensor.leaf in _USED_DIRECTLY,
        "used directly",
        lambda tensor: (
            f"{tensor.leaf} is no Linear in runtimes, which use its weight directly or keep it"
            " unquantized"
        ),
    ),
    _Rule(
        lambda tensor: 0 in tensor.shape,
        "unreached",
        lambda tensor: f"has the empty shape {list(tensor.shape)}",
    ),
    _Rule(lambda tensor: True, "linear", ""),
)


def _kind(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str]:
    """The kind and the reason of a tensor, see ModuleInfo."""
    tensor = _Tensor(name, shape, shapes)
    rule = next(rule for rule in _RULES if rule.applies(tensor))
    return rule.kind, rule.reason if isinstance(rule.reason, str) else rule.reason(tensor)


def _is_block_diagonal(
    module: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether a tensor holds the square blocks [blocks, size, size] of a block-diagonal matrix
    (RG-LRU's gates).

    The module then has a vector of blocks × size features, and each block acts on its own part.
    """
    if len(shape) != 3 or shape[1] != shape[2] or "experts" in module.split("."):
        return False
    return any(
        len(other) == 1 and other[0] == shape[0] * shape[1] and name.rpartition(".")[0] == module
        for name, other in shapes.items()
    )


def is_of_other_tower(module: str) -> bool:
    """Whether a module's name is that of a vision or audio tower, which isn't part of the language
    model.
    """
    return any(_OTHER_TOWER.search(part) for part in module.split("."))


def _is_router(leaf: str, parts: list[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a module routes tokens to experts."""
    if leaf == "shared_expert_gate" or any("router" in part for part in parts):
        return True
    if "gate" not in parts:
        return False
    # `gate` next to `experts` is a router, and so is a module inside it (HunYuan's `gate.wg`).
    # Elsewhere, `gate` may be an ordinary Linear.
    parent = ".".join(parts[: parts.index("gate")])
    return any(
        name.startswith((f"{parent}.experts.", f"{parent}.shared_expert")) for name in shapes
    )


# Cross-attention (BART's, Whisper's, Mllama's). Its queries have another input than its keys and
# values, so runtimes merge only the latter two.
_CROSS_ATTENTION = re.compile(r"encoder_attn|cross_?att", re.IGNORECASE)
# Linears that runtimes merge into one, by the names of their projections. They must share one
# scheme, and a per-tensor scale. A module has fused layers if it contains all of a tuple's members.
_QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
FUSED_LAYERS: tuple[tuple[str, ...], ...] = (
    *_QUERY_KEY_VALUE,
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def fused_layers(linears: Iterable[str]) -> list[tuple[str, ...]]:
    """The Linears that runtimes merge, as tuples of module names. Linears that aren't merged don't
    appear.
    """
    names = dict.fromkeys(linears)
    sets = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        crosses = any(_CROSS_ATTENTION.search(part) for part in parent.split(".")[-2:])
        for members in FUSED_LAYERS:
            if crosses and members in _QUERY_KEY_VALUE:
                members = members[1:]
            candidates = tuple(f"{parent}.{member}" if parent else member for member in members)
            if leaf == members[0] and all(candidate in names for candidate in candidates):
                sets.append(candidates)
    return sets
