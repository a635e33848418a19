"""Safetensors directories, read: headers that are checked before they are believed, tensors one at
a time, shards mapped into memory.

A shard's header is checked against its size; an index can't name a file outside of the directory,
nor can a link lead there. Two ways to read: `Checkpoint.read` gives one whole tensor, `MappedShard`
shows some of its rows where they lie in the page cache. Both end with an error where a file ends
too early. Format: 8 bytes little-endian header length, a JSON header, then the tensors without
gaps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from quantkit.checkpoint.formats import config_of_side_file, side_files
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Bytes per element, and torch's name, of each safetensors dtype that is read or written here.
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
# The reference implementation refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Of a shard's and of each tensor's bytes, how many a sample for the fingerprint has.
SAMPLE_BYTES = 4096
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: where it is and what it is. `start` counts from the file's first byte.

    strides: of a matrix that isn't stored row after row, the steps from a row and from a column to
    the next, in elements (`models/linear_views.py` makes such).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    strides: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]

    @property
    def is_dense(self) -> bool:
        """Whether its rows lie one after the other, without gaps."""
        return self.strides is None or self.strides == (self.shape[1], 1)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Where in the file rows first to last (exclusive) begin, and over how many bytes they
        extend.
        """
        size = DTYPES[self.dtype][0]
        if self.is_dense:
            return (
                self.start + first * row_elements(self) * size,
                (last - first) * row_elements(self) * size,
            )
        extent = (last - first - 1) * self.strides[0] + (self.shape[1] - 1) * self.strides[1] + 1
        return self.start + first * self.strides[0] * size, (
            extent * size if last > first and self.shape[1] else 0
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name, after checking that the file holds what its
    header says.
    """
    try:
        with open(path, "rb") as file:
            return parse_header(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None


def parse_header(file: BinaryIO, size: int, path: Path) -> dict[str, TensorInfo]:
    """The same from an open file of `size` bytes, which need not lie on this machine; path: where
    its tensors will be read from.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path} is {size} bytes long, too short for a safetensors file; fetch or copy it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes but is {size} bytes long; fetch or copy it"
            " again"
        )
    raw = file.read(length)
    try:
        # Strict where Python's reader is generous: other readers refuse what is not UTF-8, and
        # numbers that are no sizes.
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_size,
            parse_float=_no_size,
            parse_constant=_no_size,
        )
        _require_metadata(header.pop("__metadata__", None))
        tensors, spans = {}, []
        for name, entry in header.items():
            name.encode()  # half of a surrogate pair can be escaped in JSON but is no text
            if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(
                entry["shape"], list
            ):
                raise ValueError("a tensor has a dtype, a shape and data_offsets")
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor '{name}' has the dtype {dtype!r}; quantkit reads"
                    f" {', '.join(DTYPES)}"
                )
            if not all(
                isinstance(n, int) and not isinstance(n, bool) for n in (*shape, begin, end)
            ):
                raise CheckpointError(
                    f"{path}: tensor '{name}' has a size that is no whole number; fetch or copy it"
                    " again"
                )
            if not name:
                raise CheckpointError(f"{path} has a tensor without a name; fetch or copy it again")
            if not _is_countable(shape, dtype):
                raise CheckpointError(
                    f"{path}: tensor '{name}' has a shape that no memory holds; fetch or copy it"
                    " again"
                )
            info = TensorInfo(name, dtype, shape, path, 8 + length + begin)
            if end - begin != info.nbytes or 8 + length + end > size:
                raise CheckpointError(
                    f"{path}: tensor '{name}' doesn't fit its place in the file ({info.nbytes}"
                    f" bytes at {begin}–{end} of {size - 8 - length}); fetch or copy it again"
                )
            tensors[name] = info
            spans.append((begin, end, name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a broken safetensors header ({type(error).__name__}); fetch or copy it"
            " again"
        ) from None
    spans.sort()
    for (_, previous_end, previous), (begin, _, name) in zip(spans, spans[1:]):
        if begin < previous_end:
            raise CheckpointError(
                f"{path}: the tensors '{previous}' and '{name}' overlap; fetch or copy it again"
            )
    # Without overlap, the tensors fill the file exactly when their sizes add up to it.
    if sum(info.nbytes for info in tensors.values()) != size - 8 - length:
        raise CheckpointError(
            f"{path} has bytes that belong to no tensor, which other readers refuse; fetch or copy"
            " it again"
        )
    return tensors


def _size(text: str) -> int:
    """A JSON number that is a size: no sign, no more digits than 64 bits hold."""
    if text[0] == "-" or len(text) > 20:
        raise ValueError(f"{text[:20]} is no size")
    return int(text)


def _no_size(text: str) -> int:
    raise ValueError(f"{text[:20]} is no size")


def _require_metadata(metadata: Any) -> None:
    """The format allows text only, and other readers refuse the rest."""
    if metadata is not None:
        for text in [*metadata.keys(), *metadata.values()]:
            text.encode()  # AttributeError for what is no text


def _is_countable(shape: Sequence[int], dtype: str) -> bool:
    """Whether sizes and strides of a tensor fit into 63 bits, also where a dimension is zero; stops
    at the first product that doesn't.
    """
    nbytes = DTYPES[dtype][0]
    for size in shape:
        nbytes *= max(1, size)
        if nbytes >= 2**63:
            return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice and Python keeps the last: here that is a broken header."""
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key stands twice")
    return keys


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, read into memory of its own."""
    import torch

    start, length = (info.start, info.nbytes) if info.is_dense else info.span(0, info.shape[0])
    buffer = bytearray(length)
    view, position = memoryview(buffer), 0
    with _open_to_read(info.path) as file:
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
    return (
        values.reshape(info.shape)
        if info.is_dense
        else values.as_strided(info.shape, info.strides).contiguous()
    )


def torch_dtype(info: TensorInfo) -> Any:
    """torch's dtype of a stored tensor."""
    import torch

    return getattr(torch, DTYPES[info.dtype][1])


def _open_to_read(path: Path) -> Any:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror}; it was there when the checkpoint was opened"
        ) from None


