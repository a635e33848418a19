"""Writing safetensors files: threads write parts of tensors in any order, while another thread
re-reads and hashes the file from its beginning.

Re-reading goes through the page cache. It shows that every byte was written once, at its position,
and that the hash is that of the intended content. It can't show that the disk will return the same
bytes later; `quantkit verify` compares the hashes again.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from quantkit.checkpoint.files import c_function, fsync_directory, new_file
from quantkit.checkpoint.header import DTYPES, read_header
from quantkit.checkpoint.shard_plan import TensorPlan, lay_out_shard
from quantkit.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

# Bytes after which a growing file is flushed to the disk, so that the last flush is short.
_FLUSH_BYTES = 32_000_000


class ShardWriter:
    """One safetensors file whose tensors are planned beforehand. It is `PATH.tmp` until it is
    complete and re-read, then it is renamed.

    Threads `write` tensors, or parts of them, at their final positions. `finish` re-reads the file
    from its beginning, compares each piece with what was written, flushes and renames. It may run
    in its own thread while others write.

    Raises AssertionError for tensors that don't match the plan, and OSError if the disk fails.
    """

    def __init__(self, path: Path, plans: Sequence[TensorPlan]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".tmp")
        self._plans = {plan.name: plan for plan in plans}
        if len(self._plans) < len(plans):
            raise AssertionError(f"{path.name}: a tensor is planned twice")
        self._layout = lay_out_shard(plans)
        self._missing = {plan.name: plan.nbytes for plan in plans if plan.nbytes}
        self._missing_lock = threading.Lock()
        self._pieces = _WrittenPieces()
        self._file = new_file(self._partial)
        self._put(memoryview(bytearray(self._layout.header)), 0)

    @property
    def is_complete(self) -> bool:
        """Whether every byte of every tensor has been written."""
        return not self._missing

    @property
    def is_abandoned(self) -> bool:
        """Whether `abandon` was called."""
        return self._pieces.is_abandoned

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. It must have the planned shape and dtype."""
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
        """Write bytes of a tensor, `offset` bytes after its start. Each byte is written once."""
        plan = self._plans[name]
        if (
            offset < 0
            or offset + len(content) > plan.nbytes
            or len(content) > self._missing.get(name, 0)
        ):
            raise AssertionError(
                f"{name}: {len(content)} bytes at {offset} of {plan.nbytes} don't fit, or were"
                " written before"
            )
        if content:
            self._put(content, self._layout.starts[name] + offset)
            with self._missing_lock:
                self._missing[name] -= len(content)
                if not self._missing[name]:
                    del self._missing[name]

    def _put(self, content: memoryview, start: int) -> None:
        view, position = content, start
        while view:
            try:
                written = os.pwrite(self._file.fileno(), view, position)
            except OSError as error:
                error.filename = str(self._partial)
                raise
            view, position = view[written:], position + written
        self._pieces.add(_Piece(start, len(content), checksum(content)))

    def finish(self) -> str | None:
        """Wait for missing tensors, re-read everything, flush and rename.

        Returns the file's BLAKE3 hash, or None if the file was abandoned. Raises OutputError if the
        file holds other bytes than were written.
        """
        digest = self._hash_as_written()
        if digest is None:
            return None
        self._check_header()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        fsync_directory(self.path.parent)
        return digest

    def _hash_as_written(self) -> str | None:
        """Re-read, compare and hash the pieces in file order, as they are written."""
        digest, position, flushed, buffer = blake3(), 0, 0, bytearray()
        while position < self._layout.nbytes:
            piece = self._pieces.take(position)
            if piece is None:
                return None
            if len(buffer) < piece.nbytes:
                buffer = bytearray(piece.nbytes)
            content = memoryview(buffer)[: piece.nbytes]
            self._read_into(content, position)
            if checksum(content) != piece.checksum:
                raise OutputError(
                    f"{self.path.name} holds other bytes at {position} than were written there:"
                    " another process changed it, or its disk fails",
                    hint="choose another `output`",
                )
            digest.update(content)
            position += piece.nbytes
            if position - flushed >= _FLUSH_BYTES:
                start_flush(self._file.fileno(), flushed, position - flushed)
                flushed = position
        return digest.hexdigest()

    def _read_into(self, content: memoryview, position: int) -> None:
        while content:
            count = os.preadv(self._file.fileno(), [content], position)
            if not count:
                raise OutputError(
                    f"{self.path.name} ends at byte {position}, though more was written: another"
                    " process truncated it, or its disk fails",
                    hint="choose another `output`",
                )
            content, position = content[count:], position + count

    def _check_header(self) -> None:
        """Check that the file holds exactly the planned tensors, with their dtypes and shapes."""
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
        """`finish` after the last write; raises AssertionError if a tensor was never written."""
        if self._missing:
            raise AssertionError(f"never written: {', '.join(sorted(self._missing)[:5])}")
        digest = self.finish()
        if digest is None:
            raise AssertionError(f"{self.path.name} was abandoned")
        return digest

    def abandon(self) -> None:
        """Give up the file: `finish` returns None. The `.tmp` file stays until the directory is
        cleaned.
        """
        self._pieces.abandon()

    def release(self) -> None:
        """Close the file. Call it after `finish` has returned or raised."""
        self._file.close()


@dataclass(frozen=True)
class _Piece:
    """A written part of a file.

    start: its first byte in the file.
    nbytes: its length.
    checksum: of its bytes, see `checksum`.
    """

    start: int
    nbytes: int
    checksum: int


class _WrittenPieces:
    """The pieces that are written but not yet re-read, passed from the writing threads to the
    re-reading one.
    """

    def __init__(self) -> None:
        self._by_start: dict[int, _Piece] = {}
        self._changed = threading.Condition()
        self.is_abandoned = False

    def add(self, piece: _Piece) -> None:
        with self._changed:
            if piece.start in self._by_start:
                raise AssertionError(f"two pieces begin at byte {piece.start}")
            self._by_start[piece.start] = piece
            self._changed.notify_all()

    def take(self, start: int) -> _Piece | None:
        """Wait for the piece that begins at byte `start`; None if the file is abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: start in self._by_start or self.is_abandoned)
            return None if self.is_abandoned else self._by_start.pop(start)

    def abandon(self) -> None:
        with self._changed:
            self.is_abandoned = True
            self._changed.notify_all()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory order, without a copy if it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def checksum(content: memoryview) -> int:
    """The sum of the 8-byte words, of the remaining bytes and of the length, modulo 2^64.

    It detects bytes at wrong positions, not deliberate changes.
    """
    import torch

    whole = len(content) // 8
    total = int(torch.frombuffer(content, dtype=torch.int64, count=whole).sum()) if whole else 0
    return (total + int.from_bytes(content[whole * 8 :], "little") + len(content)) % 2**64


def start_flush(descriptor: int, start: int, nbytes: int) -> None:
    """Ask the kernel to start writing these bytes to disk, without waiting.

    It is only a hint: a failed write shows at the fsync.
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
    """Write a whole safetensors file at once, durably and atomically.

    tensors: may be a lazy mapping, which is asked for each tensor twice: for its shape, and to
        write it.
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
