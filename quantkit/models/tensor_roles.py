"""Walking a model: from tensor names and shapes alone, and as a module tree.

`export` never builds the model, so it must know a Linear by its name and shape: a two-dimensional
`….weight` inside a numbered decoder block that is no norm, embedding or router. What can't be told
apart that way is refused, never guessed. Tensors are those of `linear_views.as_matrices`.
`calibrate` and `eval` walk the module tree that transformers builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.linear_views import (
    ALTERNATING,
    BIASED,
    FLAT,
    alternates,
    as_matrices,
    has_biases,
)
from quantkit.schemes.pattern import BLOCK

# Stacks of experts have larger last dimensions than any convolution's kernel.
_LEAST_MATRIX = 16
_NORM = re.compile(
    r"(^|_)(norm|layernorm|rmsnorm|ln)\d*($|_)|(^|_)ln_\w+$|norm$|layernorm$", re.IGNORECASE
)
_SHARD = re.compile(r"shard_\d+")
# Not what projects embeddings (Electra's, RemBERT's, Gemma 3n's altup_unembed_projections), which
# is a Linear.
_EMBEDDING = re.compile(
    r"embed(?!.*(proj|mapping))|^wte$|^wpe$|^relative_attention_bias$", re.IGNORECASE
)
# By name, because nothing else tells them where no model is built. dt_proj: the step size of a
# Mamba mixer, whose kernel reads the weight; no forward pass calls it, but only `calibrate` has one
# to see that (tests compare the two). eh_proj: what joins a further token's embedding to the hidden
# states; transformers leaves such layers out, so that no pass runs it. weights_proj: the weights of
# an indexer's heads (DeepSeek V3.2, GLM-5), called as any Linear, but merged with an unquantized
# one by runtimes, and in full precision in published FP8 checkpoints too.
_USED_DIRECTLY = ("dt_proj", "eh_proj", "weights_proj")
_OTHER_TOWER = re.compile(
    r"vision|visual|image|audio|multi_modal_projector|mm_projector|connector", re.IGNORECASE
)


@dataclass(frozen=True)
class ModuleInfo:
    """One weight of the checkpoint and what it is.

    kind: "linear", or why it is left: "lm_head", "embedding", "norm", "router", "other tower",
    "outside the blocks", "used directly", "not a matrix"; "unreached" is a weight that should be
    quantized but that quantkit can't handle.
    """

    name: str  # the module's, without ".weight"
    tensor: str
    shape: tuple[int, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a checkpoint, each Linear as one matrix, and the role of each. Made by
    `linears_of` alone.

    stored: the checkpoint as it was opened.
    checkpoint: the same with each Linear as a view [out_features, in_features]
    (`linear_views.as_matrices`).
    roles: tensor of `checkpoint` → its role.
    """

    stored: Checkpoint
    checkpoint: Checkpoint
    roles: Mapping[str, ModuleInfo]

    def modules(self, *kinds: str) -> dict[str, ModuleInfo]:
        """Module → role, for each weight of one of these kinds; of all kinds where none is
        named.
        """
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
    """The Linears of a checkpoint and what else is in it, from names and shapes alone."""
    matrices = as_matrices(checkpoint)
    shapes = {name: info.shape for name, info in matrices.tensors.items()}
    roles = {
        tensor: ModuleInfo(
            tensor.removesuffix(".weight"), tensor, shape, *_kind(tensor, shape, shapes)
        )
        for tensor, shape in shapes.items()
    }
    return ModelTensors(checkpoint, matrices, roles)


def _kind(
    tensor: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str]:
    module, _, parameter = tensor.rpartition(".")
    parts = module.split(".")
    leaf = parts[-1]
    if leaf == "lm_head":
        return "lm_head", "lm_head is left by rule"
    # A layer that transformers leaves out as well. Its shape is lm_head's, but so is k_proj's where
    # a vocabulary is as small as a byte's.
    if parts[-2:] == ["shared_head", "head"]:
        return "lm_head", "the head of a layer that predicts further tokens is left like lm_head"
    if is_of_other_tower(module):
        return "other tower", "not part of the language model"
    block = BLOCK.match(tensor)
    is_embedding = _EMBEDDING.search(
        parts[-2] if _SHARD.fullmatch(leaf) and len(parts) > 1 else leaf
    )
    if block is None or "." not in tensor[block.end() :]:
        return (
            ("embedding", "embeddings are left by rule")
            if is_embedding
            else ("outside the blocks", "outside the decoder blocks")
        )
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
        return (
            "used directly",
            "a matrix for each head of a state space, which is no Linear in runtimes",
        )
    if len(shape) == 3 and ("experts" in (*parts, parameter) or min(shape[-2:]) >= _LEAST_MATRIX):
        return (
            "unreached",
            (
                "a stack of matrices in one tensor of 3 dimensions that is no layer's pair of"
                " experts' weights"
            ),
        )
    if "experts" in parts and parameter not in ("weight", "bias") and len(shape) == 2:
        return "unreached", (
            FLAT if parameter in ("w1", "v1", "w2") else "experts whose names quantkit doesn't know"
        )
    if parameter != "weight" or len(shape) != 2:
        return "not a matrix", "not a Linear's weight"
    if leaf in _USED_DIRECTLY:
        return (
            "used directly",
            (
                f"{leaf} is no Linear in runtimes, which use its weight directly or keep it"
                " unquantized"
            ),
        )
    if 0 in shape:
        return "unreached", f"has the empty shape {list(shape)}"
    return "linear", ""


def _is_block_diagonal(
    module: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether square blocks [blocks, size, size] act on as many features as a vector beside them
    has, each block on its own (RG-LRU's gates).
    """
    if len(shape) != 3 or shape[1] != shape[2] or "experts" in module.split("."):
        return False
    return any(
        len(other) == 1 and other[0] == shape[0] * shape[1] and name.rpartition(".")[0] == module
        for name, other in shapes.items()
    )


def is_of_other_tower(module: str) -> bool:
    """Whether a module, by its name, sees or hears, and is no part of the language model."""
    return any(_OTHER_TOWER.search(part) for part in module.split("."))


def _is_router(leaf: str, parts: list[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if leaf == "shared_expert_gate" or any("router" in part for part in parts):
        return True
    if "gate" not in parts:
        return False
    # `gate` beside `experts` routes, and so does what is in it (HunYuan's `gate.wg`); `gate`
    # elsewhere may be an ordinary Linear.
    parent = ".".join(parts[: parts.index("gate")])
    return any(
        name.startswith((f"{parent}.experts.", f"{parent}.shared_expert")) for name in shapes
    )


# Attention whose queries read other hidden states than its keys and values (BART's, Whisper's,
# Mllama's), where runtimes merge only the latter two.
_CROSS_ATTENTION = re.compile(r"encoder_attn|cross_?att", re.IGNORECASE)
# Linears that runtimes merge into one. Their members must share one scheme, and one scale where a
# scale is per tensor. Names of projections, not of architectures: a set exists where all its
# members stand side by side.
_QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
FUSED_SETS: tuple[tuple[str, ...], ...] = (
    *_QUERY_KEY_VALUE,
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def fused_sets(linears: Iterable[str]) -> list[tuple[str, ...]]:
    """The Linears that runtimes merge, as tuples of module names; a Linear in none of them doesn't
    appear.
    """
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
