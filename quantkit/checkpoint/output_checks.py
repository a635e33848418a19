"""Checks of an output path before a run begins: it must not exist, contain the input, be read-only,
or lack disk space.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from quantkit.checkpoint.finished_output import (
    CALIBRATION_FILE,
    MANIFEST_FILE,
    partial_directory,
    resolved_output,
)
from quantkit.checkpoint.units import format_bytes
from quantkit.errors import OutputError


def check_output(path: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Raise OutputError if an output directory can't be written or must not be replaced.

    overwrite: whether an earlier checkpoint or calibration at `path` may be replaced.
    reads: paths of the inputs, which the output must neither be nor contain.
    """
    _require_apart_from_inputs(path, reads)
    # A device, pipe or socket is neither file nor directory. It must never be moved away.
    if (path.exists() and not path.is_dir()) or (path.is_symlink() and not path.exists()):
        raise OutputError(f"{path} is a file", hint="choose a directory for `output`")
    if path.is_dir() and any(path.iterdir()):
        _require_replaceable(path, overwrite)
    _require_writable(path)


def _require_apart_from_inputs(path: Path, reads: Iterable[Path]) -> None:
    resolved = resolved_output(path)
    for source in reads:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(
                f"the output {path} is, or contains, the input {source}",
                hint="choose another `output`",
            )
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(
            f"the output {path} is, or contains, the current directory; name a directory to be made"
        )


def _require_replaceable(path: Path, overwrite: bool) -> None:
    """Raise OutputError unless the directory is quantkit's own output or a quantized checkpoint."""
    if not overwrite:
        raise OutputError(
            f"{path} exists and is not empty",
            hint="choose another `output` or pass `overwrite=True`",
        )
    if not any((path / name).is_file() for name in ("config.json", CALIBRATION_FILE)):
        raise OutputError(
            f"{path} is neither a checkpoint nor a calibration, so `overwrite=True` won't replace"
            " it",
            hint="choose another `output`",
        )
    is_ours = any((path / name).is_file() for name in (CALIBRATION_FILE, MANIFEST_FILE))
    if any(path.glob("*.safetensors")) and not is_ours and not _is_quantized(path):
        raise OutputError(
            f"{path} is a model that is not quantized, so `overwrite=True` won't replace it",
            hint="choose another `output`",
        )


def _is_quantized(path: Path) -> bool:
    try:
        return "quantization_config" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return True  # without a readable config.json, nothing can load it as a model


def _require_writable(path: Path) -> None:
    """Raise OutputError unless the nearest existing directory accepts new files."""
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"can't write to {parent}", hint="choose another `output`")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise OutputError(f"{parent} is on a read-only file system", hint="choose another `output`")


def check_disk_space(path: Path, needed: int, what: str = "the output") -> None:
    """Raise OutputError if an output won't fit on its disk.

    needed: size of the whole output, in bytes. Files of an interrupted run count as free space,
        because they are continued or replaced.
    what: subject of the message.
    """
    path = resolved_output(path)
    partial = partial_directory(path)
    if partial.is_dir():
        needed -= sum(file.stat().st_size for file in partial.iterdir() if file.is_file())
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{what} needs {format_bytes(needed)} but {parent} has {format_bytes(free)} free",
            hint="choose another `output` or make room",
        )
