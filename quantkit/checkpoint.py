"""Safetensors directories: a lazy reader, a streaming writer, and output that is whole or absent.

The reader checks a shard's header against its size before it believes it, and takes no shard name from an index that could leave the
directory. Tensors are read one at a time with plain reads, so memory stays at one tensor and a truncated file is an
error, not a crash. The writer knows its header before the first byte, because shapes and dtypes follow from the recipe.
Format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

# Bytes per element, and torch's name, of each safetensors dtype that is read or written here.
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"),
    "U8": (1, "uint8"), "BOOL": (1, "bool"),
}  # fmt: skip
# The reference implementation refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: where it is and what it is. `start` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: known before its values are."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name, after checking that the file holds what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is {size} bytes long, too short for a safetensors file; fetch or copy it again")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(f"{path} claims a header of {length} bytes but is {size} bytes long; fetch or copy it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors, spans = {}, []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: tensor '{name}' has the dtype {dtype!r}, which quantkit doesn't read")
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end)):
                raise CheckpointError(f"{path}: tensor '{name}' has a negative or fractional size")
            info = TensorInfo(name, dtype, shape, path, 8 + length + begin)
            if end - begin != info.nbytes or 8 + length + end > size:
                raise CheckpointError(
                    f"{path}: tensor '{name}' doesn't fit its place in the file ({info.nbytes} bytes at {begin}–{end} of {size - 8 - length}); fetch or copy it again"
                )
            tensors[name] = info
            spans.append((begin, end, name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header ({type(error).__name__}); fetch or copy it again") from None
    spans.sort()
    for (_, previous_end, previous), (begin, _, name) in zip(spans, spans[1:]):
        if begin < previous_end:
            raise CheckpointError(f"{path}: the tensors '{previous}' and '{name}' overlap")
    # Without overlap, the tensors fill the file exactly when their sizes add up to it.
    if sum(info.nbytes for info in tensors.values()) != size - 8 - length:
        raise CheckpointError(f"{path} has bytes that belong to no tensor, which other readers refuse; fetch or copy it again")
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, read into memory of its own."""
    import torch

    buffer = bytearray(info.nbytes)
    view, position = memoryview(buffer), 0
    with open(info.path, "rb", buffering=0) as file:
        file.seek(info.start)
        while position < len(buffer):
            read = file.readinto(view[position:])
            if not read:
                raise CheckpointError(f"{info.path} ends inside the tensor '{info.name}'; fetch or copy it again")
            position += read
    dtype = getattr(torch, DTYPES[info.dtype][1])
    if not buffer:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory order, without a copy where it is contiguous already."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory opened for reading: its config, and each tensor's place by name."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"there is no directory {path}; give a model directory or a hub id such as org/name")
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file; give the model's directory, with config.json and *.safetensors")
        if (path / "calibration.json").is_file():
            raise CheckpointError(f"{path} is a calibration, not a model; `quantkit inspect {path}` shows it")
        config = read_json(path / "config.json", "every Hugging Face checkpoint has one; copy it from where the model comes from")
        tensors: dict[str, TensorInfo] = {}
        for shard in _shard_paths(path):
            for name, info in read_header(shard).items():
                if name in tensors:
                    raise CheckpointError(f"the tensor '{name}' is in both {tensors[name].path.name} and {shard.name} of {path}; remove the stale shard")
                tensors[name] = info
        index = path / INDEX_FILE
        if index.is_file():
            missing = [name for name in read_json(index, "")["weight_map"] if name not in tensors]
            if missing:
                raise CheckpointError(
                    f"{index.name} lists the tensor '{missing[0]}'{_and_more(missing)}, which no shard of {path} holds; fetch the model again"
                )
        if not tensors:
            raise CheckpointError(f"the safetensors files of {path} hold no tensor")
        return cls(path, config, tensors)

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
        """A hash that tells this model's files from another's: config, headers, and samples of the data.

        Of each shard: its size, its header, and 64 stretches of 4 KB spread over the tensors; reading all of a large model would
        cost minutes and tell no more of models that people have.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in self.shard_paths:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                header = file.read(8)
                digest.update(file.read(int.from_bytes(header, "little")))
                start = file.tell()
                for step in range(64):
                    file.seek(start + (size - start) * step // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def other_files(self) -> list[Path]:
        """What an export carries over: tokenizer, templates, generation config, licence, card; no weights, no config.json."""
        left = {"config.json", INDEX_FILE, "hf_quant_config.json"}
        weights = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", *PICKLE_SUFFIXES)
        files = [p for p in sorted(self.path.iterdir()) if p.is_file() and p.name not in left and not p.name.endswith(weights) and not p.name.startswith(".")]
        templates = self.path / "additional_chat_templates"
        return files + (sorted(p for p in templates.iterdir() if p.is_file()) if templates.is_dir() else [])


def _shard_paths(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no usable 'weight_map'; fetch the model again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names the shard '{name}', which is not a .safetensors file beside it; don't use this checkpoint")
            if not (path / name).is_file():
                raise CheckpointError(f"{index} names the shard {name}, which is not there; fetch the model again")
        return [path / name for name in names]
    shards = [p for p in sorted(path.glob("*.safetensors")) if not p.name.startswith("adapter_")]
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is an adapter, not a model; merge it first, with peft: model.merge_and_unload().save_pretrained(OUT)")
    if len(shards) > 1 and (path / SINGLE_FILE) in shards:
        # Some publishers keep a second copy beside it (consolidated.safetensors); transformers reads this one too.
        shards = [path / SINGLE_FILE]
    if shards:
        return shards
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{path} holds only pickle weights ({pickles[0]}), which can run code when loaded; if you trust them, convert with: "
            f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}', dtype='auto').save_pretrained('OUT')\""
        )
    raise CheckpointError(f"{path} holds no *.safetensors file; give the directory of a Hugging Face checkpoint")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError; `advice` ends the sentence where the file is missing."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing{'; ' + advice if advice else ''}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not readable as JSON; fetch or copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is JSON but not an object; fetch or copy it again")
    return content


def resolve_model(model: str) -> Path:
    """The local directory of MODEL, fetched from the hub when it is no path but looks like a hub id."""
    path = Path(model).expanduser()
    looks_like_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None
    if path.exists() or not looks_like_id or path.parent.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"there is no directory {model}, and as a hub id it can't be fetched ({type(error).__name__}: {reason}); check the name or give a local directory"
        ) from None


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order; complete or not there at all.

    Tensors go into `PATH.tmp` at their final offsets; `close` checks that each came exactly once, flushes to disk and renames.
    """

    def __init__(self, path: Path, plans: Sequence[TensorPlan]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".tmp")
        # Larger elements first, as the reference implementation has it, so that every tensor starts aligned.
        ordered = sorted(plans, key=lambda plan: -DTYPES[plan.dtype][0])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[TensorPlan, int]] = {}
        offset = 0
        for plan in ordered:
            header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [offset, offset + plan.nbytes]}
            self._places[plan.name] = (plan, offset)
            offset += plan.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._data_start = 8 + len(raw)
        self._size = self._data_start + offset
        self._missing = set(self._places)
        self._file = open(self._partial, "wb", buffering=0)
        _write_all(self._file.fileno(), len(raw).to_bytes(8, "little") + raw, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        plan, offset = self._places[name]
        dtype = DTYPES[plan.dtype][1]
        if tuple(tensor.shape) != plan.shape or str(tensor.dtype) != f"torch.{dtype}":
            raise AssertionError(f"{name}: planned {plan.dtype} {plan.shape}, made {tensor.dtype} {tuple(tensor.shape)}")
        if name not in self._missing:
            raise AssertionError(f"{name} was written twice")
        _write_all(self._file.fileno(), tensor_bytes(tensor), self._data_start + offset)
        self._missing.discard(name)

    def close(self) -> None:
        if self._missing:
            raise AssertionError(f"never written: {', '.join(sorted(self._missing)[:5])}")
        self._file.truncate(self._size)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        fsync_directory(self.path.parent)

    def abandon(self) -> None:
        self._file.close()


def _write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A whole safetensors file at once, durable and atomic."""
    names = {f"torch.{torch_name}": name for name, (_, torch_name) in DTYPES.items()}
    writer = ShardWriter(path, [TensorPlan(name, names[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()])
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def write_json(path: Path, content: Any) -> None:
    """A JSON file, durable and atomic."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, durable and atomic. A device or pipe is written into, never replaced."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make a rename in this directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


class OutputDirectory:
    """A directory that appears under its name only when it is whole.

    Files are made in `OUT.partial`, which `commit` renames to `OUT`. `progress.json` in it keeps the fingerprint of everything that
    decides the bytes, so that `resume` continues only the same work.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, str], *, resume: bool = False, overwrite: bool = False, reads: Iterable[Path] = ()) -> None:
        # Resolved, so that a link to a directory is filled, not replaced.
        self.path = Path(path).expanduser().resolve()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._progress_file = self.partial / "progress.json"
        check_output(self.path, overwrite=overwrite, reads=reads)
        self.progress: dict[str, Any] = {"fingerprint": dict(fingerprint), "done": {}}
        if self.partial.exists():
            if resume:
                self._continue(dict(fingerprint))
            elif overwrite:
                shutil.rmtree(self.partial)
            else:
                raise OutputError(f"{self.partial} was left by an interrupted run; continue it with --resume, or start again with --overwrite")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._save()
        except OSError as error:
            raise OutputError(f"can't write to {self.partial}: {error.strerror}; choose another -o") from None

    def _continue(self, fingerprint: dict[str, str]) -> None:
        try:
            progress = json.loads(self._progress_file.read_text())
            earlier, done = progress["fingerprint"], progress["done"]
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{self.partial} has no readable progress.json, so it can't be continued; start again with --overwrite") from None
        differing = sorted(key for key in fingerprint.keys() | earlier.keys() if fingerprint.get(key) != earlier.get(key))
        if differing:
            raise OutputError(f"{self.partial} was begun with a different {', '.join(differing)}; use the same, or start again with --overwrite")
        self.progress = {"fingerprint": earlier, "done": done}

    @property
    def done(self) -> dict[str, Any]:
        """What earlier runs finished: file name → what was recorded with it."""
        return self.progress["done"]

    def record(self, name: str, content: Any) -> None:
        self.progress["done"][name] = content
        self._save()

    def _save(self) -> None:
        write_json(self._progress_file, self.progress)

    def discard(self) -> None:
        """Remove what was begun, when it can't be finished."""
        shutil.rmtree(self.partial)

    def commit(self) -> None:
        """Put the finished directory in place of `OUT`."""
        self._progress_file.unlink()
        fsync_directory(self.partial)
        replaced = self.path.with_name(self.path.name + ".replaced")
        if self.path.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(self.path, replaced)
        os.rename(self.partial, self.path)
        fsync_directory(self.path.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def check_output(path: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse an output that exists, or that would replace what is being read."""
    resolved = path.resolve()
    for source in reads:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(f"the output {path} is, or contains, the input {source}; choose another -o")
    if path.is_file() or (path.is_symlink() and not path.exists()):
        raise OutputError(f"{path} is a file; choose a directory for -o")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(f"{path} exists and is not empty; choose another -o or pass --overwrite")
        if not any((path / name).is_file() for name in ("config.json", "calibration.json")):
            raise OutputError(f"{path} is neither a checkpoint nor a calibration, so --overwrite won't replace it; choose another -o")
    # The nearest directory that exists must take new files.
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"can't write to {parent}; choose another -o")


def check_disk_space(path: Path, needed: int) -> None:
    """Refuse before the start what won't fit."""
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"the output needs {format_bytes(needed)} but {parent} has {format_bytes(free)} free; choose another -o or make room")


def format_bytes(count: float) -> str:
    """A size for people: decimal units, as disks and hubs count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def parse_bytes(text: str) -> int:
    """A size such as 5GB, 500MB or 2GiB in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if not match or len(match[1]) > 12 or float(match[1]) <= 0:
        raise OutputError(f"the size '{text}' is not understood; write for example 5GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kMGT".index(match[2].replace("K", "k") or " "))


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
