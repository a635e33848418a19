"""`sensitivity`: what each set of Linears costs by being quantized, and which of them a budget should spare.

A set is what a runtime computes as one, and what can't be split: q/k/v, gate/up, each other Linear by itself, all experts of a layer. For each, the model
runs with only this set quantized, and KL(model‖variant) over some text is what it costs. Weights are quantized as `export` does and inputs as a server does.
Errors of different sets are nearly independent, so that their KLs nearly add; how nearly is measured, and a budget is solved on the sums.

KLs this small contain what any change at that place would cause, because it makes later roundings to the model's dtype fall otherwise: a floor, measured by
nudging single roundings, which is subtracted. The sums of what is left are compared with the KL of the whole.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit import __version__, budget
from quantkit.checkpoint import Checkpoint, read_json
from quantkit.data import BUNDLED_CALIBRATION, Windows, calibration_windows, load_tokenizer, window_length
from quantkit.errors import CheckpointError, EvaluationError, NotComparableError
from quantkit.figures import per_window
from quantkit.layouts import QuantizationLayout
from quantkit.mixing import mixed_recipe
from quantkit.model import auto_config, classify_tensors, fused_sets, pick_device
from quantkit.plan import ExportOptions, ExportPlan, ParameterPlan, plan_export
from quantkit.scheme import QuantScheme, Recipe
from quantkit.states import peak_memory_bytes
from quantkit.statistics import paired_interval, perplexity_change_pct

if TYPE_CHECKING:
    from quantkit.heads import OutputHead
    from quantkit.variants import Variant, VariantStates

SCHEMA_VERSION = 1
KEEP = "keep"  # the choice of leaving a set in the dtype it is stored in
RECIPE = "recipe"
RESTORED = 10  # sets that are restored, each alone, in an otherwise quantized model
FLOORS = 8  # blocks in which the floor is measured, evenly spread
# Sums are good enough to choose by while they are off by less than this factor: predictions are scaled by it, and budgets depend on ratios alone.
ADDITIVE_WITHIN = 2.0
# Several windows, so that there are intervals; long enough for attention to have something to look at.
DEFAULT_LENGTH = 256
VARIANTS_AT_ONCE = 16  # in one piece of scoring


@dataclass(frozen=True)
class SensitivityOptions:
    """recipe: what all sets are quantized with; alternatives: what single sets may be given instead, names of schemes or "keep".

    max_size: bytes, or None; max_kld: nats, or None. A calibration that holds weights chosen by algorithms has them scored as they were chosen.
    """

    model: Path
    recipe: Recipe
    alternatives: tuple[str, ...] = (KEEP,)
    calibration: Path | None = None
    data: tuple[str, ...] = ()
    max_tokens: int = 2048
    seq_len: int | None = None
    max_size: str | None = None
    max_kld: float | None = None
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LinearSet:
    """Linears that get one choice. kind: what it is in its block, as "q+k+v"."""

    block: int
    kind: str
    linears: tuple[str, ...]


# on_progress(what, done, total)
Progress = Callable[[str, float, float], None]


def linear_sets(linears_of_blocks: Sequence[Sequence[str]]) -> list[LinearSet]:
    """The sets of each block, in the order of its Linears. linears_of_blocks: for each block the names on disk of those that are quantized."""
    sets = []
    for block, linears in enumerate(linears_of_blocks):
        experts = tuple(name for name in linears if ".experts." in name)
        others = [name for name in linears if name not in set(experts)]
        fused = {members[0]: members for members in fused_sets(others)}
        members_of_others = {member for members in fused.values() for member in members[1:]}
        groups = [fused.get(name, (name,)) for name in others if name not in members_of_others] + ([experts] if experts else [])
        kinds = ["experts" if group is experts else _kind(group) for group in groups]
        # A shared expert has a gate and an up beside those of others.
        named = [_parent(group) + " " + kind if kinds.count(kind) > 1 else kind for group, kind in zip(groups, kinds)]
        sets += [LinearSet(block, kind, group) for group, kind in zip(groups, named)]
    return sets


def _kind(group: Sequence[str]) -> str:
    return "+".join(name.rpartition(".")[2].removesuffix("_proj") for name in group)


def _parent(group: Sequence[str]) -> str:
    return group[0].split(".")[-2]


# ---- Plans: what is quantized, and how many bytes each choice takes.


@dataclass(frozen=True)
class Choices:
    """What a set may become. names: "keep", "recipe", then schemes; plans: of a model whose sets all take that choice, None for "keep". may_keep: whether a budget may."""

    names: tuple[str, ...]
    plans: tuple[ExportPlan | None, ...]
    may_keep: bool

    def bytes_of(self, linears: Sequence[str], choice: int) -> int | None:
        """What the Linears take on disk, None where this choice can't hold one of them."""
        rows = self._rows[choice or 1]
        if self.plans[choice] is None:
            return sum(rows[name].bytes_before for name in linears)
        return sum(rows[name].bytes_after for name in linears) if all(rows[name].status == "quantized" for name in linears) else None

    @cached_property
    def _rows(self) -> list[dict[str, ParameterPlan]]:
        return [{row.name.removesuffix(".weight"): row for row in plan.parameters} if plan else {} for plan in self.plans]

    @property
    def allowed(self) -> list[str]:
        """What a budget may give a set instead of the recipe's scheme."""
        return [name for name in self.names if name != RECIPE and (name != KEEP or self.may_keep)]


