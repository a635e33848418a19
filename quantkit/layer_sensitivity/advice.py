"""From the KLs of layer groups to advice: a ranking, how well sums predict, Pareto lines, and a
budget's solution with its recipe.

Nothing here runs a model. `result` is the dictionary that `sensitivity` writes as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, EvaluationError, NotComparableError
from quantkit.exporter.plan import ExportOptions, plan_export
from quantkit.layer_sensitivity import knapsack
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.options import KEEP
from quantkit.models.tensor_roles import linears_of
from quantkit.schemes.mixed_recipe import mixed_recipe
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme

SCHEMA_VERSION = 1
# Keys of a result that are printed but not stored: they differ from run to run.
UNSTORED_KEYS = ("seconds", "peak_memory_bytes", "was_finished")
# Sums are reliable enough for a budget if they are off by less than this factor: predictions are
# scaled by the measured factor, and a budget's solution depends on ratios alone.
ADDITIVE_WITHIN = 2.0


def ranking(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the layer groups, the one with the largest KL first."""
    return sorted(
        range(len(rows)), key=lambda place: (-rows[place]["choices"][RECIPE]["own_kld"], place)
    )


def additivity(
    rows: Sequence[Mapping[str, Any]], name: str, whole: float, floor: float
) -> dict[str, Any]:
    """The sum of single KLs compared with the KL of all groups together, in nats above the floor.

    whole: KL of the model with all groups quantized. floor: the noise floor.
    Returns "factor", by which sums are multiplied to predict.
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
    """The predicted KL, in nats, of a choice for each group.

    The groups' KLs are added and scaled, so that the prediction for the whole recipe is its
    measured KL. If any group is quantized, the noise floor is added.
    """
    total = sum(
        _factor(result, name) * row["choices"][name]["own_kld"]
        for row, name in zip(result["sets"], choices)
        if name != KEEP
    )
    changed = [row["block"] for row, name in zip(result["sets"], choices) if name != KEEP]
    return total + (result["floor"][min(changed)] if changed and total > 0 else 0.0)


def size_of(result: Mapping[str, Any], choices: Sequence[str]) -> int:
    """Bytes of the checkpoint's tensors with a choice for each group."""
    moved = sum(
        row["choices"][name]["bytes"] - row["choices"][RECIPE]["bytes"]
        for row, name in zip(result["sets"], choices)
    )
    return result["bytes"]["all_quantized"] + moved


def pareto_lines(result: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each other choice: size and predicted KL when the worst k groups take it, by k.

    Returns also "measured": the k whose variants are run.
    """
    return [_pareto_line(result, to) for to in names if to != RECIPE]


def _pareto_line(result: Mapping[str, Any], to: str) -> dict[str, Any]:
    rows = result["sets"]

    def gain(place: int) -> float:
        choices = rows[place]["choices"]
        return choices[RECIPE]["own_kld"] - choices[to].get("own_kld", 0.0)

    able = [place for place in range(len(rows)) if to in rows[place]["choices"]]
    order = sorted(able, key=lambda place: (-gain(place), place))
    points = []
    for k in range(len(order) + 1):
        moved = set(order[:k])
        choices = [to if place in moved else RECIPE for place in range(len(rows))]
        points.append(
            {
                "k": k,
                "bytes": size_of(result, choices),
                "kld_predicted": predicted_kld(result, choices),
            }
        )
    measured = [0]
    while (k := 2 ** (len(measured) - 1)) <= len(order):
        measured.append(k)
    return {"to": to, "order": order, "measured": measured, "points": points}


def read_earlier_result(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The result that an earlier run wrote.

    Raises EvaluationError for another file, NotComparableError for the result of another model.
    """
    try:
        result = read_json(path, "")
        known = (
            result.get("schema_version"),
            isinstance(result["sets"], list) and result["model"]["fingerprint"],
        )
    except (CheckpointError, KeyError, TypeError, AttributeError):
        raise EvaluationError(
            f"{path} is not a result that sensitivity has written", hint="give one, or run it again"
        ) from None
    if known[0] != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has format {known[0]}, but this quantkit reads {SCHEMA_VERSION}",
            hint="run sensitivity again",
        )
    if known[1] != checkpoint.fingerprint():
        raise NotComparableError(
            f"{path} was made from another model ({result['model']['path']}) than"
            f" {checkpoint.path}, or its files have changed since",
            hint="run sensitivity on this one",
        )
    return result


