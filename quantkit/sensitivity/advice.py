"""From the figures of `sensitivity` to advice: a ranking, how well sums predict, Pareto lines, and
a budget's solution with its recipe. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, EvaluationError, NotComparableError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.mixed_recipe import mixed_recipe
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme
from quantkit.sensitivity import knapsack

SCHEMA_VERSION = 1
KEEP = "keep"  # the choice of leaving a set in the dtype it is stored in
RECIPE = "recipe"
# Sums are good enough to choose by while they are off by less than this factor: predictions are
# scaled by it, and budgets depend on ratios alone.
ADDITIVE_WITHIN = 2.0


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
    return sorted(
        range(len(rows)), key=lambda place: (-rows[place]["choices"][RECIPE]["own_kld"], place)
    )


def additivity(
    rows: Sequence[Mapping[str, Any]], name: str, whole: float, floor: float
) -> dict[str, Any]:
    """The sum of single KLs against the KL of all sets together, both beyond the floor. factor:
    what sums are multiplied by to predict.
    """
    total = sum(row["choices"][name]["own_kld"] for row in rows)
    own = max(0.0, whole - floor)
    factor = own / total if total > 0 and own > 0 else 1.0
    return {
        "sum": total,
        "whole": own,
        "factor": factor,
        "additive": 1 / ADDITIVE_WITHIN <= factor <= ADDITIVE_WITHIN,
    }


def predicted_kld(result: Mapping[str, Any], choices: Sequence[str]) -> float:
    """What sums say of a choice for each set, scaled so that the whole recipe's KL comes out, floor
    included where anything changes.
    """
    factors = {name: entry["factor"] for name, entry in result["additivity"].items()}
    factor = factors.get(RECIPE, 1.0)
    total = sum(
        factors.get(name, factor) * row["choices"][name]["own_kld"]
        for row, name in zip(result["sets"], choices)
        if name != KEEP
    )
    changed = [row["block"] for row, name in zip(result["sets"], choices) if name != KEEP]
    return total + (result["floor"][min(changed)] if changed and total > 0 else 0.0)


def size_of(result: Mapping[str, Any], choices: Sequence[str]) -> int:
    """Bytes of the checkpoint's tensors with a choice for each set."""
    moved = sum(
        row["choices"][name]["bytes"] - row["choices"][RECIPE]["bytes"]
        for row, name in zip(result["sets"], choices)
    )
    return result["bytes"]["all_quantized"] + moved


def pareto_lines(
    rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    """For each other choice: what the worst k sets cost that take it. measured: the k whose
    variants are run.
    """
    lines = []
    for to in [name for name in names if name != RECIPE]:
        able = [place for place in range(len(rows)) if to in rows[place]["choices"]]
        order = sorted(
            able,
            key=lambda place: (
                -(
                    rows[place]["choices"][RECIPE]["own_kld"]
                    - rows[place]["choices"][to].get("own_kld", 0.0)
                ),
                place,
            ),
        )
        points = []
        for k in range(len(order) + 1):
            moved = set(order[:k])
            choices = [to if place in moved else RECIPE for place in range(len(rows))]
            points.append(
                {
                    "k": k,
                    "bytes": size_of(result | {"sets": rows}, choices),
                    "kld_predicted": predicted_kld(result | {"sets": rows}, choices),
                }
            )
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
        known = (
            result.get("schema_version"),
            isinstance(result["sets"], list) and result["model"]["fingerprint"],
        )
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise EvaluationError(
            f"{path} is no result of `quantkit sensitivity -o`; give one, or leave out --from"
        ) from None
    if known[0] != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has format {known[0]}, this quantkit reads {SCHEMA_VERSION}; score again"
        )
    if known[1] != checkpoint.fingerprint():
        raise NotComparableError(
            f"{path} was made from another model ({result['model']['path']}) than"
            f" {checkpoint.path}, or its files have changed since; score this one"
        )
    return result