def open_choices(options: SensitivityOptions) -> tuple[Choices, list[str]]:
    """The plans of all choices, which refuse what `export` would refuse; and remarks."""
    checkpoint, remarks, recipe = Checkpoint.open(options.model), [], options.recipe
    if QuantizationLayout.read(checkpoint.config) is not None:
        raise CheckpointError(f"{options.model} is quantized already; sensitivity asks what quantizing costs, so give the original model")
    if recipe.chooses_weights and options.calibration is None:
        names = " and ".join(algorithm.name for algorithm in recipe.algorithms)
        remarks.append(f"scored with weights rounded to nearest: what {names} choose is scored with --calibration CALIB")
        recipe = replace(recipe, algorithms=())
    if recipe.kv_cache:
        remarks.append("the KV cache is left as it is while sets are scored; the written recipe has it")
    plans: list[ExportPlan | None] = [None, plan_export(_plan_options(options, replace(recipe, kv_cache=None), options.calibration), checkpoint=checkpoint)]
    has_chosen = plans[1].calibration is not None and bool(plans[1].calibration.weights)
    schemes = [name for name in options.alternatives if name != KEEP]
    for name in schemes:
        alternative = Recipe(QuantScheme.parse(name), ignore=recipe.ignore, observer=recipe.observer)
        plans.append(plan_export(_plan_options(options, alternative, None if has_chosen else options.calibration), checkpoint=checkpoint))
    names = [plan.options.recipe.scheme.name for plan in plans[2:]]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise EvaluationError(f"the alternative {twice} is named twice; leave one out")
    return Choices((KEEP, RECIPE, *names), tuple(plans), KEEP in options.alternatives), remarks


def _plan_options(options: SensitivityOptions, recipe: Recipe, calibration: Path | None) -> ExportOptions:
    return ExportOptions(options.model, options.model.with_name(options.model.name + "-sensitivity"), recipe, calibration)


# ---- Scoring.


