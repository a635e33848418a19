"""Planning safetensors files before their values are known: which tensors each shard holds, and its
header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.header import DTYPES
from quantkit.checkpoint.model_files import SINGLE_FILE


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written, described before its values are known.

    name: its key in the header.
    dtype: a key of DTYPES.
    shape: elements in each dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype][0]


@dataclass(frozen=True)
class ShardLayout:
    """The positions of header and tensors in a planned file.

    header: the file's first bytes: header length, header, padding.
    starts: tensor name → its first byte in the file.
    nbytes: size of the whole file, in bytes.
    """

    header: bytes
    starts: dict[str, int]
    nbytes: int


def lay_out_shard(plans: Sequence[TensorPlan]) -> ShardLayout:
    """The header of a file with these tensors, and the position of each."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for plan in _in_file_order(plans):
        offsets[plan.name], end = end, end + plan.nbytes
        entries[plan.name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [offsets[plan.name], end],
        }
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return ShardLayout(header, starts, len(header) + end)


def _in_file_order(plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The tensors in the order in which a file stores them, so that each starts aligned for its
    dtype.

    Tensors whose size is a multiple of 8 bytes come first, in the given order: a reader then goes
    through a model from front to back. The others follow, larger dtypes first.
    """
    even = [plan for plan in plans if plan.nbytes % 8 == 0]
    return even + sorted(
        (plan for plan in plans if plan.nbytes % 8), key=lambda plan: -DTYPES[plan.dtype][0]
    )


def plan_shards(groups: Iterable[Sequence[TensorPlan]], max_bytes: int) -> list[list[TensorPlan]]:
    """Distribute tensors over shards in the given order, up to `max_bytes` of tensors in each.

    groups: tensors that stay in one shard (a Linear's weight and scales). A group larger than
        `max_bytes` gets a shard of its own.
    """
    shards: list[list[TensorPlan]] = []
    used = 0
    for group in groups:
        size = sum(plan.nbytes for plan in group)
        if not shards or (used and used + size > max_bytes):
            shards.append([])
            used = 0
        shards[-1].extend(group)
        used += size
    return shards


def shard_names(count: int) -> list[str]:
    """The file names of `count` shards, as transformers writes them."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
