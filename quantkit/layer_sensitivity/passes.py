"""The two passes of a run. The first scores each layer group quantized alone, all groups quantized,
and the noise floor. The second scores what depends on these: the worst groups kept in an otherwise
quantized model, points of the Pareto lines, and the budget's solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantkit.errors import EvaluationError
from quantkit.layer_sensitivity.advice import additivity, pareto_lines, ranking, solve
from quantkit.layer_sensitivity.base_model import open_base_model
from quantkit.layer_sensitivity.choices import KEEP_NUMBER, RECIPE_NUMBER, Choices
from quantkit.layer_sensitivity.layer_groups import LayerGroup, layer_groups
from quantkit.layer_sensitivity.layer_sqnr import LayerSqnr
from quantkit.layer_sensitivity.layer_swap import Perturbation
from quantkit.layer_sensitivity.measure import VariantScorer
from quantkit.layer_sensitivity.noise_floor import NoiseFloor, depths, measured_blocks
from quantkit.layer_sensitivity.result import (
    CheckpointBytes,
    GroupChoice,
    GroupScores,
    ParetoLine,
    Restored,
    ScoredGroup,
    Solution,
    VariantMetrics,
)
from quantkit.layer_sensitivity.streams import Variant

RESTORED = 10  # groups that are kept, one at a time, in an otherwise quantized model

# The purpose of a variant, and the numbers that distinguish it from others of the same purpose.
Label = tuple[str | int, ...]
BASE: Label = ("base",)
QUANTIZED: Label = ("quantized",)
SOLUTION: Label = ("solution",)


def alone(place: int, choice: int) -> Label:
    """One group takes a choice, the others are kept."""
    return "alone", place, choice


def whole(choice: int) -> Label:
    return "whole", choice


def perturbed(block: int) -> Label:
    return "perturbed", block


def restored(place: int) -> Label:
    """One group is kept, the others are quantized."""
    return "restored", place


def pareto_point(line: int, moved: int) -> Label:
    return "pareto", line, moved


@dataclass(frozen=True)
class LayerGroups:
    """The layer groups of a model.

    groups: those that the recipe quantizes, in the order of the model.
    outside: names of quantized Linears outside the blocks.
    blocks: how many the model has.
    """

    groups: tuple[LayerGroup, ...]
    outside: tuple[str, ...]
    blocks: int

    def uniform(self, choice: int) -> Variant:
        return (choice,) * len(self.groups)


def with_choice(variant: Variant, place: int, choice: int) -> Variant:
    return (*variant[:place], choice, *variant[place + 1 :])


def open_layer_groups(choices: Choices, trust_remote_code: bool, device: str) -> LayerGroups:
    """Raises EvaluationError if no block has a Linear that the recipe quantizes."""
    plan = choices.recipe
    base = open_base_model(plan, trust_remote_code, device)
    blocks = base.blocks.block_count
    groups = layer_groups(
        [
            [name for name in base.linears_of(number) if name in plan.linears]
            for number in range(blocks)
        ]
    )
    if not groups:
        raise EvaluationError(
            f"this recipe quantizes no Linear in the decoder blocks of {plan.options.model}"
        )
    inside = {name for group in groups for name in group.linears}
    return LayerGroups(tuple(groups), tuple(sorted(set(plan.linears) - inside)), blocks)


def first_pass(scorer: VariantScorer, model: LayerGroups, sqnr: LayerSqnr) -> GroupScores:
    """The KLs of groups and of all together, and the noise floor."""
    choices, groups = scorer.choices, model.groups
    sizes = [
        [choices.bytes_of(group.linears, choice) for choice in range(len(choices.names))]
        for group in groups
    ]
    quantizing = range(RECIPE_NUMBER, len(choices.names))
    singles = [
        (place, choice)
        for place in range(len(groups))
        for choice in quantizing
        if sizes[place][choice] is not None
    ]
    wholes = [choice for choice in quantizing if all(size[choice] is not None for size in sizes)]
    perturbations = [Perturbation(block) for block in measured_blocks(model.blocks)]
    nothing, unperturbed = model.uniform(KEEP_NUMBER), (0,) * len(perturbations)
    variants: dict[Label, Variant] = {BASE: nothing}
    variants |= {
        alone(place, choice): with_choice(nothing, place, choice) for place, choice in singles
    }
    variants |= {whole(choice): model.uniform(choice) for choice in wholes}
    variants = {label: (*variant, *unperturbed) for label, variant in variants.items()}
    for place, perturbation in enumerate(perturbations):
        switched = tuple(int(other == place) for other in range(len(perturbations)))
        variants[perturbed(perturbation.block)] = (*nothing, *switched)
    metrics = scorer.measure("groups", [*groups, *perturbations], variants, model.blocks, sqnr)

    floor = NoiseFloor.interpolated(
        {each.block: metrics[perturbed(each.block)].kld for each in perturbations}, model.blocks
    )
    before = depths(groups)

    def scored(place: int, choice: int, nbytes: int) -> GroupChoice:
        if choice == KEEP_NUMBER:
            return GroupChoice(bytes=nbytes)
        found = metrics[alone(place, choice)]
        return GroupChoice(
            bytes=nbytes, metrics=found, own_kld=floor.above(found.kld, before[place])
        )

    scored_groups = tuple(
        ScoredGroup(
            name=group.name,
            block=group.block,
            kind=group.kind,
            linears=group.linears,
            choices={
                name: scored(place, choice, size)
                for choice, (name, size) in enumerate(zip(choices.names, sizes[place]))
                if size is not None
            },
        )
        for place, group in enumerate(groups)
    )
    by_name = {choices.names[choice]: metrics[whole(choice)] for choice in wholes}
    return GroupScores(
        groups=scored_groups,
        whole=by_name,
        noise_floor=floor,
        additivity={
            name: additivity(scored_groups, name, found.kld, floor.deepest)
            for name, found in by_name.items()
        },
        bytes=_bytes(choices),
    )


def _bytes(choices: Choices) -> CheckpointBytes:
    plan = choices.recipe
    return CheckpointBytes(
        all_kept=plan.bytes_before,
        all_quantized=plan.bytes_after,
        untied=sum(row.bytes_after for row in plan.parameters if row.name in plan.added),
    )


@dataclass(frozen=True)
class SecondPass:
    """What the second pass adds. The fields are those of `Sensitivity`."""

    scores: GroupScores
    order: tuple[int, ...]
    pareto: tuple[ParetoLine, ...]
    solution: Solution | None
    remarks: tuple[str, ...]


def second_pass(
    scorer: VariantScorer, model: LayerGroups, sqnr: LayerSqnr, first: GroupScores
) -> SecondPass:
    """first: the scores of the first pass, whose groups get their layers and `restored`."""
    ranks, choices, options = scorer.ranks, scorer.choices, scorer.options
    ranked = ranking(first.groups)
    lines = pareto_lines(first, choices.names)
    solution = ranks.broadcast_from_first(
        lambda: solve(first, options.max_size, options.max_kld, choices.allowed)
    )
    quantized = model.uniform(RECIPE_NUMBER)
    variants: dict[Label, Variant] = {BASE: model.uniform(KEEP_NUMBER), QUANTIZED: quantized}
    for place in ranked[:RESTORED]:
        variants[restored(place)] = with_choice(quantized, place, KEEP_NUMBER)
    for number, line in enumerate(lines):
        to = choices.names.index(line.to)
        for moved in line.measured:
            places = set(line.order[:moved])
            variants[pareto_point(number, moved)] = tuple(
                to if place in places else RECIPE_NUMBER for place in range(len(first.groups))
            )
    if solution is not None:
        variants[SOLUTION] = tuple(choices.names.index(name) for name in solution.choices)
    metrics = scorer.measure("restored", model.groups, variants, model.blocks)

    layers, total = sqnr.by_place(), metrics[QUANTIZED].kld
    groups = tuple(
        replace(
            group,
            layers=layers.get(place, ()),
            restored=_restored(metrics.get(restored(place)), total),
        )
        for place, group in enumerate(first.groups)
    )
    if solution is not None:
        solution = replace(solution, measured=metrics[SOLUTION])
    return SecondPass(
        scores=replace(first, groups=groups),
        order=tuple(ranked),
        pareto=tuple(_measured(line, number, metrics) for number, line in enumerate(lines)),
        solution=solution,
        remarks=_remarks(model),
    )


def _restored(metrics: VariantMetrics | None, quantized_kld: float) -> Restored | None:
    if metrics is None:
        return None
    return Restored(metrics=metrics, gain=quantized_kld - metrics.kld)


def _measured(line: ParetoLine, number: int, metrics: Mapping[Label, VariantMetrics]) -> ParetoLine:
    """The line with the metrics of its points that were run."""
    points = (
        replace(point, measured=metrics.get(pareto_point(number, point.k))) for point in line.points
    )
    return replace(line, points=tuple(points))


def _remarks(model: LayerGroups) -> tuple[str, ...]:
    if not model.outside:
        return ()
    first, *others = model.outside
    more = f" and {len(others)} more" if others else ""
    return (f"{first}{more}: outside the blocks, not scored, always quantized as in the recipe",)
