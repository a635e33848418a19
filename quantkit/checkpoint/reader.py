"""Opening a model directory: its config, its tensors by name, and a fingerprint of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.checkpoint.header import TensorInfo, read_header
from quantkit.checkpoint.model_files import (
    INDEX_FILE,
    carried_over_files,
    read_config,
    read_json,
    require_inside,
)
from quantkit.checkpoint.shards import is_shard_name, merge_headers, shard_paths
from quantkit.checkpoint.tensor_reader import open_to_read, read_tensor
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that the fingerprint reads at each position that it samples.
SAMPLE_BYTES = 4096


class ShardSource(Protocol):
    """Fetches the shards of a model that isn't (completely) on this disk."""

    def fetch(self, path: Path) -> None:
        """Fetch a shard, and return when it is on this disk. Raises DownloadError if that fails."""

    def release(self, path: Path) -> None:
        """Called when a shard won't be read again."""

    def clean(self) -> None:
        """Remove the shards that were fetched for this run only."""


@dataclass(frozen=True)
class Checkpoint:
    """A model directory opened for reading.

    path: the directory.
    config: content of config.json, with ModelOpt's quantization_config from its own file.
    tensors: name → position of the tensor in its file.
    source: fetches shards that aren't on this disk yet; None if all are here.
    identity: text that identifies the weights without reading them (the hub's hashes of the files);
        None if the weights have to be read.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    source: ShardSource | None = None
    identity: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a local directory and check every shard's header.

        Raises CheckpointError if it isn't a readable model.
        """
        path = Path(path)
        _require_model_directory(path)
        config = read_config(path)
        headers = {shard: read_header(require_inside(shard, path)) for shard in shard_paths(path)}
        index = read_json(path / INDEX_FILE, "") if (path / INDEX_FILE).is_file() else None
        return cls(path, config, merge_headers(path, headers, index))

    def read(self, name: str) -> Tensor:
        """One tensor in its stored shape and dtype, in memory of its own."""
        return read_tensor(self.tensors[name])

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def shard_paths(self) -> list[Path]:
        """The files that hold tensors, sorted."""
        return sorted({info.path for info in self.tensors.values()})

    def fingerprint(self) -> str:
        """A SHA-256 that distinguishes this model's files from another model's.

        It covers the config and, for each shard: size, header, 64 evenly spaced samples of 4 KB,
        and one sample of each tensor. It detects a layer that was trained further, but may miss a
        few changed values. Reading all of a large model would take minutes.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        if self.identity is not None:
            digest.update(self.identity.encode())
            return digest.hexdigest()
        tensors: dict[Path, list[TensorInfo]] = {}
        for name in sorted(self.tensors):
            tensors.setdefault(self.tensors[name].path, []).append(self.tensors[name])
        for path in self.shard_paths:
            with open_to_read(path) as file:
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
        """The files that an export copies: tokenizer, templates, licence, model card and so on."""
        return carried_over_files(self.path)


def _require_model_directory(path: Path) -> None:
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
            f"{path} is a calibration, not a model", hint="give the model's directory"
        )
    has_weights = any(is_shard_name(shard.name) for shard in path.glob("*.safetensors"))
    if (path / "adapter_config.json").is_file() and not has_weights:
        raise CheckpointError(
            f"{path} is an adapter, not a model; merge it first, with peft:"
            " model.merge_and_unload().save_pretrained(OUT)"
        )


def _sample_place(info: TensorInfo) -> int:
    """The byte of the file at which a tensor is sampled.

    It depends on a hash of the tensor's name, so no regular pattern in a model can escape all
    samples.
    """
    room = max(1, info.nbytes - SAMPLE_BYTES + 1)
    name_hash = hashlib.sha256(info.name.encode()).digest()
    return info.start + int.from_bytes(name_hash[:8], "little") % room
