"""What is written: safetensors files whose header is known before their first byte, and directories that are whole or absent.

A shard's tensors are put in place in any order, by any thread, and the file is read back from its beginning while they arrive: what is in it is
compared with what was made, and hashed (BLAKE3, which is several times as fast as SHA-256). Only then is it flushed, given its name and recorded. A directory takes its name when its last file
has. See `checkpoint.py` for the format.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from quantkit.checkpoint import DTYPES, SINGLE_FILE, read_header, read_json
from quantkit.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

# The first two end a directory: they hold the fingerprint of what made it, and the hash of each file.
MANIFEST_FILE, CALIBRATION_FILE, PROGRESS_FILE = "quantkit.json", "calibration.json", "progress.json"


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
    """One safetensors file whose tensors are known beforehand; complete and re-read, or not there at all.

    Threads `write` tensors, or parts of them, at their final places in `PATH.tmp`. `finish` reads the file back from its beginning as far as
    it has come, compares each piece with what was made, flushes and renames; it may run in a thread of its own while others write.
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
            header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [offset, offset + plan.nbytes]}
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
        if tuple(tensor.shape) != plan.shape or str(tensor.dtype) != f"torch.{DTYPES[plan.dtype][1]}":
            raise AssertionError(f"{name}: planned {plan.dtype} {plan.shape}, made {tensor.dtype} {tuple(tensor.shape)}")
        self.write_part(name, tensor_bytes(tensor), 0)

    def write_part(self, name: str, content: memoryview, offset: int) -> None:
        """Bytes of a tensor, `offset` bytes from its beginning; each byte comes once."""
        plan, start = self._plans[name], self._start + self._offsets[name] + offset
        if offset < 0 or offset + len(content) > plan.nbytes or len(content) > self._left.get(name, 0):
            raise AssertionError(f"{name}: {len(content)} bytes at {offset} of {plan.nbytes} don't fit, or were written before")
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
        """Wait for what is missing, re-read everything, flush, rename. Returns the file's BLAKE3 hash, or None if it was abandoned."""
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
                raise OutputError(f"{self.path.name} holds other bytes at {position} than were written there; its disk fails, so choose another -o")
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
                raise OutputError(f"{self.path.name} ends at byte {position}, though more was written; its disk fails, so choose another -o")
            content, position = content[count:], position + count

    def _check_header(self) -> None:
        """Every planned tensor stands in the file once, with its dtype and shape, and no other does."""
        found = {name: (info.dtype, info.shape) for name, info in read_header(self._partial).items()}
        planned = {plan.name: (plan.dtype, plan.shape) for plan in self._plans.values()}
        if found != planned:
            names = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
            raise AssertionError(f"{self.path.name}: {names[0]} is not in the file as planned")

    def close(self) -> str:
        """`finish` after the last write; refuses to wait for tensors that never came."""
        if self._left:
            raise AssertionError(f"never written: {', '.join(sorted(self._left)[:5])}")
        return self.finish()

    def abandon(self) -> None:
        """Give up the file: `finish` returns None. The `.tmp` stays for whoever cleans the directory."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def release(self) -> None:
        """Close the file; after `finish` has returned or raised."""
        self._file.close()


# As much is handed to the disk at a time while a file grows, so that the last flush has little left to do.
_FLUSH_BYTES = 32_000_000


def _in_file_order(plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Tensors whose size is a multiple of 8 bytes keep their order, so that a reader goes through a model from front to back; after them the others,
    larger elements first: every tensor starts aligned for its elements."""
    even = [plan for plan in plans if plan.nbytes % 8 == 0]
    return even + sorted((plan for plan in plans if plan.nbytes % 8), key=lambda plan: -DTYPES[plan.dtype][0])


def checksum(content: memoryview) -> int:
    """A sum over 8-byte words modulo 2^64 and their count: tells what was put in a place from whatever else may be found there."""
    import torch

    whole = len(content) // 8
    total = int(torch.frombuffer(content, dtype=torch.int64, count=whole).sum()) if whole else 0
    return (total + int.from_bytes(content[whole * 8 :], "little") + len(content)) % 2**64


