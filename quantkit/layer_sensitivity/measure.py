"""Metrics of variants of a model. All variants run over the windows together, and each is compared
with the unquantized model. The ranks share the windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from quantkit.checkpoint.run_control import Progress
from quantkit.errors import EvaluationError
from quantkit.evaluation.intervals import paired_interval, perplexity_change_pct
from quantkit.evaluation.logits import POSITIONS_PER_CHUNK, OutputHead, score_variants
from quantkit.layer_sensitivity.base_model import open_base_model
from quantkit.layer_sensitivity.choices import Choices
from quantkit.layer_sensitivity.layer_groups import LayerGroup
from quantkit.layer_sensitivity.layer_sqnr import LayerSqnr
from quantkit.layer_sensitivity.layer_swap import LayerSwapper, Perturbation
from quantkit.layer_sensitivity.options import SensitivityOptions
from quantkit.layer_sensitivity.progress import ComparedLayers, ResumeState, WindowScores
from quantkit.layer_sensitivity.result import VariantMetrics
from quantkit.layer_sensitivity.scoring_text import ScoringText
from quantkit.layer_sensitivity.streams import Variant, count_block_runs
from quantkit.layer_sensitivity.variants import VariantStates, run_variants
from quantkit.models.distributed import Ranks
from quantkit.models.threads import denormals_as_zero, each_batch

VARIANTS_AT_ONCE = 16  # that one thread scores together

Label = TypeVar("Label")


@dataclass
class VariantScorer:
    """Scores variants, in one or more walks.

    block_runs: how often blocks ran over all windows.
    block_runs_without_sharing: how often they would have, if each variant had run alone.
    """

    options: SensitivityOptions
    choices: Choices
    text: ScoringText
    ranks: Ranks
    resume_state: ResumeState
    progress: Progress
    block_runs: int = 0
    block_runs_without_sharing: int = 0

    def measure(
        self,
        name: str,
        places: Sequence[LayerGroup | Perturbation],
        variants: Mapping[Label, Variant],
        blocks: int,
        sqnr: LayerSqnr | None = None,
    ) -> dict[Label, VariantMetrics]:
        """Compare each variant with the first one, which is the unquantized model.

        name: of this walk, for progress and resume state.
        places: the groups and perturbations that a variant has choices for.
        variants: by label.
        blocks: how many the model has.
        sqnr: measures single Linears in the same walk, or None.
        """
        distinct = list(variants.values())
        block_of = [place.block for place in places]
        self.block_runs += count_block_runs(distinct, block_of, blocks)
        self.block_runs_without_sharing += len(distinct) * blocks
        walk = f"{name}-{hashlib.sha256(repr(distinct).encode()).hexdigest()[:12]}"
        scores = self.resume_state.scores(walk)
        windows = range(len(self.text.windows.windows))
        missing = [window for window in windows if window not in scores]
        if missing:
            scores |= self._run(name, walk, places, distinct, missing, sqnr)
        metrics = self.ranks.broadcast_from_first(
            lambda: _metrics(
                [scores[window] for window in windows],
                np.array([window.scored for window in self.text.windows.windows]),
            )
        )
        return dict(zip(variants, metrics))

    def _run(
        self,
        name: str,
        walk: str,
        places: Sequence[LayerGroup | Perturbation],
        variants: Sequence[Variant],
        windows: Sequence[int],
        sqnr: LayerSqnr | None,
    ) -> dict[int, WindowScores]:
        """Run the variants over these windows, which the ranks share, and score them."""
        base = open_base_model(
            self.choices.recipe, self.options.trust_remote_code, self.ranks.device
        )
        blocks, mine = base.blocks, windows[self.ranks.rank :: self.ranks.count]
        positions = sum(self.text.inputs(window).numel() for window in windows)
        self.resume_state.require_room(
            len(variants)
            * positions
            * blocks.model.config.get_text_config().hidden_size
            * blocks.states_dtype.itemsize
        )
        swapper = LayerSwapper(base, self.choices, places, sqnr)

        def before_block(number: int, block: nn.Module, run: Callable[[int], object]) -> None:
            if sqnr is not None:
                sqnr.sample(base, number, block, run, mine)

        def after_block(number: int) -> None:
            if sqnr is not None:
                self.resume_state.record_layers(ComparedLayers(number + 1, sqnr.by_place()))
            self.resume_state.stop_where_nothing_is_saved(number, blocks.block_count)

        states = run_variants(
            blocks,
            {window: self.text.inputs(window) for window in mine},
            variants,
            [place.block for place in places],
            swapper.swaps,
            windows=len(self.text.windows.windows),
            saved=self.resume_state.saved_states(walk, self.text.task),
            before_block=before_block,
            after_block=after_block,
            on_progress=lambda done, total: self.progress(name, done, total),
        )
        try:
            head = OutputHead.of(blocks.model, True)
            return self._score(walk, head, states, windows, len(variants))
        finally:
            states.close()

    # -- Final hidden states to scores.

    def _score(
        self,
        walk: str,
        head: OutputHead,
        states: VariantStates,
        windows: Sequence[int],
        variants: int,
    ) -> dict[int, WindowScores]:
        """Score the windows in rounds, and store the scores after each round.

        In each round, every rank has a few windows, so that all its threads have work.
        """
        ranks, of = self.ranks, len(self.text.windows.windows)
        longest = max(self.text.windows.windows[window].scored for window in windows)
        pieces = -(-longest // POSITIONS_PER_CHUNK) * -(-variants // VARIANTS_AT_ONCE)
        each = (
            ranks.broadcast_from_first(lambda: -(-torch.get_num_threads() // pieces)) * ranks.count
        )
        scores: dict[int, WindowScores] = {}
        for start in range(0, len(windows), each):
            mine = windows[start + ranks.rank : start + each : ranks.count]
            done = min(start + each, len(windows))
            found = self._scores_of(head, states, mine, variants)
            scores |= self.resume_state.add(walk, found, of - len(windows) + done, of)
            self.progress("logits", done, len(windows))
        return scores

    def _scores_of(
        self, head: OutputHead, states: VariantStates, windows: Iterable[int], variants: int
    ) -> dict[int, WindowScores]:
        device = torch.device(self.ranks.device)
        batches = [
            range(first, min(first + VARIANTS_AT_ONCE, variants))
            for first in range(0, variants, VARIANTS_AT_ONCE)
        ]
        pieces = [
            (number, start, batch)
            for number in windows
            for start in range(0, self.text.windows.windows[number].scored, POSITIONS_PER_CHUNK)
            for batch in batches
        ]

        def work(index: int) -> list[tuple[np.ndarray, np.ndarray]]:
            number, start, batch = pieces[index]
            part = slice(start, start + POSITIONS_PER_CHUNK)
            base, *hidden = (
                self.text.scored(states.get(variant, number), number)[part].to(device)
                for variant in (0, *batch)
            )
            with denormals_as_zero():  # probabilities below 1e-38 don't matter
                return score_variants(
                    head, base, self.text.targets(number)[part].to(device), hidden
                )

        scores = {number: WindowScores([0.0] * variants, [0.0] * variants) for number in windows}
        results = each_batch(work, range(len(pieces)), device, torch.get_num_threads())
        with closing(results):
            for index, found in enumerate(results):
                number, _, batch = pieces[index]
                for variant, (kld, losses) in zip(batch, found):
                    scores[number].kld[variant] += float(kld.sum(dtype=np.float64))
                    scores[number].losses[variant] += float(losses.sum(dtype=np.float64))
        if not all(np.isfinite([each.kld, each.losses]).all() for each in scores.values()):
            raise EvaluationError(
                f"{self.options.model} gives logits that are not finite on this text",
                hint=f"`quantkit.verify({str(self.options.model)!r})` checks its files",
            )
        return scores


def _metrics(scores: Sequence[WindowScores], counts: np.ndarray) -> list[VariantMetrics]:
    """The metrics by variant. scores: of all windows. counts: scored tokens of each window."""
    # [variants, windows]
    kld = np.array([each.kld for each in scores]).T
    losses = np.array([each.losses for each in scores]).T
    return [
        VariantMetrics.of(
            paired_interval(kld[variant], counts),
            perplexity_change_pct(losses[variant] - losses[0], counts),
        )
        for variant in range(len(kld))
    ]
