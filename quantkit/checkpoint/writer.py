"""Safetensors files written: planned shards, filled in any order, hashed on the way to the disk."""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from quantkit.checkpoint.files import c_function, fsync_directory, new_file
from quantkit.checkpoint.reader import DTYPES, SINGLE_FILE, read_header
from quantkit.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: known before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory order, without a copy where it is contiguous already."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


# A piece of a file as it was made: where it is, how long, and a sum over its bytes.
@dataclass(frozen=True)
class _Piece:
    start: int
    nbytes: int
    checksum: int


class ShardWriter:
    """One safetensors file whose tensors are known beforehand; complete and re-read, or not there
    at all.

    Threads `write` tensors, or parts of them, at their final places in `PATH.tmp`. `finish` reads
    the file back from its beginning as far as it has come, compares each piece with what was made,
    flushes and renames; it may run in a thread of its own while others write.
    """

    def __init__(self, path: Path, plans: Sequence[TensorPlan]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".tmp")
        self._plans = {plan.name: plan for plan in plans}
        if len(self._plans) < len(plans):
            raise AssertionError(f"{path.name}: a tensor is planned twice")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        offset = 0
        for plan in _in_file_order(plans):
            header[plan.name] = {
                "dtype": plan.dtype,
                "shape": list(plan.shape),
                "data_offsets": [offset, offset + plan.nbytes],
            }
            self._offsets[plan.name] = offset
            offset += plan.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._start = 8 + len(raw)
        self._size = self._start + offset
        self._left = {plan.name: plan.nbytes for plan in plans if plan.nbytes}
        self._pieces: dict[int, _Piece] = {}
        self._changed = threading.Condition()
        self._abandoned = False
        self._file = new_file(self._partial)
        self._put(memoryview(bytearray(len(raw).to_bytes(8, "little") + raw)), 0)

    @property
    def is_complete(self) -> bool:
        return not self._left

    @property
    def is_abandoned(self) -> bool:
        return self._abandoned

    def write(self, name: str, tensor: Tensor) -> None:
        """A whole tensor."""
        plan = self._plans[name]
        if (
            tuple(tensor.shape) != plan.shape
            or str(tensor.dtype) != f"torch.{DTYPES[plan.dtype][1]}"
        ):
            raise AssertionError(
                f"{name}: planned {plan.dtype} {plan.shape}, made {tensor.dtype}"
                f" {tuple(tensor.shape)}"
            )
        self.write_part(name, tensor_bytes(tensor), 0)

    def write_part(self, name: str, content: memoryview, offset: int) -> None:
        """Bytes of a tensor, `offset` bytes from its beginning; each byte comes once."""
        plan, start = self._plans[name], self._start + self._offsets[name] + offset
        if (
            offset < 0
            or offset + len(content) > plan.nbytes
            or len(content) > self._left.get(name, 0)
        ):
            raise AssertionError(
                f"{name}: {len(content)} bytes at {offset} of {plan.nbytes} don't fit, or were"
                " written before"
            )
        if content:
            self._put(content, start)
            with self._changed:
                self._left[name] -= len(content)
                if not self._left[name]:
                    del self._left[name]

    def _put(self, content: memoryview, start: int) -> None:
        view, position = content, start
        while view:
            try:
                written = os.pwrite(self._file.fileno(), view, position)
            except OSError as error:
                error.filename = str(self._partial)
                raise
            view, position = view[written:], position + written
        with self._changed:
            if start in self._pieces:
                raise AssertionError(f"{self.path.name}: two pieces begin at byte {start}")
            self._pieces[start] = _Piece(start, len(content), checksum(content))
            self._changed.notify_all()

    def finish(self) -> str | None:
        """Wait for what is missing, re-read everything, flush, rename. Returns the file's BLAKE3
        hash, or None if it was abandoned.
        """
        digest, position, flushed, buffer = blake3(), 0, 0, bytearray()
        while position < self._size:
            with self._changed:
                self._changed.wait_for(lambda at=position: at in self._pieces or self._abandoned)
                if self._abandoned:
                    return None
                piece = self._pieces.pop(position)
            if len(buffer) < piece.nbytes:
                buffer = bytearray(piece.nbytes)
            content = memoryview(buffer)[: piece.nbytes]
            self._read_back(content, position)
            if checksum(content) != piece.checksum:
                raise OutputError(
                    f"{self.path.name} holds other bytes at {position} than were written there; its"
                    " disk fails, so choose another -o"
                )
            digest.update(content)
            position += piece.nbytes
            if position - flushed >= _FLUSH_BYTES:
                start_flush(self._file.fileno(), flushed, position - flushed)
                flushed = position
        self._check_header()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        fsync_directory(self.path.parent)
        return digest.hexdigest()

    def _read_back(self, content: memoryview, position: int) -> None:
        while content:
            count = os.preadv(self._file.fileno(), [content], position)
            if not count:
                raise OutputError(
                    f"{self.path.name} ends at byte {position}, though more was written; its disk"
                    " fails, so choose another -o"
                )
            content, position = content[count:], position + count

    def _check_header(self) -> None:
        """Every planned tensor stands in the file once, with its dtype and shape, and no other
        does.
        """
        found = {
            name: (info.dtype, info.shape) for name, info in read_header(self._partial).items()
        }
        planned = {plan.name: (plan.dtype, plan.shape) for plan in self._plans.values()}
        if found != planned:
            names = sorted(
                name
                for name in found.keys() | planned.keys()
                if found.get(name) != planned.get(name)
            )
            raise AssertionError(f"{self.path.name}: {names[0]} is not in the file as planned")

    def close(self) -> str:
        """`finish` after the last write; refuses to wait for tensors that never came."""
        if self._left:
            raise AssertionError(f"never written: {', '.join(sorted(self._left)[:5])}")
        return self.finish()

    def abandon(self) -> None:
        """Give up the file: `finish` returns None. The `.tmp` stays for whoever cleans the
        directory.
        """
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def release(self) -> None:
        """Close the file; after `finish` has returned or raised."""
        self._file.close()


