"""Finding the safetensors files of a model, and merging their headers.

An index can't name a file outside of the directory. Each tensor must be in exactly one shard, and
each tensor that the index lists must be in a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.model_files import (
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    read_json,
    require_inside,
)
from quantkit.errors import CheckpointError


def is_shard_name(name: str) -> bool:
    """Whether a file of this name holds weights of the model itself, not of an adapter."""
    return name.endswith(".safetensors") and not name.startswith("adapter_")


def shard_paths(directory: Path) -> list[Path]:
    """The shards of a model directory: those that its index names, else its safetensors files.

    Raises CheckpointError if there are none, or if one that the index names is missing.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        return _present_shards(index)
    shards = [
        path
        for path in sorted(directory.glob("*.safetensors"))
        if is_shard_name(path.name) and path.is_file()
    ]
    if len(shards) > 1 and (directory / SINGLE_FILE) in shards:
        # Some publishers add a second copy (consolidated.safetensors). transformers reads this one.
        return [directory / SINGLE_FILE]
    if not shards:
        _refuse_without_shards(directory)
    return shards


def _present_shards(index: Path) -> list[Path]:
    require_inside(index, index.parent)
    names = indexed_shards(index, read_json(index, ""))
    for name in names:
        if not _is_file(index.parent / name):
            raise CheckpointError(
                f"{index} names the shard {name[:200]!r}, which is not there; fetch the model again"
            )
    return [index.parent / name for name in names]


def indexed_shards(index: Path, content: Mapping[str, Any]) -> list[str]:
    """The file names of the shards in an index. Each is a file next to the index.

    index: path of the index, for messages.
    content: the parsed index.

    Raises CheckpointError for an unusable index.
    """
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{index} has no usable 'weight_map'; fetch the model again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise CheckpointError(
                f"{index} names the shard {name[:200]!r}, which is not a .safetensors file next to"
                " it; don't use this checkpoint"
            )
    return names


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that the file system doesn't accept
        return False


def _refuse_without_shards(directory: Path) -> None:
    pickles = [path.name for path in sorted(directory.iterdir()) if path.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{directory} holds only pickle weights ({pickles[0]}), which can run code when loaded;"
            ' if you trust them, convert with: python -c "from transformers import'
            f" AutoModelForCausalLM as M; M.from_pretrained('{directory}',"
            " dtype='auto').save_pretrained('OUT')\""
        )
    raise CheckpointError(
        f"{directory} holds no *.safetensors file; give the directory of a Hugging Face checkpoint"
    )


def merge_headers(
    path: Path, headers: Mapping[Path, Mapping[str, TensorInfo]], index: Mapping[str, Any] | None
) -> dict[str, TensorInfo]:
    """The tensors of all shards, by name.

    path: the model directory, for messages.
    headers: path of each shard → its tensors by name.
    index: content of the index, or None if there is none.

    Raises CheckpointError if a tensor is in two shards, or if one that the index lists is in none.
    """
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
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{INDEX_FILE} lists the tensor '{missing[0]}'{more}, which no shard of"
            f" {path} holds; fetch the model again"
        )
    if not tensors:
        raise CheckpointError(f"the safetensors files of {path} hold no tensor")
    return tensors
