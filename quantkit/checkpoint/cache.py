"""The user's cache directory: the demo's model, checkpoints converted from GGUF files, and final
hidden states of base models.

Each kind of content has a limit in bytes. When it is reached, the least recently used entries are
removed.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

# In seconds. An entry that was used within a day may be in use by another process.
SECONDS_UNTIL_ABANDONED = 86400.0


def cache_directory() -> Path:
    """$QUANTKIT_CACHE if it is set, else `quantkit` in the user's cache directory."""
    named = os.environ.get("QUANTKIT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"


def make_room(directory: Path, needed: int, most_bytes: int) -> None:
    """Remove the least recently used entries of a cache until `needed` more bytes fit below its
    limit.

    An entry is a subdirectory of `directory`; its modification time is the time of its last use.
    Entries used within a day are kept.

    needed: size of the new entry, in bytes.
    most_bytes: limit of the whole cache, in bytes.
    """
    try:
        sizes = {
            path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            for path in directory.iterdir()
            if path.is_dir()
        }
        used = sorted((path.stat().st_mtime, path) for path in sizes)
    except OSError:
        return  # another process is changing the cache, and makes room itself
    held = sum(sizes.values())
    for used_last, path in used:
        if held + needed > most_bytes and time.time() - used_last > SECONDS_UNTIL_ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
            held -= sizes[path]


def directory_state(path: Path) -> list[tuple[str, int, int]]:
    """The state of a model directory: (name, size in bytes, modification time in ns) of each file.

    Two states differ if a file was changed in place.
    """
    return sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in path.iterdir()
        if file.is_file()
    )
