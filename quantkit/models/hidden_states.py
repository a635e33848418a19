"""Hidden states between two blocks, one tensor for each batch: in memory if they fit, else in
memory-mapped files.

There are two files: a block reads its inputs from one and writes its outputs to the other. One file
is therefore complete at every moment, and a killed run can be resumed from it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.files import new_file
from quantkit.checkpoint.units import format_bytes
from quantkit.checkpoint.writer import write_tensors
from quantkit.errors import OutputError

# Files with a container's memory limit and use (Linux, cgroup v2).
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this machine, or the container, can still use; 500 MB if that can't be read."""
    spare = []
    try:
        spare += [
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable:")
        ]
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            spare.append(max(0, int(limit) - int((_CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return min(spare, default=500_000_000)


def release_freed_memory() -> None:
    """Return freed memory from glibc's allocator to the system.

    Otherwise the process would grow with each block, by the freed memory that doesn't fit the next
    one.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int:
    """The process's largest resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class HiddenStates:
    """The hidden states of all batches, by batch number.

    `get` returns the inputs of the current block, `put` stores its outputs, and `swap` makes the
    outputs the inputs of the next block.

    memory: bytes that they may take in memory; None is half of the available memory.
    directory: where files are made; None is the system's temporary directory.
    device: where tensors in memory are kept.
    numbers: the batch numbers.
    """

    def __init__(
        self,
        memory: int | None = None,
        directory: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._memory = available_memory() // 2 if memory is None else memory
        self._directory, self._device = directory, torch.device(device)
        self._tensors: dict[int, Tensor] = {}
        self._files: list[_StateFile] | None = None
        self._temporary: Any = None

    @property
    def numbers(self) -> list[int]:
        return sorted(self._files[0].shapes if self._files else self._tensors)

    def expect(self, shapes: Mapping[int, Sequence[int]], dtype: torch.dtype) -> None:
        """Prepare for states of these shapes. Decides between memory and files, and reserves the
        disk space.

        shapes: batch number → shape.

        Raises OutputError if the disk lacks the space.
        """
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        if total <= self._memory:
            return
        if self._directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="quantkit-states-")
            self._directory = Path(self._temporary.name)
        try:
            self._files = []
            for side in "ab":
                self._files.append(
                    _StateFile(self._directory / f"hidden-states-{side}.bin", shapes, dtype)
                )
        except OSError as error:
            self.close()
            raise OutputError(
                f"the hidden states need 2 × {format_bytes(total)} in {self._directory}"
                f" ({error.strerror})",
                hint="make room, raise `memory`, or use fewer or shorter windows",
            ) from None

    def put(self, number: int, hidden: Tensor) -> None:
        """Store a batch's output of the current block.

        Raises OutputError if it doesn't have the shape and dtype that a file was made for.
        """
        if self._files is None:
            self._tensors[number] = hidden.to(self._device)
        else:
            self._files[1].write(number, hidden)

    def get(self, number: int) -> Tensor:
        """A batch's input of the current block."""
        return self._tensors[number] if self._files is None else self._files[0].read(number)

    def swap(self) -> None:
        """End a block: its outputs become the inputs of the next one."""
        if self._files is not None:
            self._files.reverse()

    def save(
        self,
        path: Path,
        numbers: Sequence[int] | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the inputs of the current block durably, one tensor in memory at a time.

        numbers: batches to save; None saves all.
        others: other tensors for the same file, by name.
        """
        write_tensors(
            path, _LazyTensors(self, self.numbers if numbers is None else numbers, others or {})
        )

    def close(self) -> None:
        """Free the memory, and remove the files."""
        self._tensors.clear()
        for file in self._files or ():
            file.close()
        self._files = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


class _LazyTensors(Mapping[str, Tensor]):
    """Hidden states by the number of their batch, and other tensors by their names, each read only
    on access.
    """

    def __init__(
        self, states: HiddenStates, numbers: Sequence[int], others: Mapping[str, Tensor]
    ) -> None:
        self._states, self._numbers, self._others = states, numbers, others

    def __getitem__(self, name: str) -> Tensor:
        return (self._others[name] if name in self._others else self._states.get(int(name))).cpu()

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(map(str, self._numbers), self._others)

    def __len__(self) -> int:
        return len(self._numbers) + len(self._others)


class _StateFile:
    """A memory-mapped file with a reserved range for each batch.

    Pages are released from this process right after each access; the system may still cache them.
    """

    def __init__(self, path: Path, shapes: Mapping[int, Sequence[int]], dtype: torch.dtype) -> None:
        self.path, self.shapes, self._dtype = (
            path,
            {number: tuple(shape) for number, shape in shapes.items()},
            dtype,
        )
        self._places: dict[int, tuple[int, int]] = {}
        position = 0
        for number, shape in self.shapes.items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._places[number] = (position, nbytes)
            position += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = new_file(path)
        try:
            # The space is reserved now: writing through a mapping on a full disk would end the
            # process (SIGBUS).
            os.posix_fallocate(self._file.fileno(), 0, max(position, mmap.PAGESIZE))
            self._map = mmap.mmap(self._file.fileno(), max(position, mmap.PAGESIZE))
        except OSError:
            self._file.close()
            path.unlink(missing_ok=True)
            raise

    def _view(self, number: int) -> Tensor:
        start, nbytes = self._places[number]
        return torch.frombuffer(
            self._map, dtype=self._dtype, count=nbytes // self._dtype.itemsize, offset=start
        ).reshape(self.shapes[number])

    def write(self, number: int, hidden: Tensor) -> None:
        """Write a batch's states. Raises OutputError if their shape or dtype doesn't fit."""
        if (
            tuple(hidden.shape) != self.shapes[number]
            or torch.promote_types(hidden.dtype, self._dtype) != self._dtype
        ):
            raise OutputError(
                f"the hidden states of this model are {hidden.dtype} {list(hidden.shape)}, but the"
                f" file was made for {self._dtype} {list(self.shapes[number])}",
                hint="raise `memory` so that they stay in memory",
            )
        self._view(number).copy_(hidden)
        self._release_pages(number)

    def read(self, number: int) -> Tensor:
        """A copy of a batch's states."""
        hidden = self._view(number).clone()
        self._release_pages(number)
        return hidden

    def _release_pages(self, number: int) -> None:
        start, nbytes = self._places[number]
        if nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, start, nbytes)

    def close(self) -> None:
        """Remove the file."""
        self._map.close()
        self._file.close()
        self.path.unlink(missing_ok=True)
