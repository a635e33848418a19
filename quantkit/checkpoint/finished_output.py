"""A finished output's manifest: the fingerprint of the run that made it, and the hash of each file.

A resumed run compares both before it accepts an existing output as the result of the same run. A
fingerprint maps the name of an input or parameter ("data", "seq_len") to its value or hash. It
covers everything that decides the output's bytes.
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

# The manifests of a checkpoint and of a calibration: fingerprint and file hashes, written last.
MANIFEST_FILE, CALIBRATION_FILE = "quantkit.json", "calibration.json"
PROGRESS_FILE = "progress.json"  # takes the manifest's place in an unfinished output


def resolved_output(path: Path) -> Path:
    """The path with all links resolved: a link to a directory is then filled, not replaced.

    Raises OutputError if the path is a link to itself.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise OutputError(f"{path} is a link to itself", hint="choose another `output`") from None


def partial_directory(output: Path) -> Path:
    """The directory in which an output is made, next to its final path."""
    return output.with_name(output.name + ".partial")


def manifest_of(directory: Path) -> Path | None:
    """The path of a finished output's manifest, or None if it has none."""
    for name in (MANIFEST_FILE, CALIBRATION_FILE):
        if (directory / name).is_file():
            return directory / name
    return None


def require_same_fingerprint(
    what: str, fingerprint: Mapping[str, str], earlier: Mapping[str, str]
) -> None:
    """Raise OutputError if two fingerprints differ.

    what: the beginning of the message, before "with a different …".
    """
    differing = sorted(
        key
        for key in fingerprint.keys() | earlier.keys()
        if fingerprint.get(key) != earlier.get(key)
    )
    if differing:
        raise OutputError(
            f"{what} with {', '.join(map(_different, differing))}",
            hint="use the same, or start again with `overwrite=True`",
        )


def _different(what: str) -> str:
    """An input's name as the message has it: "a different recipe", "different data". Names of
    parameters, such as seq_len, are in backticks.
    """
    if "_" in what:
        return f"a different `{what}`"
    is_several = what == "data" or what.partition(" of ")[0].endswith("s")
    return f"different {what}" if is_several else f"a different {what}"


def is_as_recorded(directory: Path, name: str, entry: Any) -> bool:
    """Whether a file has the size and the BLAKE3 hash that its manifest entry records."""
    path = directory / name
    if not isinstance(entry, Mapping) or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == entry.get("bytes") and blake3_file(path) == entry.get("blake3")


def unchanged_files(directory: Path, entries: Mapping[str, Any]) -> list[str]:
    """The names of the files that are unchanged since the manifest was written.

    entries: file name → manifest entry. The files are read and hashed again, on all cores.
    """
    with ThreadPoolExecutor(cores()) as pool:
        same = pool.map(lambda item: is_as_recorded(directory, *item), entries.items())
        return [name for name, is_same in zip(entries, same) if is_same]


def finished_already(path: Path, fingerprint: Mapping[str, str], overwrite: bool = False) -> bool:
    """Whether `path` holds the complete output of a run with this fingerprint, and no file has
    changed.

    Raises OutputError if the output is from a different run or one of its files has changed. With
    `overwrite` it returns False instead.
    """
    path = resolved_output(path)
    partial = partial_directory(path)
    manifest = manifest_of(path)
    # A run removes progress.json from its partial directory just before it renames that.
    if (partial / PROGRESS_FILE).exists() or manifest is None:
        return False
    try:
        _require_unchanged(path, manifest, fingerprint)
    except OutputError:
        if not overwrite:
            raise
        return False
    if partial.is_dir() and not partial.is_symlink():
        # The directory that this output replaced, if the run was killed before it removed that.
        shutil.rmtree(partial)
    return True


def _require_unchanged(path: Path, manifest: Path, fingerprint: Mapping[str, str]) -> None:
    content = read_json(manifest, "")
    earlier, files = content.get("fingerprint") or {}, content.get("files") or {}
    if not isinstance(earlier, dict) or not isinstance(files, dict):
        raise OutputError(f"{manifest} is damaged", hint="start again with `overwrite=True`")
    require_same_fingerprint(f"{path} was made", fingerprint, earlier)
    same = set(unchanged_files(path, files))
    changed = [name for name in files if name not in same]
    if changed:
        raise OutputError(
            f"{path} was finished, but {changed[0]} has changed since",
            hint="start again with `overwrite=True`",
        )


def changed_tensors(directory: Path) -> frozenset[str]:
    """The names of the tensors that algorithms changed, according to the manifest.

    They can't be compared one by one with the original model's tensors.
    """
    if not (directory / MANIFEST_FILE).is_file():
        return frozenset()
    names = read_json(directory / MANIFEST_FILE, "").get("changed")
    return (
        frozenset(name for name in names if isinstance(name, str))
        if isinstance(names, list)
        else frozenset()
    )
