"""Saving hidden states between two blocks, so that an interrupted run can resume in the middle of a
model.

They are saved in the output's partial directory. Each rank saves those of its batches; any number
of ranks can read them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.files import blake3_file
from quantkit.checkpoint.finished_output import is_as_recorded
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.output_dir import WorkDirectory
from quantkit.checkpoint.run_control import ShouldStop, stop_if_asked
from quantkit.checkpoint.tensor_reader import read_tensor
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates

# The entry of progress.json for saved hidden states.
HIDDEN_STATES = "hidden states"
# Hidden states are saved after this many seconds of work, which a killed run would lose.
SECONDS_BETWEEN_SAVES = 120.0


@dataclass
class SavedStates:
    """The hidden states that one walk through the blocks saves and resumes from.

    ranks: processes of the job.
    should_stop: asked after each block.
    work: the output's directory on rank 0; None on other ranks.
    partial: path of the directory, on all ranks.
    walk: name of this walk, if a run has several.
    last_too: also save after the last block, because slow work follows it.
    saved_at: time of the last save, in seconds of time.monotonic().
    """

    ranks: Ranks
    should_stop: ShouldStop
    work: WorkDirectory | None
    partial: Path
    walk: str = ""
    last_too: bool = False
    saved_at: float = field(default_factory=time.monotonic)

    def restore(
        self,
        states: HiddenStates,
        numbers_after: Callable[[int], Sequence[int]],
        names_after: Callable[[int], Sequence[str]] = lambda block: (),
        put_others: Callable[[Mapping[str, Tensor]], None] = lambda found: None,
    ) -> int:
        """Restore the states that an earlier run saved. Returns the block to begin with, 0 if there
        are none.

        numbers_after: number of the last finished block → batches that are needed.
        names_after: number of the last finished block → other tensors that are needed.
        put_others: takes those other tensors; it is called before any hidden states are put.
        """
        saved = self.ranks.broadcast_from_first(self._saved)
        if saved is None:
            return 0
        numbers, names = numbers_after(saved["block"]), names_after(saved["block"])
        paths = [self.partial / name for name in saved["files"]]
        found = {
            name: info
            for path in paths
            if path.is_file()
            for name, info in read_header(path).items()
        }
        if not all(self.ranks.all_gather(found.keys() >= {*map(str, numbers), *names})):
            return 0
        if names:
            put_others({name: read_tensor(found[name]) for name in names})
        for number in numbers:
            states.put(number, read_tensor(found[str(number)]))
        states.swap()
        return saved["block"] + 1

    @property
    def _opened(self) -> WorkDirectory:
        assert self.work is not None, "only rank 0 reads and writes the directory"
        return self.work

    def _saved(self) -> dict[str, Any] | None:
        """The entry of progress.json for this walk, or None if there is none or its files have
        changed.
        """
        saved = self._opened.done.get(HIDDEN_STATES)
        if saved is None or saved.get("walk", "") != self.walk:
            return None
        return (
            saved
            if all(is_as_recorded(self.partial, *item) for item in saved["files"].items())
            else None
        )

    def stop_or_save(
        self,
        number: int,
        blocks: int,
        states: HiddenStates,
        numbers: Sequence[int] | None = None,
        others: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        """After a block: save if the last save is old, and stop if any rank should stop.

        number, blocks: the finished block, and how many there are.
        numbers: batches to save; None saves all.
        others: returns other tensors to save.

        Raises Interrupted if the run should stop.
        """
        stopping = any(self.ranks.all_gather(self.should_stop()))
        late = self.ranks.broadcast_from_first(
            lambda: time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES
        )
        if (stopping or late) and (self.last_too or number + 1 < blocks):
            self._save(number, states, numbers, others)
            self.saved_at = time.monotonic()
        stop_if_asked(lambda: stopping, f"after block {number + 1} of {blocks}")

    def _save(
        self,
        number: int,
        states: HiddenStates,
        numbers: Sequence[int] | None,
        others: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Save each rank's batches, if all ranks see the same directory, and remove the earlier
        files.
        """
        saved = None
        if self.partial.is_dir():
            walk = f"-{self.walk}" if self.walk else ""
            name = f"hidden-states{walk}-{number:05d}-{self.ranks.rank}.safetensors"
            path = self.partial / name
            states.save(path, numbers, others())
            saved = path.name, {"bytes": path.stat().st_size, "blake3": blake3_file(path)}
        gathered = self.ranks.all_gather(saved)
        if not self.ranks.is_first or None in gathered:
            return
        former = self._opened.done.get(HIDDEN_STATES, {"files": {}})
        files = dict(gathered)
        self._opened.record(HIDDEN_STATES, {"block": number, "walk": self.walk, "files": files})
        for name in former["files"].keys() - files.keys():
            (self.partial / name).unlink(missing_ok=True)