def solved_anew(
    result: Mapping[str, Any],
    max_size: str | None,
    max_kld: float | None,
    alternatives: Sequence[str],
) -> dict[str, Any]:
    """The result with another budget's solution; nothing is run. alternatives: of those that were
    scored, all where none is named.
    """
    named = [name if name == KEEP else QuantScheme.parse(name).name for name in alternatives]
    unknown = next(
        (name for name in named if name != KEEP and name not in result["alternatives"]), None
    )
    if unknown is not None:
        raise EvaluationError(
            f"{unknown} was not scored as an alternative; score again with --alternative {unknown}"
        )
    return dict(result) | {
        "solution": solve(result, max_size, max_kld, named or result["alternatives"])
    }


def solution_recipe(result: Mapping[str, Any], checkpoint: Checkpoint) -> Recipe:
    """The recipe of a budget's solution, whose export has the size that was promised."""
    recipe, solution = (
        Recipe.from_mapping(result["recipe"], "the result's recipe"),
        result["solution"],
    )
    taken = [
        (name, choice)
        for row, choice in zip(result["sets"], solution["choices"])
        for name in row["linears"]
    ]
    modules = linears_of(checkpoint).modules()
    moved = {
        name: QuantScheme.parse(choice) for name, choice in taken if choice not in (KEEP, RECIPE)
    }
    made = mixed_recipe(recipe, [name for name, choice in taken if choice == KEEP], moved, modules)
    if set(solution["choices"]) != {KEEP}:
        where = ExportOptions(
            checkpoint.path, checkpoint.path.with_name(checkpoint.path.name + "-sensitivity"), made
        )
        # What an algorithm unties is in no plan before its calibration is made.
        promised = solution["bytes"] - result["bytes"].get("untied", 0)
        found = plan_export(where, calibration_follows=True, checkpoint=checkpoint).bytes_after
        assert found == promised, f"the recipe gives {found} bytes, not {promised}"
    return made


def solve(
    result: Mapping[str, Any], max_size: str | None, max_kld: float | None, allowed: Sequence[str]
) -> dict[str, Any] | None:
    """The best choice for each set within the budget, exactly on sums; None without a budget.
    Raises EvaluationError where nothing fits.
    """
    if max_size is None and max_kld is None:
        return None
    limit = (
        None
        if max_size is None
        else knapsack.parse_size(
            max_size, result["bytes"]["all_kept"], result["bytes"]["all_quantized"]
        )
    )
    factors = {name: entry["factor"] for name, entry in result["additivity"].items()}
    items = []
    for row in result["sets"]:
        names = [name for name in (RECIPE, *allowed) if name in row["choices"]]
        cost = [
            (
                0.0
                if name == KEEP
                else factors.get(name, factors[RECIPE]) * row["choices"][name]["own_kld"]
            )
            for name in names
        ]
        items.append(
            knapsack.Item(
                tuple(names), tuple(row["choices"][name]["bytes"] for name in names), tuple(cost)
            )
        )
    fixed = result["bytes"]["all_quantized"] - sum(
        row["choices"][RECIPE]["bytes"] for row in result["sets"]
    )
    floor = result["floor"][0]
    chosen = knapsack.solve(
        items,
        None if limit is None else limit - fixed,
        None if max_kld is None else max_kld - floor,
    )
    if chosen is None:
        least, best = (
            size_of(
                result,
                [
                    min(item.names, key=lambda name: row["choices"][name]["bytes"])
                    for item, row in zip(items, result["sets"])
                ],
            ),
            min(
                sum(min(item.costs) for item in items) + floor,
                predicted_kld(result, [RECIPE] * len(items)),
            ),
        )
        asked = " and ".join(
            [
                *([f"--max-size {max_size} ({limit} bytes)"] if limit is not None else []),
                *([f"--max-kld {max_kld:g}"] if max_kld is not None else []),
            ]
        )
        raise EvaluationError(
            f"no choice meets {asked}: the smallest is {least} bytes, and the least KL that sums"
            f" predict is {best:.2g}; allow more, or another --alternative"
        )
    choices = [item.names[number] for item, number in zip(items, chosen)]
    return {
        "max_size": max_size,
        "max_size_bytes": limit,
        "max_kld": max_kld,
        "choices": choices,
        "bytes": size_of(result, choices),
        "kld_predicted": predicted_kld(result, choices),
        "moved": sum(name != RECIPE for name in choices),
    }
