"""Hidden states between two decoder blocks, one tensor for each batch: in memory while they fit,
else in memory-mapped files.

In files they lie twice: a block reads those before it from one file and writes its own into the
other. So at every moment one file is whole, and what a process leaves when it is killed can be
continued from.
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

# Where a container's limit and use stand (Linux, cgroup v2).
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this machine, or the container, has to spare; half of a gigabyte where that can't
    be read.
    """
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
    """Give back to the system what the allocator keeps of memory that was freed: it would grow with
    each block by what doesn't fit the next one (glibc).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int:
    """The process's largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class HiddenStates:
    """numbers: of the batches that are kept here. `get` gives what was there before the present
    block, `put` what it made, `turn` ends the block.

    memory: bytes that may be held; None is half of what the machine has to spare. directory: where
    files go; None is the system's temporary place.
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
        self._held = 0

    @property
    def is_in_files(self) -> bool:
        return self._files is not None

    @property
    def numbers(self) -> list[int]:
        return sorted(self._files[0].shapes if self._files else self._tensors)

    def expect(self, shapes: Mapping[int, Sequence[int]], dtype: torch.dtype) -> None:
        """What will be put: each batch's shape. Decides between memory and files; room on the disk
        is reserved here.
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
                f" ({error.strerror}); make room, raise --memory, or use fewer or shorter windows"
            ) from None

    def put(self, number: int, hidden: Tensor) -> None:
        if self._files is None:
            self._tensors[number] = hidden.to(self._device)
        else:
            self._files[1].write(number, hidden)

    def get(self, number: int) -> Tensor:
        return self._tensors[number] if self._files is None else self._files[0].read(number)

    def swap(self) -> None:
        """What was put is now what `get` gives."""
        if self._files is not None:
            self._files.reverse()

    def save(
        self,
        path: Path,
        numbers: Sequence[int] | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A durable copy of what `get` gives, of all batches or of these, and of other tensors
        beside it; one at a time comes into memory.
        """
        write_tensors(
            path, _Named(self, self.numbers if numbers is None else numbers, beside or {})
        )

    def close(self) -> None:
        self._tensors.clear()
        for file in self._files or ():
            file.close()
        self._files = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


class _Named(Mapping[str, Tensor]):
    """Hidden states by the number of their batch, and other tensors by their names, each read when
    it is asked for.
    """

    def __init__(
        self, states: HiddenStates, numbers: Sequence[int], beside: Mapping[str, Tensor]
    ) -> None:
        self._states, self._numbers, self._beside = states, numbers, beside

    def __getitem__(self, name: str) -> Tensor:
        return (self._beside[name] if name in self._beside else self._states.get(int(name))).cpu()

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(map(str, self._numbers), self._beside)

    def __len__(self) -> int:
        return len(self._numbers) + len(self._beside)


class _StateFile:
    """A file mapped into memory with a place for each batch. What was read or written leaves this
    process again at once; the system keeps it as it likes.
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
            # Reserved now: writing through a mapping where the disk is full would end the process
            # (SIGBUS).
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
        if (
            tuple(hidden.shape) != self.shapes[number]
            or torch.promote_types(hidden.dtype, self._dtype) != self._dtype
        ):
            raise OutputError(
                f"the hidden states of this model are {hidden.dtype} {list(hidden.shape)} where"
                f" {self._dtype} {list(self.shapes[number])} was reserved in files; raise --memory"
                " so that they stay in memory"
            )
        self._view(number).copy_(hidden)
        self._let_go(number)

    def read(self, number: int) -> Tensor:
        hidden = self._view(number).clone()
        self._let_go(number)
        return hidden

    def _let_go(self, number: int) -> None:
        start, nbytes = self._places[number]
        if nbytes:
            self._map.madvise(mmap.MADV_DONTNEED, start, nbytes)

    def close(self) -> None:
        self._map.close()
        self._file.close()
        self.path.unlink(missing_ok=True)
