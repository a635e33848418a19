"""Compute the scores of all tokens from final hidden states: each rank scores its windows, a few
positions at a time on each thread; then the scores of all ranks are gathered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from quantkit.checkpoint.run_control import Progress, silent
from quantkit.data.windows import Window
from quantkit.errors import EvaluationError
from quantkit.evaluation.final_hidden_states import FinalHiddenStates
from quantkit.evaluation.logits import POSITIONS_PER_CHUNK, OutputHead, score, score_pair
from quantkit.evaluation.token_scores import PairedScores, Scores, TokenScores, joined
from quantkit.models.distributed import Ranks
from quantkit.models.threads import denormals_as_zero, each_batch

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ModelOutput:
    """The parts of a model that scoring needs.

    head: its output head.
    states: its final hidden states over this rank's windows.
    """

    head: OutputHead
    states: FinalHiddenStates


@dataclass(frozen=True)
class Scored(Generic[Scores]):
    """Scores of the windows of all ranks.

    tokens: the scores, in the order of the windows.
    seconds: time of the slowest rank.
    """

    tokens: Scores
    seconds: float


@dataclass(frozen=True)
class Scoring:
    """Scores this rank's windows and gathers the scores of all ranks.

    ranks: the processes that share the windows.
    windows: this rank's windows, by number.
    progress: told after each step.
    step: positions that are scored at a time.
    """

    ranks: Ranks
    windows: Mapping[int, Window]
    progress: Progress = silent
    step: int = POSITIONS_PER_CHUNK

    def base(self, base: ModelOutput) -> Scored[TokenScores]:
        """Score the base model alone. Raises EvaluationError if a score isn't finite."""
        return self._all(
            lambda number, part, targets: score(
                base.head, self._hidden(base, number, part), targets
            )
        )

    def pair(self, base: ModelOutput, quant: ModelOutput) -> Scored[PairedScores]:
        """Score base and quantized model. Raises EvaluationError if a score isn't finite."""
        return self._all(
            lambda number, part, targets: score_pair(
                base.head,
                self._hidden(base, number, part),
                targets,
                quant.head,
                self._hidden(quant, number, part),
            )
        )

    def _hidden(self, model: ModelOutput, number: int, part: slice) -> Tensor:
        return model.states.scored(number)[part].to(self.ranks.device)

    def _all(self, score_part: Callable[[int, slice, Tensor], Scores]) -> Scored[Scores]:
        """score_part: scores some positions, from the window's number, a slice of its scored
        positions, and their true tokens, [positions].
        """
        started, device = time.perf_counter(), torch.device(self.ranks.device)
        pieces = [
            (number, slice(start, start + self.step))
            for number, window in self.windows.items()
            for start in range(0, window.scored, self.step)
        ]

        def work(index: int) -> Scores:
            number, part = pieces[index]
            window = self.windows[number]
            targets = torch.tensor(window.tokens[window.first_scored :][part], device=device)
            return _finite(lambda: score_part(number, part, targets), number)

        by_window: dict[int, list[Scores]] = {}
        found = each_batch(work, range(len(pieces)), device, torch.get_num_threads())
        with closing(found):
            for done, (scores, (number, _)) in enumerate(zip(found, pieces), 1):
                by_window.setdefault(number, []).append(scores)
                self.progress("logits", done, len(pieces))
        shares = self.ranks.all_gather(
            {number: joined(parts) for number, parts in by_window.items()}
        )
        merged = {number: scores for share in shares for number, scores in share.items()}
        tokens = joined([merged[number] for number in sorted(merged)])
        return Scored(tokens, self.largest(time.perf_counter() - started))

    def largest(self, value: Number) -> Number:
        """The largest of all ranks' values."""
        return max(self.ranks.all_gather(value))


def _finite(work: Callable[[], Scores], number: int) -> Scores:
    """work(); raises EvaluationError if a score of this window isn't finite."""
    with denormals_as_zero():  # probabilities below 1e-38 don't matter
        scores = work()
    if scores.nonfinite:
        raise EvaluationError(
            f"the logits of window {number + 1} are not finite, first after the output head",
            hint="`quantkit.verify` checks the files",
        )
    return scores