def start_flush(descriptor: int, start: int, nbytes: int) -> None:
    """Have the kernel begin to write these bytes out, without waiting; a hint, so its errors are left to fsync."""
    begin_writing = 2  # SYNC_FILE_RANGE_WRITE
    function = _c_function("sync_file_range")
    if function is not None:
        function(ctypes.c_int(descriptor), ctypes.c_int64(start), ctypes.c_int64(nbytes), ctypes.c_uint(begin_writing))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A whole safetensors file at once, durable and atomic. What the mapping makes of a name is asked for twice: for its shape, and when its turn comes to be written."""
    names = {f"torch.{torch_name}": name for name, (_, torch_name) in DTYPES.items()}
    writer = ShardWriter(path, [TensorPlan(name, names[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()])
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    finally:
        writer.release()


def new_file(path: Path) -> Any:
    """A file made anew for reading and writing, unbuffered: what lies there under its name, a link above all, is removed and not written to."""
    path.unlink(missing_ok=True)
    return open(path, "x+b", buffering=0)


def finite(content: Any) -> Any:
    """The same as JSON can hold it: null for what is not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_json(path: Path, content: Any) -> None:
    """A JSON file, durable and atomic."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold only as an escape
        text = json.dumps(content, indent=2) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """A text file, durable and atomic. A device or pipe is written into, never replaced."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + ".tmp")
    write_bytes(partial, text.encode())
    os.replace(partial, path)
    fsync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """A file made anew, flushed. Where the disk fills, nothing of it stays, and the error names it."""
    try:
        with new_file(path) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]  # a system takes less than all of it, without an error, where that is the last that fits
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        path.unlink(missing_ok=True)
        raise


def fsync_directory(path: Path) -> None:
    """Make a rename in this directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def blake3_file(path: Path) -> str:
    """A file's BLAKE3 hash, as `b3sum` prints it."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_stream(file)


