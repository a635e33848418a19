"""The values of stored tensors: `read_tensor` copies one whole tensor into memory, `MappedShard`
shows some of its rows in the page cache.

Both raise CheckpointError where a file has been cut short since its header was read.
"""

from __future__ import annotations

import errno
import mmap
import os
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.checkpoint.header import DTYPES, TensorInfo, row_elements
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Linux: fill the page tables for reading, or say that the file can't be read, where touching the
# memory would end the process (SIGBUS).
MADV_POPULATE_READ = 22
MAP_NORESERVE = 0x4000


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """torch's dtype of a stored tensor."""
    import torch

    return getattr(torch, DTYPES[info.dtype][1])


def open_to_read(path: Path) -> FileIO:
    """A file of an opened checkpoint, unbuffered; CheckpointError where it is no longer there."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror}; it was there when the checkpoint was opened"
        ) from None


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor of its shape and dtype, contiguous, in memory of its own."""
    import torch

    start, length = (info.start, info.nbytes) if info.is_dense else info.span(0, info.shape[0])
    buffer = bytearray(length)
    view, position = memoryview(buffer), 0
    with open_to_read(info.path) as file:
        file.seek(start)
        while position < len(buffer):
            read = file.readinto(view[position:])
            if not read:
                raise CheckpointError(
                    f"{info.path} ends inside the tensor '{info.name}'; fetch or copy it again"
                )
            position += read
    if not buffer:
        return torch.empty(info.shape, dtype=torch_dtype(info))
    values = torch.frombuffer(buffer, dtype=torch_dtype(info))
    if info.strides is None or info.is_dense:
        return values.reshape(info.shape)
    return values.as_strided(info.shape, info.strides).contiguous()


class MappedShard:
    """A shard mapped into this process's address space. Its pages are those of the page cache;
    `release` unmaps the pages that were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_to_read(path)
        size = self._size()
        if not size:
            raise CheckpointError(
                f"{path} is empty, though it wasn't when the checkpoint was opened; fetch or copy"
                " it again"
            )
        # Private, so that no one can write to the file through it; writable, because torch wants
        # its memory so.
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_NORESERVE
        self._map = mmap.mmap(self._file.fileno(), size, flags=flags, prot=protection)
        self._can_populate = True

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Rows first to last (exclusive) of a tensor, [last - first, elements per row], without a
        copy if they are dense. Valid until released.
        """
        import torch

        start, length = info.span(first, last)
        dtype = torch_dtype(info)
        if not length:
            return torch.empty(last - first, row_elements(info), dtype=dtype)
        self._require_readable(info, start, length)
        values = torch.frombuffer(
            self._map, dtype=dtype, count=length // DTYPES[info.dtype][0], offset=start
        )
        if info.strides is None or info.is_dense:
            return values.reshape(last - first, -1)
        return values.as_strided((last - first, info.shape[1]), info.strides).contiguous()

    def release(self, info: TensorInfo, first: int, last: int) -> None:
        """Take the pages of rows first to last (exclusive) out of this process's memory."""
        start, length = info.span(first, last)
        # Whole pages only: the outer two may hold a neighbour's values, which another thread reads.
        begin, end = (
            -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
            (start + length) // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _require_readable(self, info: TensorInfo, start: int, length: int) -> None:
        # Past a file's end, the rest of its last page reads as zeros, and touching any later page
        # ends the process.
        if start + length > min(self._size(), len(self._map)):
            raise self._cut_short(info)
        if not self._can_populate:
            return
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(MADV_POPULATE_READ, begin, start + length - begin)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise self._cut_short(info) from None
            self._can_populate = False  # a kernel before 5.14

    def _cut_short(self, info: TensorInfo) -> CheckpointError:
        return CheckpointError(
            f"{self.path} can't be read at the tensor '{info.name}': it was cut short meanwhile, or"
            " its disk fails; fetch or copy it again"
        )

    def close(self) -> None:
        try:
            self._file.close()
            self._map.close()
        except BufferError:
            # A tensor still uses the memory, as when an error is being raised: the last such tensor
            # unmaps it.
            del self._map
