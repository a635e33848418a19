"""The resume state of `sensitivity`: the scores of each window, the SQNRs of single Linears, and
hidden states between blocks. It is stored next to the output, in RESULT.json.partial.

A walk is one pass of variants through the model. Its scores are sums over the tokens of a window,
so that windows can be scored in any order, by any process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.checkpoint.files import blake3_file, write_json
from quantkit.checkpoint.finished_output import require_same_fingerprint, resolved_output
from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.output_checks import check_disk_space
from quantkit.checkpoint.output_dir import WorkDirectory
from quantkit.checkpoint.run_control import ShouldStop, stop_if_asked
from quantkit.errors import CheckpointError, OutputError, RecipeError
from quantkit.evaluation.json_values import from_json, to_json
from quantkit.layer_sensitivity.result import LinearSqnr, Sensitivity
from quantkit.models.distributed import Ranks
from quantkit.models.saved_states import SavedStates
from quantkit.models.task import SEQ2SEQ

_LAYERS = "layers"


@dataclass(frozen=True)
class WindowScores:
    """The scores of one window, by variant: sums over its tokens.

    kld: of the KL to the unquantized model, in nats.
    losses: of −log p of the tokens, in nats.
    """

    kld: list[float]
    losses: list[float]


@dataclass(frozen=True)
class ComparedLayers:
    """The SQNRs of single Linears, as far as a walk has come.

    blocks: how many blocks are compared.
    by_place: the SQNRs of their Linears, by the place of the group.
    """

    blocks: int = 0
    by_place: Mapping[int, Sequence[LinearSqnr]] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumeState:
    """The directory of the resume state. It is None where nothing is stored.

    should_stop: asked after each block, and after each round of scored windows.
    work: the directory, on rank 0.
    partial: its path, on all ranks.
    """

    ranks: Ranks
    should_stop: ShouldStop
    work: WorkDirectory | None = None
    partial: Path | None = None

    @classmethod
    def open(
        cls,
        ranks: Ranks,
        should_stop: ShouldStop,
        output: Path | None,
        fingerprint: Mapping[str, str],
        resume: bool,
        overwrite: bool,
    ) -> ResumeState:
        """Next to `output`, or nowhere without one.

        Raises OutputError if the resume state of other work is stored there.
        """
        if output is None:
            return cls(ranks, should_stop)
        partial, work = partial_of(output), None
        if ranks.is_first:
            work = WorkDirectory(partial, fingerprint, resume=resume, overwrite=overwrite)
        return cls(ranks, should_stop, work, partial)

    def require_room(self, nbytes: int) -> None:
        """Raises OutputError if the disk can't hold the resume state.

        nbytes: of all hidden states between two blocks. For a moment there are two copies.
        """
        if self.partial is not None:
            output = self.partial.with_name(self.partial.name.removesuffix(".partial"))
            self.ranks.broadcast_from_first(
                lambda: check_disk_space(output, 2 * nbytes, "the resume state")
            )

    # -- Scores.

    def scores(self, walk: str) -> dict[int, WindowScores]:
        """Of the windows that are done, on every rank."""
        return self.ranks.broadcast_from_first(lambda: self._read(walk))

    def _read(self, walk: str) -> dict[int, WindowScores]:
        if self.work is None:
            return {}
        names = [name for name in self.work.done if name.startswith(f"scores-{walk}-")]
        found: dict[int, WindowScores] = {}
        for name in self.work.finished(names):
            content = json.loads((self.work.partial / name).read_text())
            found |= {int(window): WindowScores(*sums) for window, sums in content.items()}
        return found

    def add(
        self, walk: str, found: Mapping[int, WindowScores], done: int, of: int
    ) -> dict[int, WindowScores]:
        """Store the scores that all ranks found, and return them.

        done: windows that have scores now. of: windows in all.
        Raises Interrupted if the run should stop.
        """
        shares = self.ranks.all_gather(dict(found))
        merged = {window: share[window] for share in shares for window in share}
        if self.work is not None and merged:
            name = f"scores-{walk}-{min(merged):06d}.json"
            path = self.work.partial / name
            sums = {window: [scores.kld, scores.losses] for window, scores in merged.items()}
            write_json(path, {str(window): sums[window] for window in sorted(sums)})
            self.work.record(name, {"bytes": path.stat().st_size, "blake3": blake3_file(path)})
        stopping = any(self.ranks.all_gather(self.should_stop()))
        stop_if_asked(
            lambda: stopping and done < of,
            f"with {done} of {of} windows scored",
            can_resume=self.partial is not None,
        )
        return merged

    # -- Single Linears, and hidden states.

    def layers(self) -> ComparedLayers:
        """What `record_layers` stored last; of no block if it didn't."""
        return self.ranks.broadcast_from_first(self._read_layers)

    def _read_layers(self) -> ComparedLayers:
        if self.work is None or _LAYERS not in self.work.done:
            return ComparedLayers()
        content = self.work.done[_LAYERS]
        by_place = from_json(Mapping[str, tuple[LinearSqnr, ...]], content["figures"])
        return ComparedLayers(
            content["blocks"], {int(place): linears for place, linears in by_place.items()}
        )

    def record_layers(self, layers: ComparedLayers) -> None:
        if self.work is not None:
            content = {"blocks": layers.blocks, "figures": to_json(layers.by_place)}
            self.work.record(_LAYERS, content)

    def saved_states(self, walk: str, task: str) -> SavedStates | None:
        """The hidden states of a walk, for a later run; None where nothing is stored.

        The output of the last block is saved too, because scoring comes after it. Not so in a model
        of encoder and decoder, which has to run a block to be finished.
        """
        if self.partial is None:
            return None
        last_too = task != SEQ2SEQ
        return SavedStates(self.ranks, self.should_stop, self.work, self.partial, walk, last_too)

    def stop_where_nothing_is_saved(self, number: int, blocks: int) -> None:
        """After a block, raise Interrupted if the run should stop and hidden states are not saved.
        Where they are, `SavedStates.stop_or_save` stops it.
        """
        if self.partial is None:
            stopping = any(self.ranks.all_gather(self.should_stop()))
            stop_if_asked(
                lambda: stopping, f"after block {number + 1} of {blocks}", can_resume=False
            )

    def clear(self) -> None:
        """Remove the directory, after the result is written."""
        if self.work is not None:
            self.work.discard()


def partial_of(output: Path) -> Path:
    output = resolved_output(output)
    return output.with_name(output.name + ".partial")


def finished_result(
    output: Path, fingerprint: Mapping[str, str], overwrite: bool
) -> Sensitivity | None:
    """The result that an earlier run of the same work has written, or None.

    Raises OutputError if the file is the result of other work, unless overwrite is given.
    """
    partial = partial_of(output)
    if (partial / "progress.json").exists() or not output.is_file():
        return None
    try:
        content = read_json(output, "")
        earlier = content["fingerprint"]
        if not isinstance(earlier, dict):
            return None
        require_same_fingerprint(f"{output} was made", fingerprint, earlier)
        result = Sensitivity.from_json(content)
    except (CheckpointError, RecipeError, KeyError, TypeError, ValueError, AttributeError):
        return None  # Another file, which this run replaces.
    except OutputError:
        if not overwrite:
            raise
        return None
    if partial.is_dir() and not partial.is_symlink() and not any(partial.iterdir()):
        partial.rmdir()  # The run was stopped before it removed its directory.
    return result
