"""Files written so that they are whole or absent, hashed, and put in each other's place."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3


def new_file(path: Path) -> Any:
    """A file made anew for reading and writing, unbuffered: what lies there under its name, a link
    above all, is removed and not written to.
    """
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
    """A file made anew, flushed. Where the disk fills, nothing of it stays, and the error names
    it.
    """
    try:
        with new_file(path) as file:
            view = memoryview(content)
            while view:
                # a system takes less than all of it, without an error, where that is the last that
                # fits
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
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256_stream(file)
        )


def _sha256_stream(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@cache
def c_function(name: str) -> Any:
    """A function of the C library, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def exchange_names(first: Path, second: Path) -> bool:
    """Exchange two files or directories in one step; False, with nothing done, where this system
    can't (Linux can, on most file systems).
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
    """How many threads can run at once: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
