"""Rows of a checkpoint's tensors, a few megabytes at a time, read from the page cache; FP8 blocks
are dequantized on the way.

Several threads may read at once. Pages are released as soon as they have been read, so a process
holds a few steps of rows however large the model is.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.checkpoint.formats import read_quantization_config
from quantkit.checkpoint.header import row_count
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tensor_reader import MappedShard
from quantkit.schemes.quant_spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

# Of the source, in bytes: small enough to stay in a core's second-level cache with its codes, large
# enough that Python's part of a step doesn't count.
STEP_BYTES = 2 << 20


class WeightStream:
    """The tensors of a checkpoint as rows of numbers.

    block_scales: weight → its tensor of block scales, in a checkpoint that is FP8 block already;
    its weights read as float32. Empty with dequantizing=False, which takes every checkpoint as it
    is.
    """

    def __init__(self, checkpoint: Checkpoint, dequantizing: bool = True) -> None:
        self.checkpoint = checkpoint
        self.block_scales = block_scales(checkpoint) if dequantizing else {}
        self.source_spec = source_spec(checkpoint) if self.block_scales else None
        self._shards: dict[Path, MappedShard] = {}
        self._uses: Counter[Path] = Counter()
        self._lock = threading.Lock()
        self._fetching: dict[Path, threading.Lock] = {}

    def steps(self, name: str, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """The rows [first, last) of a tensor in steps of about STEP_BYTES and of whole multiples of
        `multiple` rows.
        """
        info = self.checkpoint.tensors[name]
        if name in self.block_scales:
            multiple = math.lcm(multiple, self._source_block()[0])
        if not info.nbytes:
            return
        rows, row_bytes = row_count(info), max(1, info.nbytes // max(1, row_count(info)))
        # The rows of a transposed view are spread over the whole tensor, which is read at once.
        step = max(1, STEP_BYTES // row_bytes // multiple) * multiple if info.is_dense else rows
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    @contextmanager
    def rows(self, name: str, first: int, last: int) -> Iterator[Tensor]:
        """Rows first to last of a tensor, [last - first, elements per row], as stored; weights in
        FP8 blocks as float32. Not to be kept.
        """
        with self.stored_rows(name, first, last) as stored:
            if name not in self.block_scales:
                yield stored
                return
            block_rows, block_columns = self._source_block()
            with self.stored_rows(
                self.block_scales[name], first // block_rows, -(-last // block_rows)
            ) as scale:
                import torch

                import quantkit.ops  # noqa: F401 (declares the op)

                values = torch.ops.quantkit.dequantize_blocks(
                    stored, scale.float(), block_rows, block_columns
                )
            yield values

    def _source_block(self) -> tuple[int, int]:
        """The rows and columns of a block of the source's weights."""
        assert self.source_spec is not None, "block scales come with their spec"
        return self.source_spec.granularity.block_shape(1, 1)

    @contextmanager
    def stored_rows(self, name: str, first: int, last: int) -> Iterator[Tensor]:
        """The same without dequantizing."""
        info = self.checkpoint.tensors[name]
        shard = self._shard(info.path)
        values = shard.rows(info, first, last)
        try:
            yield values
        finally:
            del values
            shard.release(info, first, last)

    def _shard(self, path: Path) -> MappedShard:
        with self._lock:
            if path in self._shards:
                return self._shards[path]
            fetching = self._fetching.setdefault(path, threading.Lock())
        with fetching:
            with self._lock:
                if path in self._shards:
                    return self._shards[path]
            if self.checkpoint.source is not None:
                self.checkpoint.source.fetch(path)
            shard = MappedShard(path)
            with self._lock:
                self._shards[path] = shard
            return shard

    # A shard that was fetched is released when the last tensor that needs it is done.

    def expect(self, names: Iterable[str]) -> None:
        """These tensors will be read; each call is answered by one of `done`."""
        with self._lock:
            self._uses.update(self._paths(names))

    def done(self, names: Iterable[str]) -> None:
        with self._lock:
            self._uses.subtract(self._paths(names))
            finished = [path for path in self._paths(names) if not self._uses[path]]
            shards = [self._shards.pop(path) for path in finished if path in self._shards]
        for shard in shards:
            shard.close()
            if self.checkpoint.source is not None:
                self.checkpoint.source.release(shard.path)

    def _paths(self, names: Iterable[str]) -> set[Path]:
        names = list(names)
        names += [self.block_scales[name] for name in names if name in self.block_scales]
        return {self.checkpoint.tensors[name].path for name in names}

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()


def block_scales(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Weight → the tensor of its block scales, for a checkpoint that is dequantized on the way;
    empty for others.

    Raises CheckpointError where codes lack their scales, or scales their codes.
    """
    config = read_quantization_config(checkpoint.config)
    if config is None or not config.file_format.is_source:
        return {}
    stored = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    return config.file_format.block_scales(stored, config.schemes[0].weight)


def source_spec(checkpoint: Checkpoint) -> QuantSpec:
    """How the weights of a checkpoint in FP8 blocks are quantized."""
    config = read_quantization_config(checkpoint.config)
    assert config is not None, "block scales come with a quantization_config"
    return config.schemes[0].weight
