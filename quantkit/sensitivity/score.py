"""`sensitivity`: what each set of Linears costs by being quantized, and which of them a budget
should spare.

A set is what a runtime computes as one, and what can't be split: q/k/v, gate/up, each other Linear
by itself, all experts of a layer. For each, the model runs with only this set quantized, and
KL(model‖variant) over some text is what it costs. Weights are quantized as `export` does and inputs
as a server does. Errors of different sets are nearly independent, so that their KLs nearly add; how
nearly is measured, and a budget is solved on the sums.

KLs this small contain what any change at that place would cause, because it makes later roundings
to the model's dtype fall otherwise: a floor, measured by nudging single roundings, which is
subtracted. The sums of what is left are compared with the KL of the whole.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit import __version__
from quantkit.checkpoint.files import finite, write_json
from quantkit.checkpoint.interrupts import StopRequest, stop_between_steps
from quantkit.data.windows import (
    BUNDLED_CALIBRATION,
    Windows,
    calibration_windows,
    load_tokenizer,
    window_length,
)
from quantkit.errors import EvaluationError
from quantkit.evaluation.intervals import paired_interval, perplexity_change_pct
from quantkit.models.distributed import Ranks, joined_ranks
from quantkit.models.hidden_states import peak_memory_bytes
from quantkit.models.skeleton import auto_config, pick_device
from quantkit.ops.native import cpu_level
from quantkit.sensitivity.advice import (
    RECIPE,
    SCHEMA_VERSION,
    additivity,
    pareto_lines,
    ranking,
    set_name,
    solve,
)
from quantkit.sensitivity.options import (
    Choices,
    LinearSet,
    SensitivityOptions,
    linear_sets,
    open_choices,
)
from quantkit.sensitivity.progress import KeptScores, Scores, finished_result

if TYPE_CHECKING:
    from quantkit.evaluation.logits import OutputHead
    from quantkit.sensitivity.layer_swap import SetInstaller
    from quantkit.sensitivity.variants import Variant, VariantStates

RESTORED = 10  # sets that are restored, each alone, in an otherwise quantized model
FLOORS = 8  # blocks in which the floor is measured, evenly spread
# Several windows, so that there are intervals; long enough for attention to have something to look
# at.
DEFAULT_LENGTH = 256
VARIANTS_AT_ONCE = 16  # in one piece of scoring
# What is said of a run, and isn't written: it differs from one run to the next.
OF_THE_RUN = ("seconds", "peak_memory_bytes", "was_finished")


# on_progress(what, done, total)
Progress = Callable[[str, float, float], None]


# ---- Scoring.


def score_sensitivity(
    options: SensitivityOptions, on_progress: Progress = lambda name, done, total: None
) -> dict[str, Any]:
    """The result as JSON: sets with their KLs, the whole, and a budget's solution where one is
    asked for. With torchrun the ranks share the windows, and each returns it.
    """
    started = time.monotonic()
    if options.max_kld is not None and not options.max_kld > 0:
        raise EvaluationError("--max-kld must be more than 0")
    if options.resume and not options.keeps:
        raise EvaluationError(
            "--resume continues what lies beside the result; give the same -o FILE as before"
        )
    with joined_ranks(pick_device(options.device)) as ranks:
        choices, remarks = ranks.after_first(lambda: open_choices(options))
        windows, seq_len = ranks.first_decides(lambda: _windows(options, ranks.count))
        fingerprint = ranks.first_decides(
            lambda: _fingerprint(options, choices, windows, seq_len, ranks.device)
        )
        budget = {
            "--max-size": str(options.max_size or ""),
            "--max-kld": str(options.max_kld or ""),
        }
        finished = ranks.first_decides(
            lambda: (
                finished_result(options.output, fingerprint | budget, options.overwrite)
                if options.resume
                else None
            )
        )
        if finished is not None:
            return finished | {"was_finished": True}
        with stop_between_steps() if options.keeps else nullcontext(StopRequest()) as stop:
            kept = _opened_scores(options, ranks, stop, fingerprint)
            described = _described(options, choices, windows, seq_len) | {
                "fingerprint": fingerprint | budget
            }
            result = finite(
                described | _scored(options, choices, windows, ranks, kept, on_progress)
            )
            result["remarks"] = remarks + result["remarks"]
            if options.output is not None and ranks.is_first:
                write_json(options.output, result)
            kept.clear()
    return result | {
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _opened_scores(
    options: SensitivityOptions, ranks: Ranks, stop: StopRequest, fingerprint: Mapping[str, str]
) -> KeptScores:
    output = options.output if options.keeps else None
    return ranks.after_first(
        lambda: KeptScores.open(ranks, stop, output, fingerprint, options.resume, options.overwrite)
    )


def _fingerprint(
    options: SensitivityOptions, choices: Choices, windows: Windows, seq_len: int, device: str
) -> dict[str, str]:
    """All that decides the scores; a budget doesn't."""
    import torch
    import transformers

    kind = device.split(":")[0]
    plan = choices.plans[1].fingerprint
    return {
        "model files": plan["model"],
        "recipe": options.recipe.canonical(),
        "calibration": plan["calibration"],
        "alternatives": " ".join(sorted(choices.allowed)),
        "data": windows.data_sha256,
        "--max-tokens": str(options.max_tokens),
        "--seq-len": str(seq_len),
        "windows": windows.tokens_sha256,
        "seed": str(options.seed),
        "device": (
            f"{kind} {torch.backends.cpu.get_cpu_capability()}"
            if kind == "cpu"
            else f"{kind} {torch.cuda.get_device_name(device)}"
        ),
        "kernels": cpu_level() if kind == "cpu" else kind,
        "quantkit version": __version__,
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
    }


