"""Models on the hub: a whole one into the hub library's cache, or one shard at a time as an export
comes to it.

A streamed model is planned from its shards' headers, which are fetched alone; names and headers are
checked as those of files are.
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
from quantkit.checkpoint.reader import (
    INDEX_FILE,
    Checkpoint,
    indexed_shards,
    is_carried_over,
    merge_headers,
    parse_header,
    read_config,
    read_json,
)
from quantkit.errors import CheckpointError, DownloadError, QuantkitError

# Never fetched: other frameworks' weights, and second copies.
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
    """Whether MODEL names no path but looks like a hub id."""
    path = Path(model).expanduser()
    return (
        not path.exists()
        and not is_gguf(model)
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None
        and not path.parent.is_dir()
    )


def resolve_model(model: str) -> Path:
    """The local directory of MODEL: all of it fetched from the hub when it is a hub id, a
    checkpoint made from it when it is a GGUF file.
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
def _hub_errors(model: str) -> Iterator[None]:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:  # the hub library raises its own, its HTTP client's and the system's
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"there is no directory {model}, and as a hub id it can't be fetched"
            f" ({type(error).__name__}: {reason}); check the name or give a local directory"
        ) from None


def open_hub_model(model: str, download_to: Path | None = None) -> Checkpoint:
    """A hub model opened from its headers: its shards are fetched when they are first read.

    download_to: keep shards there, and only while they are needed (`--stream-download`); None keeps
    them in the hub library's cache. Without a connection, the model must lie in the cache as a
    whole.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with _hub_errors(model):
        try:
            info = HfApi().model_info(model, files_metadata=True)
        except HfHubHTTPError:
            raise  # the hub has answered
        except (
            Exception
        ) as error:  # offline, or no connection: as many kinds as there are ways to be so
            if download_to is not None:
                raise CheckpointError(
                    "--stream-download needs the hub, which can't be reached"
                    f" ({type(error).__name__}); leave it out to use the cache"
                ) from None
            return Checkpoint.open(resolve_model(model))
        small = [
            sibling.rfilename for sibling in info.siblings if _is_small_file(sibling.rfilename)
        ]
        directory = Path(snapshot_download(model, revision=info.sha, allow_patterns=small))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
    index = read_json(directory / INDEX_FILE, "") if (directory / INDEX_FILE).is_file() else None
    names = (
        indexed_shards(directory / INDEX_FILE, index)
        if index
        else sorted(name for name in sizes if _is_shard(name))
    )
    for name in names:
        if name not in sizes:
            raise CheckpointError(
                f"{INDEX_FILE} of {model} names the shard {name}, which the hub doesn't have; tell"
                " its publisher"
            )
    if not names:
        raise CheckpointError(
            f"the hub's {model} has no *.safetensors file; quantkit reads no other"
        )
    target = download_to or directory
    source = HubShards(model, info.sha, target, keep=download_to is None)
    with _hub_errors(model):
        headers = {target / name: source.header(name, sizes[name]) for name in names}
    hashes = {
        sibling.rfilename: getattr(sibling.lfs, "sha256", None) or sibling.blob_id
        for sibling in info.siblings
        if sibling.rfilename in names
    }
    identity = json.dumps([[name, sizes[name], hashes[name]] for name in names])
    return Checkpoint(
        directory,
        read_config(directory),
        merge_headers(directory, headers, index),
        source,
        identity,
    )


def _is_small_file(name: str) -> bool:
    folder, _, leaf = name.rpartition("/")
    if folder not in ("", "additional_chat_templates"):
        return False
    return leaf in ("config.json", INDEX_FILE, *side_files()) or is_carried_over(leaf)


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_")


@dataclass
class HubShards:
    """The shards of one revision of a hub model, for `Checkpoint.source`."""

    model: str
    revision: str
    directory: Path
    keep: bool

    def header(self, name: str, size: int) -> Mapping[str, Any]:
        """A shard's tensors, from its first bytes alone."""
        from huggingface_hub import HfFileSystem

        with HfFileSystem().open(
            f"{self.model}@{self.revision}/{name}", "rb", block_size=1 << 20
        ) as file:
            return parse_header(file, size, self.directory / name)

    def fetch(self, path: Path) -> None:
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
        except (
            Exception
        ) as error:  # as many kinds as for `_hub_errors`; here a part of the work is done
            reason = str(error).strip().split("\n")[0][:200]
            raise DownloadError(
                f"{self.model}'s {path.name} can't be fetched ({type(error).__name__}: {reason});"
                " go on with --resume"
            ) from None

    def release(self, path: Path) -> None:
        if self.keep:
            return
        path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what was fetched and is not kept, and the hub library's notes beside it."""
        if not self.keep:
            shutil.rmtree(self.directory, ignore_errors=True)