def _sha256_stream(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def plan_shards(groups: Iterable[Sequence[TensorPlan]], max_bytes: int) -> list[list[TensorPlan]]:
    """Fill shards up to `max_bytes`, keeping each group (a Linear's weight and scales) in one shard, in the given order."""
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


class WorkDirectory:
    """A directory in which something is made. `progress.json` in it keeps the fingerprint of everything that decides the bytes, so that `resume` continues only the
    same work.
    """

    def __init__(self, partial: Path, fingerprint: Mapping[str, str], *, resume: bool = False, overwrite: bool = False) -> None:
        self.partial = partial
        self._progress_file = self.partial / PROGRESS_FILE
        self.progress: dict[str, Any] = {"fingerprint": dict(fingerprint), "done": {}}
        if self.partial.is_symlink():
            raise OutputError(f"{self.partial} is a link; nothing is written through it, so remove it or choose another -o")
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError(f"{self.partial} is a file where a directory has to be made; move it, or choose another -o")
        if self.partial.exists():
            if resume and self._can_continue(dict(fingerprint), overwrite):
                self._continue()
            elif resume or overwrite:
                shutil.rmtree(self.partial)
            else:
                raise OutputError(f"{self.partial} was left by an interrupted run; continue it with --resume, or start again with --overwrite")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._save()
        except OSError as error:
            raise OutputError(f"can't write to {self.partial}: {error.strerror}; choose another -o") from None

    def _can_continue(self, fingerprint: dict[str, str], overwrite: bool) -> bool:
        """Whether there is work of an earlier run to go on with. Raises OutputError where it is other work, which only `overwrite` may throw away."""
        if all(path.name == f"{PROGRESS_FILE}.tmp" for path in self.partial.iterdir()):
            return False  # stopped before its first step
        try:
            require_same_fingerprint(f"{self.partial} was begun", fingerprint, self._earlier()["fingerprint"])
        except OutputError:
            if not overwrite:
                raise
            return False
        return True

    def _continue(self) -> None:
        earlier = self._earlier()
        self.progress = {"fingerprint": earlier["fingerprint"], "done": earlier["done" if "done" in earlier else "files"]}

    def _earlier(self) -> dict[str, Any]:
        # A run that was stopped just before its last rename has the manifest, which says the same, in place of progress.json.
        manifest = manifest_of(self.partial)
        source = self._progress_file if self._progress_file.is_file() or manifest is None else manifest
        try:
            progress = json.loads(source.read_text())
            if not isinstance(progress["fingerprint"], dict) or not isinstance(progress["done" if "done" in progress else "files"], dict):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{self.partial} has no readable progress.json, so it can't be continued; start again with --overwrite") from None
        return progress

    @property
    def done(self) -> dict[str, Any]:
        """What earlier runs finished: file name → what was recorded with it."""
        return self.progress["done"]

    def record(self, name: str, content: Any) -> None:
        self.progress["done"][name] = content
        self._save()

    def _save(self) -> None:
        write_json(self._progress_file, self.progress)

    def finished(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Which of these files earlier runs finished and are still as they were recorded: their bytes are read and hashed again."""
        recorded = {name: self.done[name] for name in names if name in self.done}
        with ThreadPoolExecutor(cores()) as pool:
            same = pool.map(lambda item: is_as_recorded(self.partial, *item), recorded.items())
        return {name: entry for (name, entry), is_same in zip(recorded.items(), same) if is_same}

    def discard(self) -> None:
        """Remove the directory; `progress.json` last, so that what is left by a kill can be continued or is nothing."""
        for path in self.partial.iterdir():
            if path != self._progress_file:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._progress_file.unlink(missing_ok=True)
        self.partial.rmdir()


class OutputDirectory(WorkDirectory):
    """A directory that appears under its name only when it is whole: files are made in `OUT.partial`, which `commit` renames to `OUT`."""

    def __init__(self, path: str | Path, fingerprint: Mapping[str, str], *, resume: bool = False, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
        # Resolved, so that a link to a directory is filled, not replaced.
        self.path = resolved_output(Path(path).expanduser())
        check_output(self.path, overwrite=overwrite, reads=reads)
        super().__init__(self.path.with_name(self.path.name + ".partial"), fingerprint, resume=resume, overwrite=overwrite)

    def commit(self) -> None:
        """Put the finished directory in place of `OUT`, which is the old or the new one at every moment where the system can exchange names."""
        self._progress_file.unlink()
        fsync_directory(self.partial)
        if not os.path.lexists(self.path):
            os.rename(self.partial, self.path)
        elif not self.path.is_dir():
            raise OutputError(f"{self.path} has become a file meanwhile; the result is in {self.partial}: move it where you want it")
        elif not exchange_names(self.partial, self.path):
            # A new name, so that no directory of the user's own is taken for what is replaced.
            aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.parent)) / self.path.name
            os.rename(self.path, aside)
            os.rename(self.partial, self.path)
            shutil.rmtree(aside.parent)
        fsync_directory(self.path.parent)
        if self.partial.exists():
            shutil.rmtree(self.partial)  # what was replaced


@cache
def _c_function(name: str) -> Any:
    """A function of the C library, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def exchange_names(first: Path, second: Path) -> bool:
    """Exchange two files or directories in one step; False, with nothing done, where this system can't (Linux can, on most file systems)."""
    function, current_directory, rename_exchange = _c_function("renameat2"), -100, 2
    if function is None or sys.platform != "linux":
        return False
    return function(current_directory, os.fsencode(first), current_directory, os.fsencode(second), ctypes.c_uint(rename_exchange)) == 0


def manifest_of(directory: Path) -> Path | None:
    """The file that says what a finished directory was made from and holds."""
    return next((directory / name for name in (MANIFEST_FILE, CALIBRATION_FILE) if (directory / name).is_file()), None)


def require_same_fingerprint(what: str, fingerprint: Mapping[str, str], earlier: Mapping[str, str]) -> None:
    differing = sorted(key for key in fingerprint.keys() | earlier.keys() if fingerprint.get(key) != earlier.get(key))
    if differing:
        raise OutputError(f"{what} with {', '.join(map(_different, differing))}; use the same, or start again with --overwrite")


def _different(what: str) -> str:
    is_several = what == "data" or (what.partition(" of ")[0].endswith("s") and not what.startswith("--"))
    return f"different {what}" if is_several else f"a different {what}"


def changed_tensors(directory: Path) -> frozenset[str]:
    """What algorithms changed of a model, by its manifest: these can't be compared with the original's one by one."""
    if not (directory / MANIFEST_FILE).is_file():
        return frozenset()
    names = read_json(directory / MANIFEST_FILE, "").get("changed")
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def finished_already(path: Path, fingerprint: Mapping[str, str], overwrite: bool = False) -> bool:
    """Whether a whole output of the same work lies at `path`, each file with the hash that it was exported with.

    Raises OutputError where it is of other work or a file has changed; with `overwrite` those are just not it.
    """
    path = resolved_output(path)
    partial = path.with_name(path.name + ".partial")
    manifest_file = manifest_of(path)
    if (partial / PROGRESS_FILE).exists() or manifest_file is None:
        return False
    try:
        manifest = read_json(manifest_file, "")
        earlier, files = (manifest.get(key) or {} for key in ("fingerprint", "files"))
        if not isinstance(earlier, dict) or not isinstance(files, dict):
            raise OutputError(f"{manifest_file} is damaged; start again with --overwrite")
        require_same_fingerprint(f"{path} was made", fingerprint, earlier)
        with ThreadPoolExecutor(cores()) as pool:
            same = pool.map(lambda item: is_as_recorded(path, *item), files.items())
        changed = [name for name, is_same in zip(files, same) if not is_same]
        if changed:
            raise OutputError(f"{path} was finished, but {changed[0]} has changed since; start again with --overwrite")
    except OutputError:
        if not overwrite:
            raise
        return False
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)  # what this output replaced, by a run that was stopped right after
    return True


def is_as_recorded(directory: Path, name: str, entry: Any) -> bool:
    """Whether a file has the size and the hash of its entry."""
    path = directory / name
    if not isinstance(entry, Mapping) or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == entry.get("bytes") and blake3_file(path) == entry.get("blake3")


def cores() -> int:
    """How many threads can run at once: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_quantized(path: Path) -> bool:
    try:
        return "quantization_config" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return True  # whatever it is, no runtime loads it


def resolved_output(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise OutputError(f"{path} is a link to itself; choose another -o") from None


def check_output(path: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse an output that exists, or that would replace what is being read."""
    resolved = resolved_output(path)
    for source in reads:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(f"the output {path} is, or contains, the input {source}; choose another -o")
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"the output {path} is, or contains, the current directory; name a directory to be made")
    # A device, pipe or socket is neither file nor directory, and must never be put aside for an output.
    if (path.exists() and not path.is_dir()) or (path.is_symlink() and not path.exists()):
        raise OutputError(f"{path} is a file; choose a directory for -o")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(f"{path} exists and is not empty; choose another -o or pass --overwrite")
        if not any((path / name).is_file() for name in ("config.json", CALIBRATION_FILE)):
            raise OutputError(f"{path} is neither a checkpoint nor a calibration, so --overwrite won't replace it; choose another -o")
        if any(path.glob("*.safetensors")) and not any((path / name).is_file() for name in (CALIBRATION_FILE, MANIFEST_FILE)) and not _is_quantized(path):
            raise OutputError(f"{path} is a model that is not quantized, so --overwrite won't replace it; choose another -o")
    # The nearest directory that exists must take new files.
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"can't write to {parent}; choose another -o")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise OutputError(f"{parent} is on a read-only file system; choose another -o")


def check_disk_space(path: Path, needed: int, what: str = "the output") -> None:
    """Refuse before the start what won't fit. What an interrupted run left beside `path` counts as room: it is continued or replaced."""
    path = resolved_output(path)
    partial = path.with_name(path.name + ".partial")
    if partial.is_dir():
        needed -= sum(file.stat().st_size for file in partial.iterdir() if file.is_file())
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{what} needs {format_bytes(needed)} but {parent} has {format_bytes(free)} free; choose another -o or make room")


def format_bytes(count: float) -> str:
    """A size for people: decimal units, as disks and hubs count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def counted(count: int, noun: str) -> str:
    """A number of things for people."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def parse_bytes(text: str) -> int:
    """A size such as 5GB, 500MB or 2GiB in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if not match or len(match[1]) > 12:
        raise OutputError(f"the size '{text}' is not understood; write for example 5GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kMGT".index(match[2].replace("K", "k") or " "))