def _described(
    options: SensitivityOptions, choices: Choices, windows: Windows, seq_len: int
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "quantkit_version": __version__,
        "model": {
            "path": str(options.model),
            "fingerprint": choices.plans[1].fingerprint["model"],
            "bytes": choices.plans[1].bytes_before,
        },
        "recipe": options.recipe.to_mapping(),
        "alternatives": choices.allowed,
        "calibration": str(options.calibration) if options.calibration else None,
        "data": {
            "sources": list(options.data) or ["bundled"],
            "sha256": windows.data_sha256,
            "tokens_sha256": windows.tokens_sha256,
        },
        "seq_len": seq_len,
        "windows": len(windows.windows),
        "tokens_scored": windows.tokens_scored,
    }


def _scored(
    options: SensitivityOptions,
    choices: Choices,
    windows: Windows,
    ranks: Ranks,
    kept: KeptScores,
    on_progress: Progress,
) -> dict[str, Any]:
    import torch

    from quantkit.sensitivity.layer_swap import SetInstaller

    with torch.inference_mode():
        installer = SetInstaller(options.model, choices.plans, options.trust_remote_code, ranks)
        return _Scoring(options, choices, windows, installer, ranks, kept, on_progress).result()


def _windows(options: SensitivityOptions, processes: int) -> tuple[Windows, int]:
    config = auto_config(options.model, options.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    seq_len = window_length(options.seq_len, positions, default=DEFAULT_LENGTH)
    names = options.data or (str(BUNDLED_CALIBRATION),)
    windows = calibration_windows(
        names, tokenizer, max(len(names), options.max_tokens // seq_len), seq_len, options.seed
    )
    if len(windows.windows) < processes:
        raise EvaluationError(
            f"{len(windows.windows)} windows can't be shared by {processes} processes; start fewer,"
            " or raise --max-tokens"
        )
    return windows, seq_len


class _Scoring:
    """One run: the first walk scores each set alone, the second what depends on that."""

    def __init__(
        self,
        options: SensitivityOptions,
        choices: Choices,
        windows: Windows,
        installer: SetInstaller,
        ranks: Ranks,
        kept: KeptScores,
        on_progress: Progress,
    ) -> None:
        import torch

        self.options, self.choices, self.windows, self.installer, self.on_progress = (
            options,
            choices,
            windows,
            installer,
            on_progress,
        )
        self.ranks, self.kept = ranks, kept
        self.batches = [torch.tensor([window.tokens]) for window in windows.windows]
        self.counts = np.array([window.scored for window in windows.windows])
        self.sets: Sequence[LinearSet] = ()
        self.outside: Sequence[str] = ()  # quantized Linears that are in no block
        self.blocks = self.block_runs = self.without_sharing = 0

    def result(self) -> dict[str, Any]:
        sets, floors = self.ranks.after_first(self._open)
        known = self.kept.layers()
        if known is not None:
            self.installer.know(known["blocks"], known["figures"])
        numbers = range(len(sets))
        singles = [
            (place, choice)
            for place in numbers
            for choice in range(1, len(self.choices.names))
            if self._size(sets[place], choice) is not None
        ]
        able = set(singles)
        whole = [
            tuple([choice] * len(sets))
            for choice in range(1, len(self.choices.names))
            if all((place, choice) in able for place in numbers)
        ]
        nothing = tuple([0] * len(sets))
        variants = [
            nothing,
            *(self._only(nothing, place, choice) for place, choice in singles),
            *whole,
        ]
        figures = self._measure("sets", variants, floors)
        self.floor = _Floor(
            floors, [figure["kld"] for figure in figures[len(variants) :]], self.blocks
        )
        rows, depths = [self._row(each) for each in sets], _depths(sets)
        for (place, choice), figure in zip(singles, figures[1:]):
            rows[place]["choices"][self.choices.names[choice]] |= figure | {
                "own_kld": self.floor.beyond(figure["kld"], depths[place])
            }
        wholes = {
            self.choices.names[variant[0]]: figure
            for variant, figure in zip(whole, figures[1 + len(singles) : len(variants)])
        }
        plan = self.choices.plans[1]
        result: dict[str, Any] = {
            "sets": rows,
            "whole": wholes,
            "floor": self.floor.to_json(),
            "additivity": {
                name: additivity(rows, name, figure["kld"], self.floor.deepest)
                for name, figure in wholes.items()
            },
            "bytes": {
                "all_kept": plan.bytes_before,
                "all_quantized": plan.bytes_after,
                "untied": sum(row.bytes_after for row in plan.parameters if row.name in plan.added),
            },
        }
        return (
            result
            | self._second_pass(sets, rows, result)
            | {"block_runs": self.block_runs, "block_runs_without_sharing": self.without_sharing}
        )

    def _open(self) -> tuple[list[LinearSet], list[int]]:
        """The sets, and the blocks in which the floor is measured."""
        blocks = self.installer.open(self.ranks.device)
        quantized = self.choices.plans[1].linears
        linears = [
            [name for name in self.installer.linears_of(number) if name in quantized]
            for number in range(blocks)
        ]
        sets = linear_sets(linears)
        if not sets:
            raise EvaluationError(
                "none of the Linears that this recipe quantizes is in a decoder block of"
                f" {self.options.model}"
            )
        self.sets = sets
        self.installer.sets = [each.linears for each in sets]
        self.outside = sorted(set(quantized) - {name for each in sets for name in each.linears})
        self.blocks, step = blocks, max(1, blocks // FLOORS)
        return sets, sorted({*range(0, blocks, step), blocks - 1})

    def _size(self, each: LinearSet, choice: int) -> int | None:
        return self.choices.bytes_of(each.linears, choice)

    @staticmethod
    def _only(nothing: Variant, place: int, choice: int) -> Variant:
        return (*nothing[:place], choice, *nothing[place + 1 :])

    def _row(self, each: LinearSet) -> dict[str, Any]:
        sizes = {name: self._size(each, number) for number, name in enumerate(self.choices.names)}
        choices = {name: {"bytes": size} for name, size in sizes.items() if size is not None}
        return {
            "name": set_name(each.linears),
            "block": each.block,
            "kind": each.kind,
            "linears": list(each.linears),
            "choices": choices,
            "layers": [],
        }

    def _measure(
        self, name: str, variants: Sequence[Variant], floors: Sequence[int] = ()
    ) -> list[dict[str, Any]]:
        """KL and ΔPPL of each variant against the first, and of the nudges in the blocks
        `floors`.
        """
        from quantkit.sensitivity.variants import count_block_runs

        # A nudge is one more choice of a set that no budget knows.
        extended = [(*variant, *[0] * len(floors)) for variant in variants]
        extended += [
            (*variants[0], *[int(number == place) for number in range(len(floors))])
            for place in range(len(floors))
        ]
        block_of = [each.block for each in self.sets] + list(floors)
        self.block_runs += count_block_runs(extended, block_of, self.blocks)
        self.without_sharing += len(extended) * self.blocks
        walk = f"{name}-{hashlib.sha256(repr(extended).encode()).hexdigest()[:12]}"
        scores = self.kept.scores(walk)
        left = [window for window in range(len(self.batches)) if window not in scores]
        if left:
            scores |= self._walk(name, walk, extended, block_of, left, bool(floors))
        return self.ranks.first_decides(
            lambda: self._figures(
                [scores[window] for window in range(len(self.batches))], len(extended)
            )
        )

    def _walk(
        self,
        name: str,
        walk: str,
        variants: Sequence[Variant],
        block_of: Sequence[int],
        windows: Sequence[int],
        looks: bool,
    ) -> dict[int, Scores]:
        """Run the variants over these windows, shared by the ranks, and score them."""
        from quantkit.evaluation.logits import OutputHead
        from quantkit.sensitivity.variants import run_variants

        model = self.installer.reopened(self.ranks.device)
        mine = windows[self.ranks.rank :: self.ranks.count]
        tokens = sum(self.batches[window].numel() for window in windows)
        self.kept.require_room(
            len(variants)
            * tokens
            * model.model.config.get_text_config().hidden_size
            * model.states_dtype.itemsize
        )
        self.installer.looked_at = mine
        states = run_variants(
            model,
            {window: self.batches[window] for window in mine},
            variants,
            block_of,
            self.installer.install,
            self.installer.look if looks else lambda number, block, run: None,
            lambda done, total: self.on_progress(name, done, total),
            self.kept.keeper(walk, self.installer.layer_figures if looks else None),
            len(self.batches),
        )
        try:
            return self._score(
                walk, OutputHead.of(model.model, True), states, windows, len(variants)
            )
        finally:
            states.close()

    def _score(
        self,
        walk: str,
        head: OutputHead,
        states: VariantStates,
        windows: Sequence[int],
        variants: int,
    ) -> dict[int, Scores]:
        """Each round a few windows on each rank, so that all threads have work; what a round finds
        is kept.
        """
        import torch

        from quantkit.evaluation.logits import POSITIONS_PER_CHUNK

        longest = max(self.windows.windows[window].scored for window in windows)
        pieces = -(-longest // POSITIONS_PER_CHUNK) * -(-variants // VARIANTS_AT_ONCE)
        each = (
            self.ranks.first_decides(lambda: -(-torch.get_num_threads() // pieces))
            * self.ranks.count
        )
        scores: dict[int, Scores] = {}
        for start in range(0, len(windows), each):
            mine = windows[start + self.ranks.rank : start + each : self.ranks.count]
            done = min(start + each, len(windows))
            scores |= self.kept.add(
                walk,
                self._scores_of(head, states, mine, variants),
                len(self.batches) - len(windows) + done,
                len(self.batches),
            )
            self.on_progress("logits", done, len(windows))
        return scores

    def _scores_of(
        self, head: OutputHead, states: VariantStates, windows: Iterable[int], variants: int
    ) -> dict[int, Scores]:
        import torch

        from quantkit.evaluation.logits import POSITIONS_PER_CHUNK, score_variants
        from quantkit.models.threads import each_batch

        device = torch.device(self.ranks.device)
        groups = [
            range(first, min(first + VARIANTS_AT_ONCE, variants))
            for first in range(0, variants, VARIANTS_AT_ONCE)
        ]
        pieces = [
            (number, start, group)
            for number in windows
            for start in range(0, self.windows.windows[number].scored, POSITIONS_PER_CHUNK)
            for group in groups
        ]

        def work(index: int) -> list[tuple[np.ndarray, np.ndarray]]:
            number, start, group = pieces[index]
            window = self.windows.windows[number]
            end = min(start + POSITIONS_PER_CHUNK, window.scored)
            targets = torch.tensor(window.tokens[start + 1 : end + 1], device=device)
            base = states.get(0, number)[start:end].to(device)
            torch.set_flush_denormal(True)
            try:
                return score_variants(
                    head,
                    base,
                    targets,
                    [states.get(variant, number)[start:end].to(device) for variant in group],
                )
            finally:
                torch.set_flush_denormal(False)

        scores: dict[int, Scores] = {
            number: ([0.0] * variants, [0.0] * variants) for number in windows
        }
        for done, found in enumerate(
            each_batch(work, range(len(pieces)), device, torch.get_num_threads())
        ):
            number, _, group = pieces[done]
            for variant, figures in zip(group, found):
                for sums, values in zip(scores[number], figures):
                    sums[variant] += float(values.sum(dtype=np.float64))
        if not np.isfinite([*scores.values()]).all():
            raise EvaluationError(
                f"{self.options.model} gives logits that are not finite on this text; `quantkit"
                " verify` tells whether its files are sound"
            )
        return scores

    def _figures(self, scores: Sequence[Scores], variants: int) -> list[dict[str, Any]]:
        """scores: of all windows."""
        # [variants, windows]
        kld, losses = (np.array([each[side] for each in scores]).T for side in (0, 1))
        return [
            self._figure(kld[variant], losses[variant] - losses[0]) for variant in range(variants)
        ]

    def _figure(self, kld: np.ndarray, differences: np.ndarray) -> dict[str, Any]:
        interval = paired_interval(kld, self.counts)
        delta = perplexity_change_pct(differences, self.counts)
        return {
            "kld": interval.value,
            "kld_low": interval.low,
            "kld_high": interval.high,
            "ppl_delta_pct": delta.to_json(),
        }

    def _second_pass(
        self, sets: Sequence[LinearSet], rows: list[dict[str, Any]], result: dict[str, Any]
    ) -> dict[str, Any]:
        """Each of the worst sets restored in the quantized model, the points of the Pareto lines,
        and the budget's solution.
        """
        if RECIPE not in result["whole"]:
            raise self.ranks.told_once(
                EvaluationError("no set of this model can be quantized with the whole recipe")
            )
        for place, layers in self.installer.layer_figures().items():
            rows[place]["layers"] = layers
        quantized = tuple([1] * len(sets))
        ranked = ranking(rows)
        restored = [self._only(quantized, place, 0) for place in ranked[:RESTORED]]
        lines = pareto_lines(rows, result, self.choices.names)
        solution = self.ranks.first_decides(
            lambda: solve(
                result | {"pareto": lines},
                self.options.max_size,
                self.options.max_kld,
                self.choices.allowed,
            )
        )
        wanted = [tuple([0] * len(sets)), quantized, *restored]
        points = [
            (line, point)
            for line in lines
            for point in line["points"]
            if point["k"] in line["measured"]
        ]
        wanted += [self._line_variant(sets, ranked, line, point["k"]) for line, point in points]
        if solution is not None:
            wanted.append(tuple(self.choices.names.index(name) for name in solution["choices"]))
        figures = self._measure("restored", wanted)
        whole = figures[1]["kld"]
        for place, figure in zip(ranked, figures[2 : 2 + len(restored)]):
            rows[place]["restored"] = figure | {"gain": whole - figure["kld"]}
        for (_, point), figure in zip(points, figures[2 + len(restored) :]):
            point["measured"] = figure
        if solution is not None:
            solution["measured"] = figures[-1]
        remarks = []
        if self.outside:
            more = f" and {len(self.outside) - 1} more" if len(self.outside) > 1 else ""
            remarks.append(
                f"{self.outside[0]}{more}, outside of the blocks, stays as the recipe has it"
            )
        return {"ranking": ranked, "pareto": lines, "solution": solution, "remarks": remarks}

    def _line_variant(
        self, sets: Sequence[LinearSet], ranked: Sequence[int], line: dict[str, Any], k: int
    ) -> Variant:
        to = self.choices.names.index(line["to"])
        moved = {place for place in line["order"][:k]}
        return tuple(to if place in moved else 1 for place in range(len(sets)))


def _depths(sets: Sequence[LinearSet]) -> list[float]:
    """How many blocks lie before each set, with the part of its own block that lies before it."""
    in_block = Counter(each.block for each in sets)
    seen: Counter[int] = Counter()
    depths = []
    for each in sets:
        depths.append(each.block + seen[each.block] / in_block[each.block])
        seen[each.block] += 1
    return depths


class _Floor:
    """What a nudge of single roundings costs, by how many blocks lie before it; between the blocks
    behind which it was measured it is interpolated.
    """

    def __init__(self, blocks: Sequence[int], kld: Sequence[float], count: int) -> None:
        places, values = [block + 1 for block in blocks], list(kld)
        if places[0] > 0:
            slope = (values[1] - values[0]) / (places[1] - places[0]) if len(places) > 1 else 0.0
            places, values = [0, *places], [max(0.0, values[0] - places[0] * slope), *values]
        self._values = np.interp(np.arange(count + 1), places, values)

    @property
    def deepest(self) -> float:
        """Of a change that goes through the whole model."""
        return float(self._values[0])

    def beyond(self, kld: float, place: float) -> float:
        """place: blocks that lie before the change, with the part of its own."""
        return max(0.0, kld - float(np.interp(place, np.arange(len(self._values)), self._values)))

    def to_json(self) -> list[float]:
        return self._values.tolist()
