"""Each Linear's weight as a strided view [out_features, in_features], however the checkpoint stores
it.

Two checkpoint conventions differ from nn.Linear's. GPT-2's Conv1D stores weights transposed, as
[in_features, out_features]. MoE models may stack all experts of a layer in one 3-D tensor. Both are
described as views by their start and strides; no data is copied.

Runtimes read quantized experts one by one, under the names `….experts.N.gate_proj`, `up_proj` and
`down_proj`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.reader import Checkpoint

# Names of an expert's Linears in a stack.
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
# Reasons for which a weight is unsupported.
BIASED = (
    "stacked experts with biases, as in GPT-OSS, which no runtime reads in FP8 or INT8, only in"
    " bfloat16 or MXFP4"
)
ALTERNATING = (
    "experts with interleaved rows of gate and up, as in Inkling, which quantkit doesn't write in"
    " FP8 or INT8"
)
FLAT = (
    "all experts of a layer in one flat matrix, as in DBRX, which runtimes read in bfloat16 only,"
    " or with one scale for each expert"
)


@dataclass(frozen=True)
class Stack:
    """A tensor [experts, …] that holds one weight of every expert, or two (gate above up).

    tensor: its name.
    module: the path that the experts' names begin with.
    shape: of the tensor.
    leaves: GATE_UP or DOWN.
    is_transposed: whether each weight is stored as [in_features, out_features].
    """

    tensor: str
    module: str
    shape: tuple[int, int, int]
    leaves: tuple[str, ...]
    is_transposed: bool

    def linear(self, expert: int, leaf: str) -> str:
        """The name of one Linear of an expert."""
        return f"{self.module}.{expert}.{leaf}"

    def linears(self, expert: int) -> list[str]:
        """The names of an expert's Linears in this stack."""
        return [self.linear(expert, leaf) for leaf in self.leaves]

    @property
    def linear_shape(self) -> tuple[int, int]:
        """[out_features, in_features] of each Linear in the stack."""
        rows, columns = self.shape[1:] if not self.is_transposed else self.shape[:0:-1]
        return rows // len(self.leaves), columns

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """Each Linear's weight as a view of the tensor, by the weight's name.

        info: the stored tensor.
        """
        rows, columns = self.linear_shape
        size = info.nbytes // max(1, self.shape[0] * self.shape[1] * self.shape[2])
        strides = (1, self.shape[2]) if self.is_transposed else (columns, 1)
        parts = {}
        for expert in range(self.shape[0]):
            for number, leaf in enumerate(self.leaves):
                name = f"{self.linear(expert, leaf)}.weight"
                start = info.start + size * (
                    expert * self.shape[1] * self.shape[2] + number * rows * strides[0]
                )
                parts[name] = TensorInfo(
                    name, info.dtype, (rows, columns), info.path, start, strides
                )
        return parts


def find_stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stack]:
    """Stacks of experts, by tensor name.

    shapes: tensor name → shape.

    Two 3-D tensors of one module are a layer's experts if the output of one is the input of the
    other: [experts, 2·I, H] and [experts, H, I], or both transposed. Their names don't matter.
    Stacks with biases (`has_biases`) or interleaved rows (`alternates`) are skipped.
    """
    pairs: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 3 and not has_biases(name, shapes) and not alternates(name, shapes):
            pairs.setdefault(experts_module(name), []).append(name)
    stacks = {}
    for module, names in pairs.items():
        if len(names) != 2 or shapes[names[0]][0] != shapes[names[1]][0]:
            continue
        for first, down in (names, names[::-1]):
            (experts, a, b), (_, c, d) = shapes[first], shapes[down]
            plain, transposed = (a, b) == (2 * d, c), (a, b) == (d, 2 * c)
            if plain or transposed:
                stacks[first] = Stack(first, module, (experts, a, b), GATE_UP, transposed)
                stacks[down] = Stack(down, module, (experts, c, d), DOWN, transposed)
    return stacks


def has_biases(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a stack of experts has biases."""
    return (
        f"{name}_bias" in shapes
        or name.endswith(".weight")
        and len(shapes.get(f"{name.removesuffix('.weight')}.bias", ())) == 2
    )


def alternates(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether rows of gate and up are interleaved in a matrix or stack, or in its w13 counterpart.

    Only Inkling's do, recognized by their names.
    """
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return (
        leaf in ("w13_dn", "w13_weight", "shared_w13_weight")
        or leaf.endswith("w2_weight")
        and f"{parent}.{leaf.replace('w2', 'w13')}" in shapes
    )


def experts_module(name: str) -> str:
    """The path that the names of a stack's experts begin with.

    For `a.experts.down_proj` it is `a.experts`, for `a.moe.output_linear.weight` it is
    `a.moe.experts`.
    """
    parent = name.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.rpartition(".")[2] == "experts" else f"{parent}.experts"


def transposed_weights(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The names of the weights that are stored as [in_features, out_features].

    Their bias has as many elements as they have columns. A square weight is ambiguous; it counts as
    transposed if any other weight is.
    """
    with_bias = {
        name: shapes[f"{name.removesuffix('.weight')}.bias"]
        for name in shapes
        if f"{name.removesuffix('.weight')}.bias" in shapes
    }
    weights = {
        name: bias
        for name, bias in with_bias.items()
        if name.endswith(".weight") and len(shapes[name]) == 2 and len(bias) == 1
    }
    found = {
        name for name, bias in weights.items() if bias[0] == shapes[name][1] != shapes[name][0]
    }
    return found | {name for name in weights if found and shapes[name][0] == shapes[name][1]}


def conv1d_as_linear(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with Conv1D weights as views [out_features, in_features]."""
    names = transposed_weights({name: info.shape for name, info in checkpoint.tensors.items()})
    if not names:
        return checkpoint
    views = {
        name: _transposed(info) if name in names else info
        for name, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=views)


def _transposed(info: TensorInfo) -> TensorInfo:
    rows, columns = info.shape
    return replace(info, shape=(columns, rows), strides=(1, columns))


def as_linear_views(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with each Linear as a view [out_features, in_features], and experts one by
    one.

    Its fingerprint is that of the original checkpoint.
    """
    views = conv1d_as_linear(checkpoint)
    stacks = find_stacks({name: info.shape for name, info in views.tensors.items()})
    if not stacks:
        return views
    tensors: dict[str, TensorInfo] = {}
    for name, info in views.tensors.items():
        tensors |= stacks[name].parts(info) if name in stacks else {name: info}
    return replace(views, tensors=tensors)


def as_stored_where_skipped(
    stored: Checkpoint, views: Checkpoint, quantized: Container[str]
) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint with views of the quantized weights only; skipped tensors are as stored.

    quantized: names of the quantized weights.

    Also returns, for each stack that stays one tensor: stack → name of one of its parts. If any
    Linear of a layer's experts is quantized, all its stacks are split, because runtimes read them
    either split or stacked.
    """
    stacks = find_stacks({name: info.shape for name, info in stored.tensors.items()})
    parts = {name: stack.parts(stored.tensors[name]) for name, stack in stacks.items()}
    apart = {
        stacks[name].module
        for name, its_parts in parts.items()
        if any(part in quantized for part in its_parts)
    }
    tensors: dict[str, TensorInfo] = {}
    whole: dict[str, str] = {}
    for name, info in stored.tensors.items():
        if name in stacks and stacks[name].module in apart:
            tensors |= parts[name]
        else:
            tensors[name] = views.tensors[name] if name in quantized else info
            if name in stacks:
                whole[name] = next(iter(parts[name]))
    return replace(stored, tensors=tensors), whole
