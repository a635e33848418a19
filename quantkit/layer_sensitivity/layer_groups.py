"""Layer groups: Linears that runtimes fuse, which therefore get one scheme. They are q/k/v,
gate/up, all experts of a layer, and each other Linear alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.models.tensor_roles import fused_layers


@dataclass(frozen=True)
class LayerGroup:
    """A group of Linears that get one scheme.

    block: number of its block.
    kind: its role in the block, as "q+k+v".
    linears: names on disk.
    """

    block: int
    kind: str
    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name with the shell's braces: model.layers.3.self_attn.{q,k,v}_proj."""
        first = self.linears[0]
        if len(self.linears) == 1:
            return first
        if all(".experts." in name for name in self.linears):
            return first[: first.index(".experts.") + len(".experts")]
        parent, leaves = first.rpartition(".")[0], [_leaf(name) for name in self.linears]
        suffix = "_proj" if all(leaf.endswith("_proj") for leaf in leaves) else ""
        return f"{parent}.{{{','.join(leaf.removesuffix(suffix) for leaf in leaves)}}}{suffix}"


def layer_groups(linears_of_blocks: Sequence[Sequence[str]]) -> list[LayerGroup]:
    """The groups of each block, in the order of its Linears.

    linears_of_blocks: for each block, the names on disk of the Linears that are quantized.
    """
    return [
        group
        for block, linears in enumerate(linears_of_blocks)
        for group in _groups_of_block(block, linears)
    ]


def _groups_of_block(block: int, linears: Sequence[str]) -> list[LayerGroup]:
    experts = tuple(name for name in linears if ".experts." in name)
    others = [name for name in linears if name not in set(experts)]
    fused = {members[0]: members for members in fused_layers(others)}
    later_members = {member for members in fused.values() for member in members[1:]}
    groups = [fused.get(name, (name,)) for name in others if name not in later_members]
    kinds = _distinct_kinds(groups)
    if experts:
        groups, kinds = [*groups, experts], [*kinds, "experts"]
    return [LayerGroup(block, kind, group) for group, kind in zip(groups, kinds)]


def _distinct_kinds(groups: Sequence[Sequence[str]]) -> list[str]:
    """The last part of the groups' names, with parents in front if several groups have the same.

    A shared expert has a gate and an up like the MLP's; BERT has three Linears called `dense`.
    """
    leaves = ["+".join(_leaf(name).removesuffix("_proj") for name in group) for group in groups]
    kinds = leaves
    for parents in (1, 2):
        kinds = [
            f"{_parents(group, parents)} {leaf}" if kinds.count(kind) > 1 else kind
            for group, leaf, kind in zip(groups, leaves, kinds)
        ]
    return kinds


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _parents(group: Sequence[str], count: int) -> str:
    """The last parents in a Linear's path inside its block."""
    path = group[0].split(".")[:-1]
    numbers = [place for place, part in enumerate(path) if part.isdigit()]
    in_block = path[numbers[-1] + 1 :] if numbers else path
    return ".".join(in_block[-count:] or path[-1:])
