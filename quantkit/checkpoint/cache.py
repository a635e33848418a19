"""What is kept between runs, in the user's cache directory: the demo's model, checkpoints made of
GGUF files, and the final hidden states of bases that were judged.

Hidden states are kept under a hash of everything that decides them. A file counts only with its
description beside it, which is written last and holds the file's hash: what was cut short or
damaged is made again. Together they stay below a limit; those that weren't used for longest go
first.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

SECONDS_UNTIL_ABANDONED = 86400.0


def cache_directory() -> Path:
    """$QUANTKIT_CACHE, else quantkit in the user's cache directory."""
    named = os.environ.get("QUANTKIT_CACHE")
    return (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
    )


def make_room(directory: Path, needed: int, most_bytes: int) -> None:
    """Remove what was used longest ago of the directories in `directory` until so many bytes more
    stay below the limit; nothing that was used within a day.

    A directory's time says when it was used last.
    """
    try:
        sizes = {
            path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            for path in directory.iterdir()
            if path.is_dir()
        }
        used = sorted((path.stat().st_mtime, path) for path in sizes)
    except OSError:
        return  # another process is writing there, and will make room
    held = sum(sizes.values())
    for used_last, path in used:
        if held + needed > most_bytes and time.time() - used_last > SECONDS_UNTIL_ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
            held -= sizes[path]


def directory_state(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a model: a file that was changed in place has another
    time.
    """
    return sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in path.iterdir()
        if file.is_file()
    )
