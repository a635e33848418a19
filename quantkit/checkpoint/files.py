"""Writing a file completely or not at all; hashes of files; swapping two names."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import sys
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

from blake3 import blake3


def new_file(path: Path) -> FileIO:
    """Open a new file for reading and writing, unbuffered.

    An existing file of this name is removed first, so that nothing is written through a link.
    """
    path.unlink(missing_ok=True)
    return open(path, "x+b", buffering=0)


def finite(content: Any) -> Any:
    """The same content in a form that JSON can hold: NaN and infinity become None (null)."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file durably (fsync) and atomically (rename)."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold only as an escape
        text = json.dumps(content, indent=2) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file durably and atomically. A device or a pipe is written to, not replaced."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + ".tmp")
    write_bytes(partial, text.encode())
    os.replace(partial, path)
    fsync_directory(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a new file and flush it to disk.

    On failure the file is removed, and the OSError names it.
    """
    try:
        with new_file(path) as file:
            view = memoryview(content)
            while view:
                # On a nearly full disk, the system may write only a part, without an error.
                view = view[file.write(view) :]
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
    """A file's SHA-256 hash, as `sha256sum` prints it."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@cache
def c_function(name: str) -> Any:
    """A function of the C library, or None if it has no such function."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def exchange_names(first: Path, second: Path) -> bool:
    """Swap the names of two files or directories in one step.

    Returns False, with nothing done, if the system can't; Linux can on most file systems.
    """
    function, current_directory, rename_exchange = c_function("renameat2"), -100, 2
    if function is None or sys.platform != "linux":
        return False
    return (
        function(
            current_directory,
            os.fsencode(first),
            current_directory,
            os.fsencode(second),
            ctypes.c_uint(rename_exchange),
        )
        == 0
    )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
