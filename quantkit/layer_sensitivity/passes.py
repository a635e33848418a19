"""The two passes of a run. The first scores each layer group quantized alone, all groups quantized,
and the noise floor. The second scores what depends on these: the worst groups kept in an otherwise
quantized model, points of the Pareto lines, and the budget's solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.layer_sensitivity.advice import additivity, pareto_lines, ranking, solve
from quantkit.layer_sensitivity.base_model import open_base_model
from quantkit.layer_sensitivity.choices import KEEP_NUMBER, RECIPE_NUMBER, Choices
from quantkit.layer_sensitivity.layer_groups import LayerGroup, layer_groups
from quantkit.layer_sensitivity.layer_sqnr import LayerSqnr
from quantkit.layer_sensitivity.layer_swap import Perturbation
from quantkit.layer_sensitivity.measure import VariantMetrics, VariantScorer
from quantkit.layer_sensitivity.noise_floor import NoiseFloor, depths, measured_blocks
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


def first_pass(scorer: VariantScorer, model: LayerGroups, sqnr: LayerSqnr) -> dict[str, Any]:
    """The KLs of groups and of all together, and the noise floor, as in the result's JSON."""
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
        {each.block: metrics[perturbed(each.block)].kld.value for each in perturbations},
        model.blocks,
    )
    rows = [_row(group, choices, size) for group, size in zip(groups, sizes)]
    before = depths(groups)
    for place, choice in singles:
        found = metrics[alone(place, choice)]
        rows[place]["choices"][choices.names[choice]] |= found.to_json() | {
            "own_kld": floor.above(found.kld.value, before[place])
        }
    by_name = {choices.names[choice]: metrics[whole(choice)] for choice in wholes}
    return {
        "sets": rows,
        "whole": {name: found.to_json() for name, found in by_name.items()},
        "floor": list(floor.values),
        "additivity": {
            name: additivity(rows, name, found.kld.value, floor.deepest)
            for name, found in by_name.items()
        },
        "bytes": _bytes(choices),
    }


def _row(group: LayerGroup, choices: Choices, sizes: Sequence[int | None]) -> dict[str, Any]:
    return {
        "name": group.name,
        "block": group.block,
        "kind": group.kind,
        "linears": list(group.linears),
        "choices": {
            name: {"bytes": size} for name, size in zip(choices.names, sizes) if size is not None
        },
        "layers": [],
    }


def _bytes(choices: Choices) -> dict[str, int]:
    """Bytes of the checkpoint's tensors. untied: of an output head that an algorithm unties."""
    plan = choices.recipe
    return {
        "all_kept": plan.bytes_before,
        "all_quantized": plan.bytes_after,
        "untied": sum(row.bytes_after for row in plan.parameters if row.name in plan.added),
    }


def second_pass(
    scorer: VariantScorer, model: LayerGroups, sqnr: LayerSqnr, first: dict[str, Any]
) -> dict[str, Any]:
    """Complete the result of the first pass. first: that result; its groups are extended."""
    ranks, choices, rows = scorer.ranks, scorer.choices, first["sets"]
    for place, layers in sqnr.by_place().items():
        rows[place]["layers"] = layers
    ranked = ranking(rows)
    lines = pareto_lines(first, choices.names)
    options = scorer.options
    solution = ranks.broadcast_from_first(
        lambda: solve(first, options.max_size, options.max_kld, choices.allowed)
    )
    quantized = model.uniform(RECIPE_NUMBER)
    variants: dict[Label, Variant] = {BASE: model.uniform(KEEP_NUMBER), QUANTIZED: quantized}
    for place in ranked[:RESTORED]:
        variants[restored(place)] = with_choice(quantized, place, KEEP_NUMBER)
    for number, line in enumerate(lines):
        to = choices.names.index(line["to"])
        for moved in line["measured"]:
            places = set(line["order"][:moved])
            variants[pareto_point(number, moved)] = tuple(
                to if place in places else RECIPE_NUMBER for place in range(len(rows))
            )
    if solution is not None:
        variants[SOLUTION] = tuple(choices.names.index(name) for name in solution["choices"])
    metrics = scorer.measure("restored", model.groups, variants, model.blocks)

    _add_restored(rows, ranked[:RESTORED], metrics)
    for number, line in enumerate(lines):
        for moved in line["measured"]:
            line["points"][moved]["measured"] = metrics[pareto_point(number, moved)].to_json()
    if solution is not None:
        solution["measured"] = metrics[SOLUTION].to_json()
    return first | {
        "ranking": ranked,
        "pareto": lines,
        "solution": solution,
        "remarks": _remarks(model),
    }


def _add_restored(
    rows: Sequence[dict[str, Any]], places: Sequence[int], metrics: dict[Label, VariantMetrics]
) -> None:
    """gain: how much the KL of the quantized model falls if the group is kept."""
    total = metrics[QUANTIZED].kld.value
    for place in places:
        found = metrics[restored(place)]
        rows[place]["restored"] = found.to_json() | {"gain": total - found.kld.value}


def _remarks(model: LayerGroups) -> list[str]:
    if not model.outside:
        return []
    first, *others = model.outside
    more = f" and {len(others)} more" if others else ""
    return [f"{first}{more}: outside the blocks, not scored, always quantized as in the recipe"]
