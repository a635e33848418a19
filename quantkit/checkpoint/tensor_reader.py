"""Reading the values of stored tensors: `read_tensor` copies one tensor into memory, `MappedShard`
maps rows from the page cache.

Both raise CheckpointError if a file was truncated since its header was read.
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

# Linux: map the pages for reading now. For an unreadable file this returns an error, whereas
# touching its memory would end the process (SIGBUS).
MADV_POPULATE_READ = 22
MAP_NORESERVE = 0x4000


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """torch's dtype for a stored tensor."""
    import torch

    return getattr(torch, DTYPES[info.dtype][1])


def open_to_read(path: Path) -> FileIO:
    """Open a file of a checkpoint, unbuffered.

    Raises CheckpointError if it is no longer there.
    """
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror}; it was there when the checkpoint was opened"
        ) from None


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor in its shape and dtype, contiguous, in memory of its own.

    Raises CheckpointError if the file ends inside the tensor.
    """
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
    """A shard mapped into this process's address space.

    Its memory is the system's page cache; `release` unmaps the pages that were read.
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
        # Private, so that nothing can write to the file through it. Writable, because torch warns
        # about read-only memory.
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_NORESERVE
        self._map = mmap.mmap(self._file.fileno(), size, flags=flags, prot=protection)
        self._can_populate = True

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Rows first to last (exclusive) of a tensor, [last - first, elements per row].

        Dense rows aren't copied, and are valid until `release`. Raises CheckpointError if the file
        can't be read there.
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
        """Unmap the pages that hold rows first to last (exclusive)."""
        start, length = info.span(first, last)
        # Whole pages only: the first and the last may hold values that another thread is reading.
        begin, end = (
            -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
            (start + length) // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _require_readable(self, info: TensorInfo, start: int, length: int) -> None:
        # Beyond the end of a file, the rest of its last page reads as zeros. Touching a later page
        # ends the process.
        if start + length > min(self._size(), len(self._map)):
            raise self._truncated(info)
        if not self._can_populate:
            return
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(MADV_POPULATE_READ, begin, start + length - begin)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise self._truncated(info) from None
            self._can_populate = False  # a kernel before 5.14

    def _truncated(self, info: TensorInfo) -> CheckpointError:
        return CheckpointError(
            f"{self.path} can't be read at the tensor '{info.name}': it was truncated during the"
            " run, or its disk fails; fetch or copy it again"
        )

    def close(self) -> None:
        """Close the file and unmap it."""
        try:
            self._file.close()
            self._map.close()
        except BufferError:
            # A tensor still uses the memory, for example while an error is being raised. The memory
            # is unmapped with the last such tensor.
            del self._map
