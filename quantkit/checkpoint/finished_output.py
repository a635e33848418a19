"""What a finished output says about itself: the fingerprint of the work that made it, and the hash
of each file. `--resume` compares both before it takes an output for the result of the same work.

A fingerprint is a mapping from the name of an input or option ("data", "--seq-len") to its value or
hash. It covers everything that decides the output's bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import blake3_file, cores
from quantkit.checkpoint.model_files import read_json
from quantkit.errors import OutputError

# The manifest of a checkpoint, and of a calibration: written last, with the fingerprint and hashes.
MANIFEST_FILE, CALIBRATION_FILE = "quantkit.json", "calibration.json"
PROGRESS_FILE = "progress.json"  # in a directory of unfinished work, in place of the manifest


def resolved_output(path: Path) -> Path:
    """The path without links, so that a link to a directory is filled and not replaced."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise OutputError(f"{path} is a link to itself; choose another -o") from None


def partial_directory(output: Path) -> Path:
    """Where an output is made, next to its final place."""
    return output.with_name(output.name + ".partial")


def manifest_of(directory: Path) -> Path | None:
    """The manifest of a finished output, or None where there is none."""
    for name in (MANIFEST_FILE, CALIBRATION_FILE):
        if (directory / name).is_file():
            return directory / name
    return None


def require_same_fingerprint(
    what: str, fingerprint: Mapping[str, str], earlier: Mapping[str, str]
) -> None:
    """Raise OutputError where two fingerprints differ.

    what: how the sentence begins, up to "with a different …".
    """
    differing = sorted(
        key
        for key in fingerprint.keys() | earlier.keys()
        if fingerprint.get(key) != earlier.get(key)
    )
    if differing:
        raise OutputError(
            f"{what} with {', '.join(map(_different, differing))}; use the same, or start again"
            " with --overwrite"
        )


def _different(what: str) -> str:
    """An input's name in the sentence: "a different recipe", "different data"."""
    is_several = what == "data" or (
        what.partition(" of ")[0].endswith("s") and not what.startswith("--")
    )
    return f"different {what}" if is_several else f"a different {what}"


def is_as_recorded(directory: Path, name: str, entry: Any) -> bool:
    """Whether a file has the size and the BLAKE3 hash of its entry in a manifest."""
    path = directory / name
    if not isinstance(entry, Mapping) or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == entry.get("bytes") and blake3_file(path) == entry.get("blake3")


def unchanged_files(directory: Path, entries: Mapping[str, Any]) -> list[str]:
    """The names of those files that are as recorded. Their bytes are read and hashed again, on all
    cores.
    """
    with ThreadPoolExecutor(cores()) as pool:
        same = pool.map(lambda item: is_as_recorded(directory, *item), entries.items())
        return [name for name, is_same in zip(entries, same) if is_same]


def finished_already(path: Path, fingerprint: Mapping[str, str], overwrite: bool = False) -> bool:
    """Whether `path` holds the whole output of the same work, with every file as it was recorded.

    Raises OutputError where the output is of other work or one of its files has changed; with
    `overwrite` it returns False instead.
    """
    path = resolved_output(path)
    partial = partial_directory(path)
    manifest = manifest_of(path)
    # A run that made its output under `partial` removes progress.json there just before the end.
    if (partial / PROGRESS_FILE).exists() or manifest is None:
        return False
    try:
        _require_unchanged(path, manifest, fingerprint)
    except OutputError:
        if not overwrite:
            raise
        return False
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(
            partial
        )  # the directory that this output replaced, if its run was killed then
    return True


def _require_unchanged(path: Path, manifest: Path, fingerprint: Mapping[str, str]) -> None:
    content = read_json(manifest, "")
    earlier, files = content.get("fingerprint") or {}, content.get("files") or {}
    if not isinstance(earlier, dict) or not isinstance(files, dict):
        raise OutputError(f"{manifest} is damaged; start again with --overwrite")
    require_same_fingerprint(f"{path} was made", fingerprint, earlier)
    same = set(unchanged_files(path, files))
    changed = [name for name in files if name not in same]
    if changed:
        raise OutputError(
            f"{path} was finished, but {changed[0]} has changed since; start again with --overwrite"
        )


def changed_tensors(directory: Path) -> frozenset[str]:
    """The tensors that algorithms changed, according to the manifest. They can't be compared one by
    one with the original model's.
    """
    if not (directory / MANIFEST_FILE).is_file():
        return frozenset()
    names = read_json(directory / MANIFEST_FILE, "").get("changed")
    return (
        frozenset(name for name in names if isinstance(name, str))
        if isinstance(names, list)
        else frozenset()
    )
