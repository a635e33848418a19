"""What is written: safetensors files whose header is known before their first byte, and directories
that are whole or absent.

A shard's tensors are put in place in any order, by any thread, and the file is read back from its
beginning while they arrive: what is in it is compared with what was made, and hashed (BLAKE3, which
is several times as fast as SHA-256). Only then is it flushed, given its name and recorded. A
directory takes its name when its last file has. See `reader.py` for the format.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import (
    blake3_file,
    cores,
    exchange_names,
    fsync_directory,
    write_json,
)
from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.units import format_bytes
from quantkit.errors import OutputError

# The first two end a directory: they hold the fingerprint of what made it, and the hash of each
# file.
MANIFEST_FILE, CALIBRATION_FILE, PROGRESS_FILE = (
    "quantkit.json",
    "calibration.json",
    "progress.json",
)


class WorkDirectory:
    """A directory in which something is made. `progress.json` in it keeps the fingerprint of
    everything that decides the bytes, so that `resume` continues only the same work.
    """

    def __init__(
        self,
        partial: Path,
        fingerprint: Mapping[str, str],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.partial = partial
        self._progress_file = self.partial / PROGRESS_FILE
        self.progress: dict[str, Any] = {"fingerprint": dict(fingerprint), "done": {}}
        if self.partial.is_symlink():
            raise OutputError(
                f"{self.partial} is a link; nothing is written through it, so remove it or choose"
                " another -o"
            )
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError(
                f"{self.partial} is a file where a directory has to be made; move it, or choose"
                " another -o"
            )
        if self.partial.exists():
            if resume and self._can_continue(dict(fingerprint), overwrite):
                self._continue()
            elif resume or overwrite:
                shutil.rmtree(self.partial)
            else:
                raise OutputError(
                    f"{self.partial} was left by an interrupted run; continue it with --resume, or"
                    " start again with --overwrite"
                )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._save()
        except OSError as error:
            raise OutputError(
                f"can't write to {self.partial}: {error.strerror}; choose another -o"
            ) from None

    def _can_continue(self, fingerprint: dict[str, str], overwrite: bool) -> bool:
        """Whether there is work of an earlier run to go on with. Raises OutputError where it is
        other work, which only `overwrite` may throw away.
        """
        if all(path.name == f"{PROGRESS_FILE}.tmp" for path in self.partial.iterdir()):
            return False  # stopped before its first step
        try:
            require_same_fingerprint(
                f"{self.partial} was begun", fingerprint, self._earlier()["fingerprint"]
            )
        except OutputError:
            if not overwrite:
                raise
            return False
        return True

    def _continue(self) -> None:
        earlier = self._earlier()
        self.progress = {
            "fingerprint": earlier["fingerprint"],
            "done": earlier["done" if "done" in earlier else "files"],
        }

    def _earlier(self) -> dict[str, Any]:
        # A run that was stopped just before its last rename has the manifest, which says the same,
        # in place of progress.json.
        manifest = manifest_of(self.partial)
        source = (
            self._progress_file if self._progress_file.is_file() or manifest is None else manifest
        )
        try:
            progress = json.loads(source.read_text())
            if not isinstance(progress["fingerprint"], dict) or not isinstance(
                progress["done" if "done" in progress else "files"], dict
            ):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(
                f"{self.partial} has no readable progress.json, so it can't be continued; start"
                " again with --overwrite"
            ) from None
        return progress

    @property
    def done(self) -> dict[str, Any]:
        """What earlier runs finished: file name → what was recorded with it."""
        return self.progress["done"]

    def record(self, name: str, content: Any) -> None:
        self.progress["done"][name] = content
        self._save()

    def _save(self) -> None:
        write_json(self._progress_file, self.progress)

    def finished(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Which of these files earlier runs finished and are still as they were recorded: their
        bytes are read and hashed again.
        """
        recorded = {name: self.done[name] for name in names if name in self.done}
        with ThreadPoolExecutor(cores()) as pool:
            same = pool.map(lambda item: is_as_recorded(self.partial, *item), recorded.items())
        return {name: entry for (name, entry), is_same in zip(recorded.items(), same) if is_same}

    def discard(self) -> None:
        """Remove the directory; `progress.json` last, so that what is left by a kill can be
        continued or is nothing.
        """
        for path in self.partial.iterdir():
            if path != self._progress_file:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._progress_file.unlink(missing_ok=True)
        self.partial.rmdir()