def solve_again(
    result: Mapping[str, Any],
    max_size: str | None,
    max_kld: float | None,
    alternatives: Sequence[str],
) -> dict[str, Any]:
    """The result with another budget's solution. Nothing is run.

    alternatives: those that the solution may use; all that were scored if none is named.
    """
    named = [name if name == KEEP else QuantScheme.parse(name).name for name in alternatives]
    unknown = next(
        (name for name in named if name != KEEP and name not in result["alternatives"]), None
    )
    if unknown is not None:
        raise EvaluationError(
            f"{unknown} was not scored as an alternative",
            hint=f"run again with `alternatives={[unknown]}`",
        )
    return dict(result) | {
        "solution": solve(result, max_size, max_kld, named or result["alternatives"])
    }


def solution_recipe(result: Mapping[str, Any], checkpoint: Checkpoint) -> Recipe:
    """The recipe of a budget's solution. Its export has the solution's size."""
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
        # A plan without a calibration lacks the output head that an algorithm unties.
        expected = solution["bytes"] - result["bytes"].get("untied", 0)
        found = plan_export(where, calibration_follows=True, checkpoint=checkpoint).bytes_after
        assert found == expected, f"the recipe gives {found} bytes, not {expected}"
    return made


def solve(
    result: Mapping[str, Any], max_size: str | None, max_kld: float | None, allowed: Sequence[str]
) -> dict[str, Any] | None:
    """The optimal choice for each group within the budget, by predictions. None without a budget.

    Raises EvaluationError if no choice meets the budget.
    """
    if max_size is None and max_kld is None:
        return None
    rows, sizes = result["sets"], result["bytes"]
    limit = None
    if max_size is not None:
        limit = knapsack.parse_size(max_size, sizes["all_kept"], sizes["all_quantized"])
    items = [_item(result, row, allowed) for row in rows]
    fixed = sizes["all_quantized"] - sum(row["choices"][RECIPE]["bytes"] for row in rows)
    floor = result["floor"][0]
    found = knapsack.solve(
        items,
        None if limit is None else limit - fixed,
        None if max_kld is None else max_kld - floor,
    )
    if found is None:
        asked = [f"`max_size={max_size!r}` ({limit} bytes)"] if limit is not None else []
        asked += [f"`max_kld={max_kld:g}`"] if max_kld is not None else []
        smallest = sum(min(item.sizes) for item in items) + fixed
        best = min(
            sum(min(item.costs) for item in items) + floor,
            predicted_kld(result, [RECIPE] * len(items)),
        )
        raise EvaluationError(
            f"no choice meets {' and '.join(asked)}: the smallest is {smallest} bytes, and the"
            f" lowest predicted KL is {best:.2g}",
            hint="raise the limit, or allow more `alternatives`",
        )
    choices = [item.names[number] for item, number in zip(items, found)]
    return {
        "max_size": max_size,
        "max_size_bytes": limit,
        "max_kld": max_kld,
        "choices": choices,
        "bytes": size_of(result, choices),
        "kld_predicted": predicted_kld(result, choices),
        "moved": sum(name != RECIPE for name in choices),
    }


def _item(
    result: Mapping[str, Any], row: Mapping[str, Any], allowed: Sequence[str]
) -> knapsack.Item:
    """A group's choices, their bytes and their predicted KLs."""
    names = [name for name in (RECIPE, *allowed) if name in row["choices"]]
    entries = [row["choices"][name] for name in names]
    costs = [
        0.0 if name == KEEP else _factor(result, name) * entry["own_kld"]
        for name, entry in zip(names, entries)
    ]
    return knapsack.Item(tuple(names), tuple(entry["bytes"] for entry in entries), tuple(costs))


def _factor(result: Mapping[str, Any], name: str) -> float:
    """The factor that scales a scheme's KLs to predictions.

    It is the recipe's factor if some group can't have this scheme.
    """
    additive = result["additivity"]
    return additive.get(name, additive.get(RECIPE, {"factor": 1.0}))["factor"]