# Linux: fill the page tables for reading, or say that the file can't be read, where touching the
# memory would end the process (SIGBUS).
MADV_POPULATE_READ = 22
MAP_NORESERVE = 0x4000


class MappedShard:
    """A shard in this process's address space. Its pages are the page cache's own; `release` takes
    those that were looked at out of this process again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_to_read(path)
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
        return (
            values.reshape(last - first, -1)
            if info.is_dense
            else values.as_strided((last - first, info.shape[1]), info.strides).contiguous()
        )

    def release(self, info: TensorInfo, first: int, last: int) -> None:
        start, length = info.span(first, last)
        # Whole pages only: the outer two may hold a neighbour's values, which another thread reads.
        begin, end = (
            -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
            (start + length) // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _require_readable(self, info: TensorInfo, start: int, length: int) -> None:
        # Behind a file's end its last page reads as zeros, and the pages after that end the
        # process.
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
        except (
            BufferError
        ):  # a tensor still looks at it, as when an error is on its way; it goes with that tensor
            del self._map


def row_count(info: TensorInfo) -> int:
    """How many rows `MappedShard.rows` counts: the first dimension; a scalar is one row."""
    return info.shape[0] if info.shape else 1


def row_elements(info: TensorInfo) -> int:
    return math.prod(info.shape[1:])


class ShardSource(Protocol):
    """Where shards come from that are not all on this disk."""

    def fetch(self, path: Path) -> None:
        """Return when the shard is there."""

    def release(self, path: Path) -> None:
        """It won't be read again."""

    def clean(self) -> None:
        """Remove what was only there for the time of the work."""


