"""What `sensitivity` keeps beside its output while it runs, in RESULT.json.partial: the scores of
each window, the figures of Linears, and hidden states between blocks.

A walk is one pass of variants through the model. Its scores are sums over the tokens of a window,
so that windows can be scored in any order, by any process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import blake3_file, write_json
from quantkit.checkpoint.finished_output import require_same_fingerprint, resolved_output
from quantkit.checkpoint.interrupts import StopRequest
from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.output_checks import check_disk_space
from quantkit.checkpoint.output_dir import WorkDirectory
from quantkit.errors import CheckpointError, OutputError
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.saved_states import SavedStates

# Of one window, by variant: the sums over its tokens of the KL to the unquantized model, and of the
# losses.
Scores = tuple[list[float], list[float]]
_LAYERS = "layers"


@dataclass(frozen=True)
class KeptScores:
    """work: the directory, on the first rank; partial: its path, on all. Both None where nothing is
    kept.
    """

    ranks: Ranks
    stop: StopRequest
    work: WorkDirectory | None = None
    partial: Path | None = None

    @classmethod
    def open(
        cls,
        ranks: Ranks,
        stop: StopRequest,
        output: Path | None,
        fingerprint: Mapping[str, str],
        resume: bool,
        overwrite: bool,
    ) -> KeptScores:
        """Beside `output`, or nowhere without one. Raises OutputError where an interrupted run has
        left other work there.
        """
        if output is None:
            return cls(ranks, stop)
        partial = partial_of(output)
        # Only rank 0 opens it; other ranks know the path alone.
        work = (
            [WorkDirectory(partial, fingerprint, resume=resume, overwrite=overwrite)]
            if ranks.is_first
            else []
        )
        return cls(ranks, stop, work[0] if work else None, partial)

    def require_room(self, nbytes: int) -> None:
        """Refuse before the start what a disk won't hold. nbytes: of all hidden states between two
        blocks; two copies lie there for a moment.
        """
        if self.partial is not None:
            output = self.partial.with_name(self.partial.name.removesuffix(".partial"))
            self.ranks.broadcast_from_first(
                lambda: check_disk_space(output, 2 * nbytes, "what --resume goes on from")
            )

    # -- Scores.

    def scores(self, walk: str) -> dict[int, Scores]:
        """Of the windows that are done, on every rank."""
        return self.ranks.broadcast_from_first(lambda: self._read(walk))

    def _read(self, walk: str) -> dict[int, Scores]:
        if self.work is None:
            return {}
        names = [name for name in self.work.done if name.startswith(f"scores-{walk}-")]
        found: dict[int, Scores] = {}
        for name in self.work.finished(names):
            content = json.loads((self.work.partial / name).read_text())
            found |= {int(window): (kld, losses) for window, (kld, losses) in content.items()}
        return found

    def add(self, walk: str, found: Mapping[int, Scores], done: int, of: int) -> dict[int, Scores]:
        """Keep what the ranks found; returns it all, and ends (exit 75) where a signal has come.
        done, of: windows that have scores now, and will have.
        """
        shares = self.ranks.all_gather(dict(found))
        merged = {window: share[window] for share in shares for window in share}
        if self.work is not None and merged:
            name = f"scores-{walk}-{min(merged):06d}.json"
            write_json(
                self.work.partial / name, {str(window): merged[window] for window in sorted(merged)}
            )
            path = self.work.partial / name
            self.work.record(name, {"bytes": path.stat().st_size, "blake3": blake3_file(path)})
        stopped = [name for name in self.ranks.all_gather(self.stop.signal_name) if name]
        if stopped and done < of:
            StopRequest(stopped[0]).check(
                f"with {done} of {of} windows scored; what is done is kept"
            )
        return merged

    # -- Figures of Linears, and hidden states.

    def layers(self) -> dict[str, Any] | None:
        """What `keeper` was given last: the figures of a walk, and of how many blocks."""
        return self.ranks.broadcast_from_first(
            lambda: self.work.done.get(_LAYERS) if self.work is not None else None
        )

    def keeper(self, walk: str, figures: Callable[[], Any] | None = None) -> WalkKeeper | None:
        """For `run_variants`. figures: of the Linears, as JSON, which grow from block to block."""
        if self.partial is None:
            return None
        return WalkKeeper(
            SavedStates(self.ranks, self.stop, self.work, self.partial, walk, last_too=True),
            figures,
        )

    def clear(self) -> None:
        """Remove the directory: the result is written."""
        if self.work is not None:
            self.work.discard()


@dataclass(frozen=True)
class WalkKeeper:
    saved: SavedStates
    figures: Callable[[], Any] | None

    def restore(self, states: HiddenStates, numbers_behind: Callable[[int], Sequence[int]]) -> int:
        return self.saved.restore(states, numbers_behind)

    def block_done(
        self, number: int, blocks: int, states: HiddenStates, numbers: Sequence[int]
    ) -> None:
        if self.figures is not None and self.saved.work is not None:
            self.saved.work.record(_LAYERS, {"blocks": number + 1, "figures": self.figures()})
        self.saved.stop_or_save(number, blocks, states, numbers)


def partial_of(output: Path) -> Path:
    output = resolved_output(output)
    return output.with_name(output.name + ".partial")


def finished_result(
    output: Path, fingerprint: Mapping[str, str], overwrite: bool
) -> dict[str, Any] | None:
    """The result that a run of the same work has written, if it has. Raises OutputError where it is
    of other work, which only `overwrite` may replace.
    """
    partial = partial_of(output)
    if (partial / "progress.json").exists() or not output.is_file():
        return None
    try:
        result = read_json(output, "")
        earlier = result["fingerprint"]
        if not isinstance(earlier, dict):
            return None
        require_same_fingerprint(f"{output} was made", fingerprint, earlier)
    except (CheckpointError, KeyError, TypeError):
        return None  # something else, which a run replaces
    except OutputError:
        if not overwrite:
            raise
        return None
    if partial.is_dir() and not partial.is_symlink() and not any(partial.iterdir()):
        partial.rmdir()  # of a run that was stopped right after
    return result