# As much is handed to the disk at a time while a file grows, so that the last flush has little left
# to do.
_FLUSH_BYTES = 32_000_000


def _in_file_order(plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Tensors whose size is a multiple of 8 bytes keep their order, so that a reader goes through a
    model from front to back; after them the others, larger elements first: every tensor starts
    aligned for its elements.
    """
    even = [plan for plan in plans if plan.nbytes % 8 == 0]
    return even + sorted(
        (plan for plan in plans if plan.nbytes % 8), key=lambda plan: -DTYPES[plan.dtype][0]
    )


def checksum(content: memoryview) -> int:
    """A sum over 8-byte words modulo 2^64 and their count: tells what was put in a place from
    whatever else may be found there.
    """
    import torch

    whole = len(content) // 8
    total = int(torch.frombuffer(content, dtype=torch.int64, count=whole).sum()) if whole else 0
    return (total + int.from_bytes(content[whole * 8 :], "little") + len(content)) % 2**64


def start_flush(descriptor: int, start: int, nbytes: int) -> None:
    """Have the kernel begin to write these bytes out, without waiting; a hint, so its errors are
    left to fsync.
    """
    begin_writing = 2  # SYNC_FILE_RANGE_WRITE
    function = c_function("sync_file_range")
    if function is not None:
        function(
            ctypes.c_int(descriptor),
            ctypes.c_int64(start),
            ctypes.c_int64(nbytes),
            ctypes.c_uint(begin_writing),
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A whole safetensors file at once, durable and atomic. What the mapping makes of a name is
    asked for twice: for its shape, and when its turn comes to be written.
    """
    names = {f"torch.{torch_name}": name for name, (_, torch_name) in DTYPES.items()}
    writer = ShardWriter(
        path,
        [
            TensorPlan(name, names[str(tensor.dtype)], tuple(tensor.shape))
            for name, tensor in tensors.items()
        ],
    )
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    finally:
        writer.release()


def plan_shards(groups: Iterable[Sequence[TensorPlan]], max_bytes: int) -> list[list[TensorPlan]]:
    """Fill shards up to `max_bytes`, keeping each group (a Linear's weight and scales) in one
    shard, in the given order.
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
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
