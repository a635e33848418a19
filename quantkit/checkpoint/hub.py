"""Models on the Hugging Face hub: downloaded as a whole into the hub library's cache, or shard by
shard during an export.

An export of a hub model is planned from the headers of its shards, so only those are downloaded
first. They are checked like the headers of local files.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.formats import side_files
from quantkit.checkpoint.gguf import checkpoint_of_gguf, is_gguf, require_file
from quantkit.checkpoint.header import TensorInfo, parse_header
from quantkit.checkpoint.model_files import INDEX_FILE, is_carried_over, read_config, read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.shards import indexed_shards, is_shard_name, merge_headers
from quantkit.errors import CheckpointError, DownloadError, QuantkitError, brief

# Never downloaded: weights of other frameworks, and second copies of the weights.
IGNORED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "original/*",
)


def is_hub_id(model: str) -> bool:
    """Whether MODEL looks like a hub id (org/name) and isn't an existing path."""
    path = Path(model).expanduser()
    return (
        not path.exists()
        and not is_gguf(model)
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None
        and not path.parent.is_dir()
    )


def resolve_model(model: str) -> Path:
    """The local directory of MODEL.

    A hub id is downloaded as a whole. A GGUF file is converted to a checkpoint in the cache. A path
    is returned as it is, even if nothing exists there.

    Raises CheckpointError if the download or the conversion fails.
    """
    if is_gguf(model):
        require_file(Path(model).expanduser())
        return checkpoint_of_gguf(Path(model).expanduser())
    if not is_hub_id(model):
        return Path(model).expanduser()
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        return Path(snapshot_download(model, ignore_patterns=list(IGNORED)))


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """A context in which the hub library draws its progress bars only if stderr is a terminal."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Turn every exception that the hub library raises in this context into a CheckpointError."""
    try:
        with _bars_on_a_terminal():
            yield
    except QuantkitError:
        raise
    except Exception as error:  # from the hub library, its HTTP client and the system
        raise CheckpointError(
            f"there is no directory {model}, and as a hub id it can't be fetched"
            f" ({type(error).__name__}: {brief(error)}); check the name or give a local"
            " directory"
        ) from None


def open_hub_model(model: str, download_to: Path | None = None) -> Checkpoint:
    """Open a hub model from the headers of its shards. Each shard is downloaded when it is first
    read.

    model: a hub id.
    download_to: a directory for the shards, each of which is removed when it is no longer needed;
        None keeps them in the hub library's cache.

    Without a connection, the whole model must be in the cache already. Raises CheckpointError if
    the model can't be downloaded or isn't supported.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        revision = _revision(model, is_streamed=download_to is not None)
        if revision is None:
            return Checkpoint.open(resolve_model(model))
        small = [name for name in revision.sizes if _is_small_file(name)]
        directory = Path(snapshot_download(model, revision=revision.sha, allow_patterns=small))
    index = read_json(directory / INDEX_FILE, "") if (directory / INDEX_FILE).is_file() else None
    names = _shard_names(model, revision, directory, index)
    target = download_to or directory
    source = HubShards(model, revision.sha, target, keep=download_to is None)
    with _hub_errors(model):
        headers = {target / name: source.header(name, revision.sizes[name]) for name in names}
    identity = json.dumps([[name, revision.sizes[name], revision.hashes[name]] for name in names])
    tensors = merge_headers(directory, headers, index)
    return Checkpoint(directory, read_config(directory), tensors, source, identity)


@dataclass(frozen=True)
class _Revision:
    """One revision of a hub model.

    sha: the commit.
    sizes: file name → size in bytes.
    hashes: file name → SHA-256 of a large file (LFS), else git's hash.
    """

    sha: str | None
    sizes: dict[str, int]
    hashes: dict[str, str | None]


def _revision(model: str, is_streamed: bool) -> _Revision | None:
    """The newest revision of a model, or None if the hub can't be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(model, files_metadata=True)
    except HfHubHTTPError:
        raise  # the hub has answered
    except Exception as error:  # a missing connection shows as exceptions of many kinds
        if is_streamed:
            raise CheckpointError(
                "`stream_download=True` needs the hub, which can't be reached"
                f" ({type(error).__name__})",
                hint="leave it out to use the cache",
            ) from None
        return None
    files = info.siblings or []
    return _Revision(
        info.sha,
        {file.rfilename: file.size or 0 for file in files},
        {file.rfilename: getattr(file.lfs, "sha256", None) or file.blob_id for file in files},
    )


def _shard_names(
    model: str, revision: _Revision, directory: Path, index: Mapping[str, Any] | None
) -> list[str]:
    """The names of the model's shards: from its index if it has one, else all its safetensors
    files.

    Raises CheckpointError if a shard is missing or there is none.
    """
    if index:
        names = indexed_shards(directory / INDEX_FILE, index)
    else:
        names = sorted(name for name in revision.sizes if is_shard_name(name) and "/" not in name)
    for name in names:
        if name not in revision.sizes:
            raise CheckpointError(
                f"{INDEX_FILE} of {model} names the shard {name}, which the hub doesn't have; tell"
                " its publisher"
            )
    if not names:
        raise CheckpointError(
            f"the hub's {model} has no *.safetensors file; quantkit reads no other"
        )
    return names


def _is_small_file(name: str) -> bool:
    """Whether a file is downloaded at once: config, index, and the files that an export copies."""
    folder, _, leaf = name.rpartition("/")
    if folder not in ("", "additional_chat_templates"):
        return False
    return leaf in ("config.json", INDEX_FILE, *side_files()) or is_carried_over(leaf)


@dataclass
class HubShards:
    """The shards of one revision of a hub model (implements `ShardSource`).

    model: the hub id.
    revision: the commit; None for the newest.
    directory: where the shards are stored.
    keep: whether they stay there, which is the hub library's cache.
    """

    model: str
    revision: str | None
    directory: Path
    keep: bool

    def header(self, name: str, size: int) -> dict[str, TensorInfo]:
        """A shard's tensors by name, read from its first bytes alone.

        size: size of the shard, in bytes.
        """
        from huggingface_hub import HfFileSystem

        with HfFileSystem().open(
            f"{self.model}@{self.revision}/{name}", "rb", block_size=1 << 20
        ) as file:
            return parse_header(file, size, self.directory / name)

    def fetch(self, path: Path) -> None:
        """Download a shard unless it is already there.

        Raises DownloadError if that fails.
        """
        from huggingface_hub import hf_hub_download

        if self.keep and path.is_file():
            return
        try:
            hf_hub_download(
                self.model,
                path.name,
                revision=self.revision,
                local_dir=None if self.keep else self.directory,
            )
        except Exception as error:  # of many kinds, as in `_hub_errors`
            raise DownloadError(
                f"{self.model}'s {path.name} can't be fetched ({type(error).__name__}:"
                f" {brief(error)})",
                hint="continue with `resume=True`",
            ) from None

    def release(self, path: Path) -> None:
        """Remove a shard that won't be read again, unless shards are kept."""
        if not self.keep:
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove the downloaded shards and the hub library's own files, unless shards are kept."""
        if not self.keep:
            shutil.rmtree(self.directory, ignore_errors=True)