@dataclass(frozen=True)
class Checkpoint:
    """A model directory opened for reading: its config, and each tensor's place by name.

    source: brings the shards that are still elsewhere; None where all are here. identity: what
    tells its weights from another model's without reading them (the hashes that a hub keeps); None
    where they have to be read.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    source: ShardSource | None = None
    identity: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        path = Path(path)
        if not path.exists():
            raise CheckpointError(
                f"there is no directory {path}; give a model directory or a hub id such as org/name"
            )
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is a file; give the model's directory, with config.json and *.safetensors"
            )
        if (path / "calibration.json").is_file():
            raise CheckpointError(
                f"{path} is a calibration, not a model; `quantkit inspect {shlex.quote(str(path))}`"
                " shows it"
            )
        weights = [
            shard for shard in path.glob("*.safetensors") if not shard.name.startswith("adapter_")
        ]
        if (path / "adapter_config.json").is_file() and not weights:
            raise CheckpointError(
                f"{path} is an adapter, not a model; merge it first, with peft:"
                " model.merge_and_unload().save_pretrained(OUT)"
            )
        config = read_config(path)
        headers = {shard: read_header(require_inside(shard, path)) for shard in _shard_paths(path)}
        index = read_json(path / INDEX_FILE, "") if (path / INDEX_FILE).is_file() else None
        return cls(path, config, merge_headers(path, headers, index))

    def read(self, name: str) -> Tensor:
        return read_tensor(self.tensors[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def shard_paths(self) -> list[Path]:
        return sorted({info.path for info in self.tensors.values()})

    def fingerprint(self) -> str:
        """A hash that tells this model's files from another's: config, headers, and samples of
        every tensor.

        Of each shard: its size, its header, 64 stretches of 4 KB spread over the file, and one of
        each tensor, at a place that follows from its name: one layer that was trained further is
        seen, a few changed values may not be. Reading all of a large model would cost minutes.
        """
        if self.identity is not None:
            return hashlib.sha256(
                (json.dumps(self.config, sort_keys=True) + self.identity).encode()
            ).hexdigest()
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        tensors: dict[Path, list[TensorInfo]] = {}
        for name in sorted(self.tensors):
            tensors.setdefault(self.tensors[name].path, []).append(self.tensors[name])
        for path in self.shard_paths:
            with _open_to_read(path) as file:
                descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
                digest.update(f"{path.name} {size}".encode())
                header = os.pread(descriptor, 8, 0)
                start = 8 + int.from_bytes(header, "little")
                digest.update(os.pread(descriptor, start - 8, 8))
                places = [start + (size - start) * step // 64 for step in range(64)]
                for place in [*places, *map(_sample_place, tensors[path])]:
                    digest.update(os.pread(descriptor, SAMPLE_BYTES, place))
        return digest.hexdigest()

    def other_files(self) -> list[Path]:
        """What an export carries over: tokenizer, templates, generation config, licence, card; no
        weights, no config.json.
        """
        files = [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file() and is_carried_over(path.name)
        ]
        templates = self.path / "additional_chat_templates"
        if templates.is_dir():
            files += sorted(
                path for path in require_inside(templates, self.path).iterdir() if path.is_file()
            )
        return [require_inside(path, self.path) for path in files]


def _sample_place(info: TensorInfo) -> int:
    """Where in its file a tensor is looked at: somewhere else in each, so that no pattern of the
    model is missed in all of them.
    """
    room = max(1, info.nbytes - SAMPLE_BYTES + 1)
    return (
        info.start
        + int.from_bytes(hashlib.sha256(info.name.encode()).digest()[:8], "little") % room
    )


def is_carried_over(name: str) -> bool:
    """Whether a file of a model directory goes into an export of it as it is."""
    made = {"config.json", INDEX_FILE, *side_files(), "quantkit.json"}
    weights = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", *PICKLE_SUFFIXES)
    return name not in made and not name.endswith(weights) and not name.startswith(".")


def require_inside(path: Path, directory: Path) -> Path:
    """`path`, unless it is a link that leads out of the directory: a checkpoint from elsewhere must
    not make us read this machine's own files.

    The hub's cache is made of links from snapshots/REVISION to blobs beside snapshots; those are
    inside.
    """
    try:
        root, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(
            f"{path} is a link to itself; put a copy of the file in its place"
        ) from None
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(
            f"{path} is a link to {target}, out of its directory; put a copy in its place if you"
            " trust it"
        )
    return path


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, with the quantization_config of a side file where it has
    none (ModelOpt's).
    """
    require_inside(path / "config.json", path)
    config = read_json(
        path / "config.json",
        "every Hugging Face checkpoint has one; copy it from where the model comes from",
    )
    for name in side_files():
        if config.get("quantization_config") is None and (path / name).is_file():
            require_inside(path / name, path)
            stored = config_of_side_file(name, read_json(path / name, ""))
            config = config | {"quantization_config": stored}
    return config


def merge_headers(
    path: Path, headers: Mapping[Path, Mapping[str, TensorInfo]], index: Mapping[str, Any] | None
) -> dict[str, TensorInfo]:
    """The tensors of all shards, each in one of them, and all that the index lists."""
    tensors: dict[str, TensorInfo] = {}
    for shard, infos in headers.items():
        for name, info in infos.items():
            if name in tensors:
                raise CheckpointError(
                    f"the tensor '{name}' is in both {tensors[name].path.name} and {shard.name} of"
                    f" {path}; remove the stale shard"
                )
            tensors[name] = info
    missing = [name for name in (index or {}).get("weight_map", ()) if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{INDEX_FILE} lists the tensor '{missing[0]}'{_and_more(missing)}, which no shard of"
            f" {path} holds; fetch the model again"
        )
    if not tensors:
        raise CheckpointError(f"the safetensors files of {path} hold no tensor")
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def indexed_shards(index: Path, content: Mapping[str, Any]) -> list[str]:
    """The shards that an index names: files beside it, and nothing else."""
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index} has no usable 'weight_map'; fetch the model again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise CheckpointError(
                f"{index} names the shard {name[:200]!r}, which is not a .safetensors file beside"
                " it; don't use this checkpoint"
            )
    return names


def _shard_paths(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if index.is_file():
        require_inside(index, path)
        names = indexed_shards(index, read_json(index, ""))
        for name in names:
            if not _is_file(path / name):
                raise CheckpointError(
                    f"{index} names the shard {name[:200]!r}, which is not there; fetch the model"
                    " again"
                )
        return [path / name for name in names]
    shards = [
        p
        for p in sorted(path.glob("*.safetensors"))
        if not p.name.startswith("adapter_") and p.is_file()
    ]
    if len(shards) > 1 and (path / SINGLE_FILE) in shards:
        # Some publishers keep a second copy beside it (consolidated.safetensors); transformers
        # reads this one too.
        shards = [path / SINGLE_FILE]
    if shards:
        return shards
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{path} holds only pickle weights ({pickles[0]}), which can run code when loaded; if"
            ' you trust them, convert with: python -c "from transformers import'
            f" AutoModelForCausalLM as M; M.from_pretrained('{path}',"
            " dtype='auto').save_pretrained('OUT')\""
        )
    raise CheckpointError(
        f"{path} holds no *.safetensors file; give the directory of a Hugging Face checkpoint"
    )


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError; `advice` ends the sentence where the file is
    missing.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing{'; ' + advice if advice else ''}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not readable as JSON; fetch or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is JSON but not an object; fetch or copy it again")
    return content


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