def score_sensitivity(options: SensitivityOptions, on_progress: Progress = lambda name, done, total: None) -> dict[str, Any]:
    """The result as JSON: sets with their KLs, the whole, and a budget's solution where one is asked for."""
    started = time.monotonic()
    if options.max_kld is not None and not options.max_kld > 0:
        raise EvaluationError("--max-kld must be more than 0")
    choices, remarks = open_choices(options)
    windows, seq_len = _windows(options)

    import torch

    from quantkit.installing import SetInstaller

    with torch.inference_mode():
        run = _Scoring(options, choices, windows, SetInstaller(options.model, choices.plans, options.trust_remote_code), on_progress)
        result = run.result()
    described = {
        "schema_version": SCHEMA_VERSION,
        "quantkit_version": __version__,
        "model": {"path": str(options.model), "fingerprint": choices.plans[1].fingerprint["model"], "bytes": choices.plans[1].bytes_before},
        "recipe": options.recipe.to_mapping(),
        "alternatives": choices.allowed,
        "calibration": str(options.calibration) if options.calibration else None,
        "data": {"sources": list(options.data) or ["bundled"], "sha256": windows.data_sha256, "tokens_sha256": windows.tokens_sha256},
        "seq_len": seq_len,
        "windows": len(windows.windows),
        "tokens_scored": windows.tokens_scored,
    }
    return described | result | {"remarks": remarks + result["remarks"], "seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory_bytes()}


def _windows(options: SensitivityOptions) -> tuple[Windows, int]:
    config = auto_config(options.model, options.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    seq_len = window_length(options.seq_len, positions, default=DEFAULT_LENGTH)
    names = options.data or (str(BUNDLED_CALIBRATION),)
    return calibration_windows(names, tokenizer, max(len(names), options.max_tokens // seq_len), seq_len, options.seed), seq_len


class _Scoring:
    """One run: the first pass scores each set alone, the second what depends on that."""

    def __init__(self, options: SensitivityOptions, choices: Choices, windows: Windows, installer: Any, on_progress: Progress) -> None:
        import torch

        self.options, self.choices, self.windows, self.installer, self.on_progress = options, choices, windows, installer, on_progress
        self.device = pick_device(options.device)
        self.batches = [torch.tensor([window.tokens]) for window in windows.windows]
        self.counts = np.array([window.scored for window in windows.windows])
        self.sets: Sequence[LinearSet] = ()
        self.outside: Sequence[str] = ()  # quantized Linears that are in no block
        self.blocks = self.block_runs = self.without_sharing = 0
        installer.sampled = len(self.batches)

    def result(self) -> dict[str, Any]:
        sets, floors = self._open()
        numbers = range(len(sets))
        singles = [(place, choice) for place in numbers for choice in range(1, len(self.choices.names)) if self._size(sets[place], choice) is not None]
        able = set(singles)
        whole = [tuple([choice] * len(sets)) for choice in range(1, len(self.choices.names)) if all((place, choice) in able for place in numbers)]
        nothing = tuple([0] * len(sets))
        variants = [nothing, *(self._only(nothing, place, choice) for place, choice in singles), *whole]
        figures = self._measure("sets", variants, floors)
        self.floor = _Floor(floors, [figure["kld"] for figure in figures[len(variants) :]], self.blocks)
        rows, depths = [self._row(each) for each in sets], _depths(sets)
        for (place, choice), figure in zip(singles, figures[1:]):
            rows[place]["choices"][self.choices.names[choice]] |= figure | {"own_kld": self.floor.beyond(figure["kld"], depths[place])}
        wholes = {self.choices.names[variant[0]]: figure for variant, figure in zip(whole, figures[1 + len(singles) : len(variants)])}
        result: dict[str, Any] = {
            "sets": rows,
            "whole": wholes,
            "floor": self.floor.to_json(),
            "additivity": {name: additivity(rows, name, figure["kld"], self.floor.deepest) for name, figure in wholes.items()},
            "bytes": {"all_kept": self.choices.plans[1].bytes_before, "all_quantized": self.choices.plans[1].bytes_after},
        }
        return result | self._second_pass(sets, rows, result) | {"block_runs": self.block_runs, "block_runs_without_sharing": self.without_sharing}

    def _open(self) -> tuple[list[LinearSet], list[int]]:
        """The sets, and the blocks in which the floor is measured."""
        blocks = self.installer.open(self.device)
        quantized = self.choices.plans[1].linears
        linears = [[name for name in self.installer.linears_of(number) if name in quantized] for number in range(blocks)]
        sets = linear_sets(linears)
        if not sets:
            raise EvaluationError(f"none of the Linears that this recipe quantizes is in a decoder block of {self.options.model}")
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
        return {"name": set_name(each.linears), "block": each.block, "kind": each.kind, "linears": list(each.linears), "choices": choices, "layers": []}

    def _measure(self, name: str, variants: Sequence[Variant], floors: Sequence[int] = ()) -> list[dict[str, Any]]:
        """KL and ΔPPL of each variant against the first, and of the nudges in the blocks `floors`."""
        from quantkit.heads import OutputHead
        from quantkit.variants import run_variants

        model = self.installer.reopened(self.device)
        # A nudge is one more choice of a set that no budget knows.
        extended = [(*variant, *[0] * len(floors)) for variant in variants]
        extended += [(*variants[0], *[int(number == place) for number in range(len(floors))]) for place in range(len(floors))]
        block_of = [each.block for each in self.sets] + list(floors)
        states = run_variants(
            model,
            self.batches,
            extended,
            block_of,
            self.installer.install,
            self.installer.look if floors else lambda number, block, run: None,
            lambda done, total: self.on_progress(name, done, total),
        )
        try:
            self.block_runs += states.block_runs
            self.without_sharing += len(extended) * model.block_count
            return self._figures(OutputHead(model.model, True), states, len(extended))
        finally:
            states.close()

    def _figures(self, head: OutputHead, states: VariantStates, variants: int) -> list[dict[str, Any]]:
        import torch

        from quantkit.blockwise import each_batch
        from quantkit.heads import POSITIONS_PER_CHUNK, score_variants

        device = torch.device(self.device)
        groups = [range(first, min(first + VARIANTS_AT_ONCE, variants)) for first in range(0, variants, VARIANTS_AT_ONCE)]
        pieces = [
            (number, start, group)
            for number, window in enumerate(self.windows.windows)
            for start in range(0, window.scored, POSITIONS_PER_CHUNK)
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
                return score_variants(head, base, targets, [states.get(variant, number)[start:end].to(device) for variant in group])
            finally:
                torch.set_flush_denormal(False)

        kld, nll = defaultdict(list), defaultdict(list)
        for done, found in enumerate(each_batch(work, range(len(pieces)), device, torch.get_num_threads())):
            for variant, (divergences, losses) in zip(pieces[done][2], found):
                kld[variant].append(divergences)
                nll[variant].append(losses)
            self.on_progress("logits", done + 1, len(pieces))
        base = per_window(np.concatenate(nll[0]), self.counts)
        return [self._figure(np.concatenate(kld[variant]), per_window(np.concatenate(nll[variant]), self.counts) - base) for variant in range(variants)]

    def _figure(self, kld: np.ndarray, differences: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(kld).all() or not np.isfinite(differences).all():
            raise EvaluationError(f"{self.options.model} gives logits that are not finite on this text; `quantkit verify` tells whether its files are sound")
        interval = paired_interval(per_window(kld, self.counts), self.counts)
        delta = perplexity_change_pct(differences, self.counts)
        return {"kld": interval.value, "kld_low": interval.low, "kld_high": interval.high, "ppl_delta_pct": delta.to_json()}

    def _second_pass(self, sets: Sequence[LinearSet], rows: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
        """Each of the worst sets restored in the quantized model, the points of the Pareto lines, and the budget's solution."""
        if RECIPE not in result["whole"]:
            raise EvaluationError("no set of this model can be quantized with the whole recipe")
        for place, layers in self.installer.layer_figures().items():
            rows[place]["layers"] = layers
        quantized = tuple([1] * len(sets))
        ranked = ranking(rows)
        restored = [self._only(quantized, place, 0) for place in ranked[:RESTORED]]
        lines = pareto_lines(rows, result, self.choices.names)
        solution = solve(result | {"pareto": lines}, self.options.max_size, self.options.max_kld, self.choices.allowed)
        wanted = [tuple([0] * len(sets)), quantized, *restored]
        points = [(line, point) for line in lines for point in line["points"] if point["k"] in line["measured"]]
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
            remarks.append(
                f"{self.outside[0]}{f' and {len(self.outside) - 1} more' if len(self.outside) > 1 else ''}, outside of the blocks, stays as the recipe has it"
            )
        return {"ranking": ranked, "pareto": lines, "solution": solution, "remarks": remarks}

    def _line_variant(self, sets: Sequence[LinearSet], ranked: Sequence[int], line: dict[str, Any], k: int) -> Variant:
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
    """What a nudge of single roundings costs, by how many blocks lie before it; between the blocks behind which it was measured it is interpolated."""

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


# ---- From figures to advice; nothing below runs the model.


def set_name(linears: Sequence[str]) -> str:
    """As a shell would expand it: model.layers.3.self_attn.{q,k,v}_proj."""
    if len(linears) == 1:
        return linears[0]
    if all(".experts." in name for name in linears):
        return linears[0][: linears[0].index(".experts.") + len(".experts")]
    parent, leaves = linears[0].rpartition(".")[0], [name.rpartition(".")[2] for name in linears]
    suffix = "_proj" if all(leaf.endswith("_proj") for leaf in leaves) else ""
    return f"{parent}.{{{','.join(leaf.removesuffix(suffix) for leaf in leaves)}}}{suffix}"


def ranking(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the sets, the one that costs most first."""
    return sorted(range(len(rows)), key=lambda place: (-rows[place]["choices"][RECIPE]["own_kld"], place))


def additivity(rows: Sequence[Mapping[str, Any]], name: str, whole: float, floor: float) -> dict[str, Any]:
    """The sum of single KLs against the KL of all sets together, both beyond the floor. factor: what sums are multiplied by to predict."""
    total = sum(row["choices"][name]["own_kld"] for row in rows)
    own = max(0.0, whole - floor)
    factor = own / total if total > 0 and own > 0 else 1.0
    return {"sum": total, "whole": own, "factor": factor, "additive": 1 / ADDITIVE_WITHIN <= factor <= ADDITIVE_WITHIN}


def predicted_kld(result: Mapping[str, Any], choices: Sequence[str]) -> float:
    """What sums say of a choice for each set, scaled so that the whole recipe's KL comes out, floor included where anything changes."""
    factors = {name: entry["factor"] for name, entry in result["additivity"].items()}
    factor = factors.get(RECIPE, 1.0)
    total = sum(factors.get(name, factor) * row["choices"][name]["own_kld"] for row, name in zip(result["sets"], choices) if name != KEEP)
    changed = [row["block"] for row, name in zip(result["sets"], choices) if name != KEEP]
    return total + (result["floor"][min(changed)] if changed and total > 0 else 0.0)


def size_of(result: Mapping[str, Any], choices: Sequence[str]) -> int:
    """Bytes of the checkpoint's tensors with a choice for each set."""
    moved = sum(row["choices"][name]["bytes"] - row["choices"][RECIPE]["bytes"] for row, name in zip(result["sets"], choices))
    return result["bytes"]["all_quantized"] + moved


def pareto_lines(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each other choice: what the worst k sets cost that take it. measured: the k whose variants are run."""
    lines = []
    for to in [name for name in names if name != RECIPE]:
        able = [place for place in range(len(rows)) if to in rows[place]["choices"]]
        order = sorted(able, key=lambda place: (-(rows[place]["choices"][RECIPE]["own_kld"] - rows[place]["choices"][to].get("own_kld", 0.0)), place))
        points = []
        for k in range(len(order) + 1):
            moved = set(order[:k])
            choices = [to if place in moved else RECIPE for place in range(len(rows))]
            points.append({"k": k, "bytes": size_of(result | {"sets": rows}, choices), "kld_predicted": predicted_kld(result | {"sets": rows}, choices)})
        measured, k = [0], 1
        while k <= len(order):
            measured.append(k)
            k *= 2
        lines.append({"to": to, "order": order, "measured": measured, "points": points})
    return lines


def opened_result(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What an earlier run wrote with -o, about the same model."""
    try:
        result = read_json(path, "")
        known = result.get("schema_version"), isinstance(result["sets"], list) and result["model"]["fingerprint"]
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise EvaluationError(f"{path} is no result of `quantkit sensitivity -o`; give one, or leave out --from") from None
    if known[0] != SCHEMA_VERSION:
        raise EvaluationError(f"{path} has format {known[0]}, this quantkit reads {SCHEMA_VERSION}; score again")
    if known[1] != checkpoint.fingerprint():
        raise NotComparableError(
            f"{path} was made from another model ({result['model']['path']}) than {checkpoint.path}, or its files have changed since; score this one"
        )
    return result


def solved_anew(result: Mapping[str, Any], max_size: str | None, max_kld: float | None, alternatives: Sequence[str]) -> dict[str, Any]:
    """The result with another budget's solution; nothing is run. alternatives: of those that were scored, all where none is named."""
    named = [name if name == KEEP else QuantScheme.parse(name).name for name in alternatives]
    unknown = next((name for name in named if name != KEEP and name not in result["alternatives"]), None)
    if unknown is not None:
        raise EvaluationError(f"{unknown} was not scored as an alternative; score again with --alternative {unknown}")
    return dict(result) | {"solution": solve(result, max_size, max_kld, named or result["alternatives"])}


def solution_recipe(result: Mapping[str, Any], checkpoint: Checkpoint) -> Recipe:
    """The recipe of a budget's solution, whose export has the size that was promised."""
    recipe, solution = Recipe.from_mapping(result["recipe"], "the result's recipe"), result["solution"]
    taken = [(name, choice) for row, choice in zip(result["sets"], solution["choices"]) for name in row["linears"]]
    infos = classify_tensors({name: info.shape for name, info in checkpoint.tensors.items()})
    modules = [info.name for info in infos.values() if info.tensor.endswith(".weight")]
    moved = {name: QuantScheme.parse(choice) for name, choice in taken if choice not in (KEEP, RECIPE)}
    made = mixed_recipe(recipe, [name for name, choice in taken if choice == KEEP], moved, modules)
    if set(solution["choices"]) != {KEEP}:
        where = ExportOptions(checkpoint.path, checkpoint.path.with_name(checkpoint.path.name + "-sensitivity"), made)
        promised, found = solution["bytes"], plan_export(where, calibration_follows=True, checkpoint=checkpoint).bytes_after
        assert found == promised, f"the recipe gives {found} bytes, not {promised}"
    return made


def solve(result: Mapping[str, Any], max_size: str | None, max_kld: float | None, allowed: Sequence[str]) -> dict[str, Any] | None:
    """The best choice for each set within the budget, exactly on sums; None without a budget. Raises EvaluationError where nothing fits."""
    if max_size is None and max_kld is None:
        return None
    limit = None if max_size is None else budget.parse_size(max_size, result["bytes"]["all_kept"], result["bytes"]["all_quantized"])
    factors = {name: entry["factor"] for name, entry in result["additivity"].items()}
    items = []
    for row in result["sets"]:
        names = [name for name in (RECIPE, *allowed) if name in row["choices"]]
        cost = [0.0 if name == KEEP else factors.get(name, factors[RECIPE]) * row["choices"][name]["own_kld"] for name in names]
        items.append(budget.Item(tuple(names), tuple(row["choices"][name]["bytes"] for name in names), tuple(cost)))
    fixed = result["bytes"]["all_quantized"] - sum(row["choices"][RECIPE]["bytes"] for row in result["sets"])
    floor = result["floor"][0]
    chosen = budget.solve(items, None if limit is None else limit - fixed, None if max_kld is None else max_kld - floor)
    if chosen is None:
        least, best = (
            size_of(result, [min(item.names, key=lambda name: row["choices"][name]["bytes"]) for item, row in zip(items, result["sets"])]),
            min(sum(min(item.costs) for item in items) + floor, predicted_kld(result, [RECIPE] * len(items))),
        )
        asked = " and ".join(
            [*([f"--max-size {max_size} ({limit} bytes)"] if limit is not None else []), *([f"--max-kld {max_kld:g}"] if max_kld is not None else [])]
        )
        raise EvaluationError(
            f"no choice meets {asked}: the smallest is {least} bytes, and the least KL that sums predict is {best:.2g}; allow more, or another --alternative"
        )
    choices = [item.names[number] for item, number in zip(items, chosen)]
    return {
        "max_size": max_size, "max_size_bytes": limit, "max_kld": max_kld, "choices": choices, "bytes": size_of(result, choices),
        "kld_predicted": predicted_kld(result, choices), "moved": sum(name != RECIPE for name in choices),
    }  # fmt: skip