class OutputDirectory(WorkDirectory):
    """A directory that appears under its name only when it is whole: files are made in
    `OUT.partial`, which `commit` renames to `OUT`.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, str],
        *,
        resume: bool = False,
        overwrite: bool = False,
        reads: Iterable[Path] = (),
    ) -> None:
        # Resolved, so that a link to a directory is filled, not replaced.
        self.path = resolved_output(Path(path).expanduser())
        check_output(self.path, overwrite=overwrite, reads=reads)
        super().__init__(
            self.path.with_name(self.path.name + ".partial"),
            fingerprint,
            resume=resume,
            overwrite=overwrite,
        )

    def commit(self) -> None:
        """Put the finished directory in place of `OUT`, which is the old or the new one at every
        moment where the system can exchange names.
        """
        self._progress_file.unlink()
        fsync_directory(self.partial)
        if not os.path.lexists(self.path):
            os.rename(self.partial, self.path)
        elif not self.path.is_dir():
            raise OutputError(
                f"{self.path} has become a file meanwhile; the result is in {self.partial}: move it"
                " where you want it"
            )
        elif not exchange_names(self.partial, self.path):
            # A new name, so that no directory of the user's own is taken for what is replaced.
            aside = (
                Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.parent))
                / self.path.name
            )
            os.rename(self.path, aside)
            os.rename(self.partial, self.path)
            shutil.rmtree(aside.parent)
        fsync_directory(self.path.parent)
        if self.partial.exists():
            shutil.rmtree(self.partial)  # what was replaced


def manifest_of(directory: Path) -> Path | None:
    """The file that says what a finished directory was made from and holds."""
    return next(
        (
            directory / name
            for name in (MANIFEST_FILE, CALIBRATION_FILE)
            if (directory / name).is_file()
        ),
        None,
    )


def require_same_fingerprint(
    what: str, fingerprint: Mapping[str, str], earlier: Mapping[str, str]
) -> None:
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
    is_several = what == "data" or (
        what.partition(" of ")[0].endswith("s") and not what.startswith("--")
    )
    return f"different {what}" if is_several else f"a different {what}"


def changed_tensors(directory: Path) -> frozenset[str]:
    """What algorithms changed of a model, by its manifest: these can't be compared with the
    original's one by one.
    """
    if not (directory / MANIFEST_FILE).is_file():
        return frozenset()
    names = read_json(directory / MANIFEST_FILE, "").get("changed")
    return (
        frozenset(name for name in names if isinstance(name, str))
        if isinstance(names, list)
        else frozenset()
    )


def finished_already(path: Path, fingerprint: Mapping[str, str], overwrite: bool = False) -> bool:
    """Whether a whole output of the same work lies at `path`, each file with the hash that it was
    exported with.

    Raises OutputError where it is of other work or a file has changed; with `overwrite` those are
    just not it.
    """
    path = resolved_output(path)
    partial = path.with_name(path.name + ".partial")
    manifest_file = manifest_of(path)
    if (partial / PROGRESS_FILE).exists() or manifest_file is None:
        return False
    try:
        manifest = read_json(manifest_file, "")
        earlier, files = (manifest.get(key) or {} for key in ("fingerprint", "files"))
        if not isinstance(earlier, dict) or not isinstance(files, dict):
            raise OutputError(f"{manifest_file} is damaged; start again with --overwrite")
        require_same_fingerprint(f"{path} was made", fingerprint, earlier)
        with ThreadPoolExecutor(cores()) as pool:
            same = pool.map(lambda item: is_as_recorded(path, *item), files.items())
        changed = [name for name, is_same in zip(files, same) if not is_same]
        if changed:
            raise OutputError(
                f"{path} was finished, but {changed[0]} has changed since; start again with"
                " --overwrite"
            )
    except OutputError:
        if not overwrite:
            raise
        return False
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)  # what this output replaced, by a run that was stopped right after
    return True


def is_as_recorded(directory: Path, name: str, entry: Any) -> bool:
    """Whether a file has the size and the hash of its entry."""
    path = directory / name
    if not isinstance(entry, Mapping) or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == entry.get("bytes") and blake3_file(path) == entry.get("blake3")


def _is_quantized(path: Path) -> bool:
    try:
        return "quantization_config" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return True  # whatever it is, no runtime loads it


def resolved_output(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise OutputError(f"{path} is a link to itself; choose another -o") from None


def check_output(path: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse an output that exists, or that would replace what is being read."""
    resolved = resolved_output(path)
    for source in reads:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputError(
                f"the output {path} is, or contains, the input {source}; choose another -o"
            )
    if resolved in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(
            f"the output {path} is, or contains, the current directory; name a directory to be made"
        )
    # A device, pipe or socket is neither file nor directory, and must never be put aside for an
    # output.
    if (path.exists() and not path.is_dir()) or (path.is_symlink() and not path.exists()):
        raise OutputError(f"{path} is a file; choose a directory for -o")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(
                f"{path} exists and is not empty; choose another -o or pass --overwrite"
            )
        if not any((path / name).is_file() for name in ("config.json", CALIBRATION_FILE)):
            raise OutputError(
                f"{path} is neither a checkpoint nor a calibration, so --overwrite won't replace"
                " it; choose another -o"
            )
        if (
            any(path.glob("*.safetensors"))
            and not any((path / name).is_file() for name in (CALIBRATION_FILE, MANIFEST_FILE))
            and not _is_quantized(path)
        ):
            raise OutputError(
                f"{path} is a model that is not quantized, so --overwrite won't replace it; choose"
                " another -o"
            )
    # The nearest directory that exists must take new files.
    parent = next(p for p in (path.absolute().parent, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"can't write to {parent}; choose another -o")
    if os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise OutputError(f"{parent} is on a read-only file system; choose another -o")


def check_disk_space(path: Path, needed: int, what: str = "the output") -> None:
    """Refuse before the start what won't fit. What an interrupted run left beside `path` counts as
    room: it is continued or replaced.
    """
    path = resolved_output(path)
    partial = path.with_name(path.name + ".partial")
    if partial.is_dir():
        needed -= sum(file.stat().st_size for file in partial.iterdir() if file.is_file())
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{what} needs {format_bytes(needed)} but {parent} has {format_bytes(free)} free;"
            " choose another -o or make room"
        )
