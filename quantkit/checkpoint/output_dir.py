"""Output directories that are complete or absent, and whose unfinished work can be resumed.

An output is made in `OUT.partial`, next to its final path, and renamed after its last file. Until
then, `progress.json` in it records the run's fingerprint and the finished files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import exchange_names, fsync_directory, write_json
from quantkit.checkpoint.finished_output import (
    PROGRESS_FILE,
    manifest_of,
    partial_directory,
    require_same_fingerprint,
    resolved_output,
    unchanged_files,
)
from quantkit.checkpoint.output_checks import check_output
from quantkit.errors import OutputError


class WorkDirectory:
    """A directory of unfinished work.

    Its `progress.json` holds the run's fingerprint and the finished steps. `resume` continues a run
    only if the fingerprint is the same.

    partial: the directory.
    progress: content of progress.json.
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
        self._require_directory_or_nothing()
        if self.partial.exists():
            if resume and self._can_continue(fingerprint, overwrite):
                self._continue()
            elif resume or overwrite:
                shutil.rmtree(self.partial)
            else:
                raise OutputError(
                    f"{self.partial} was left by an interrupted run",
                    hint="continue it with `resume=True`, or start again with `overwrite=True`",
                )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._save()
        except OSError as error:
            raise OutputError(
                f"can't write to {self.partial}: {error.strerror}", hint="choose another `output`"
            ) from None

    def _require_directory_or_nothing(self) -> None:
        if self.partial.is_symlink():
            raise OutputError(
                f"{self.partial} is a link, and nothing is written through it",
                hint="remove it or choose another `output`",
            )
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError(
                f"{self.partial} is a file where a directory has to be made",
                hint="move it, or choose another `output`",
            )

    def _can_continue(self, fingerprint: Mapping[str, str], overwrite: bool) -> bool:
        """Whether an earlier run with this fingerprint has begun.

        Raises OutputError if the directory is from a different run and `overwrite` is False.
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
        # A run that was stopped just before its last rename has the manifest instead of
        # progress.json; it holds the same entries.
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
                f"{self.partial} has no readable progress.json, so it can't be continued",
                hint="start again with `overwrite=True`",
            ) from None
        return progress

    @property
    def done(self) -> dict[str, Any]:
        """The finished steps, of this run and of those that it resumes: name → recorded content."""
        return self.progress["done"]

    def record(self, name: str, content: Any) -> None:
        """Record a finished step durably.

        name: the step.
        content: anything that JSON can hold.
        """
        self.progress["done"][name] = content
        self._save()

    def _save(self) -> None:
        write_json(self._progress_file, self.progress)

    def finished(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The recorded entries of the files that are finished and unchanged.

        The files are read and hashed again.
        """
        recorded = {name: self.done[name] for name in names if name in self.done}
        return {name: recorded[name] for name in unchanged_files(self.partial, recorded)}

    def discard(self) -> None:
        """Remove the directory.

        `progress.json` is removed last, so that a run killed in between can still be resumed.
        """
        for path in self.partial.iterdir():
            if path != self._progress_file:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._progress_file.unlink(missing_ok=True)
        self.partial.rmdir()


class OutputDirectory(WorkDirectory):
    """A directory that gets its name only when it is complete: files are written to `OUT.partial`,
    which `commit` renames to `OUT`.

    reads: paths of the inputs, which the output must neither be nor contain.
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
        self.path = resolved_output(Path(path).expanduser())
        check_output(self.path, overwrite=overwrite, reads=reads)
        super().__init__(
            partial_directory(self.path), fingerprint, resume=resume, overwrite=overwrite
        )

    def commit(self) -> None:
        """Give the finished directory its name.

        If the system can swap names, `OUT` is at every moment either the old directory or the new
        one.
        """
        self._progress_file.unlink()
        fsync_directory(self.partial)
        if not os.path.lexists(self.path):
            os.rename(self.partial, self.path)
        elif not self.path.is_dir():
            raise OutputError(
                f"{self.path} became a file during the run; the result is in {self.partial}: move"
                " it where you want it"
            )
        elif not exchange_names(self.partial, self.path):
            # A new name, so that no directory of the user is removed with the replaced one.
            aside = (
                Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.parent))
                / self.path.name
            )
            os.rename(self.path, aside)
            os.rename(self.partial, self.path)
            shutil.rmtree(aside.parent)
        fsync_directory(self.path.parent)
        if self.partial.exists():
            shutil.rmtree(self.partial)  # the replaced directory
