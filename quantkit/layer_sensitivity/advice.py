"""From the KLs of layer groups to advice: a ranking, how well sums predict, Pareto lines, and a
budget's solution.

Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.checkpoint.model_files import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.layer_sensitivity import knapsack
from quantkit.layer_sensitivity.choices import RECIPE
from quantkit.layer_sensitivity.options import KEEP
from quantkit.layer_sensitivity.result import (
    SCHEMA_VERSION,
    Additivity,
    GroupScores,
    ParetoLine,
    ParetoPoint,
    ScoredGroup,
    Sensitivity,
    Solution,
)
from quantkit.schemes.scheme import QuantScheme

# Sums are reliable enough for a budget if they are off by less than this factor: predictions are
# scaled by the measured factor, and a budget's solution depends on ratios alone.
ADDITIVE_WITHIN = 2.0


def ranking(groups: Sequence[ScoredGroup]) -> list[int]:
    """Places of the layer groups, the one with the largest KL first."""
    return sorted(range(len(groups)), key=lambda place: (-groups[place].own_kld, place))


def additivity(groups: Sequence[ScoredGroup], name: str, whole: float, floor: float) -> Additivity:
    """The sum of single KLs compared with the KL of all groups together, in nats above the floor.

    name: the choice that the groups have.
    whole: KL of the model with all groups quantized.
    floor: the noise floor.
    """
    total = sum(group.choices[name].own_kld for group in groups)
    own = max(0.0, whole - floor)
    factor = own / total if total > 0 and own > 0 else 1.0
    return Additivity(
        sum=total,
        whole=own,
        factor=factor,
        additive=1 / ADDITIVE_WITHIN <= factor <= ADDITIVE_WITHIN,
    )


def predicted_kld(scores: GroupScores, choices: Sequence[str]) -> float:
    """The predicted KL, in nats, of a choice for each group.

    The groups' KLs are added and scaled, so that the prediction for the whole recipe is its
    measured KL. If any group is quantized, the noise floor is added.
    """
    total = sum(
        _factor(scores, name) * group.choices[name].own_kld
        for group, name in zip(scores.groups, choices)
        if name != KEEP
    )
    changed = [group.block for group, name in zip(scores.groups, choices) if name != KEEP]
    floor = scores.noise_floor.values
    return total + (floor[min(changed)] if changed and total > 0 else 0.0)


def checkpoint_bytes(scores: GroupScores, choices: Sequence[str]) -> int:
    """Bytes of the checkpoint's tensors with a choice for each group."""
    moved = sum(
        group.choices[name].bytes - group.choices[RECIPE].bytes
        for group, name in zip(scores.groups, choices)
    )
    return scores.bytes.all_quantized + moved


def pareto_lines(scores: GroupScores, names: Sequence[str]) -> list[ParetoLine]:
    """For each other choice: size and predicted KL when the worst k groups take it, by k."""
    return [_pareto_line(scores, to) for to in names if to != RECIPE]


def _pareto_line(scores: GroupScores, to: str) -> ParetoLine:
    groups = scores.groups

    def gain(place: int) -> float:
        return groups[place].own_kld - groups[place].choices[to].own_kld

    able = [place for place in range(len(groups)) if to in groups[place].choices]
    order = sorted(able, key=lambda place: (-gain(place), place))
    points = []
    for k in range(len(order) + 1):
        moved = set(order[:k])
        choices = [to if place in moved else RECIPE for place in range(len(groups))]
        points.append(
            ParetoPoint(
                k=k,
                bytes=checkpoint_bytes(scores, choices),
                kld_predicted=predicted_kld(scores, choices),
            )
        )
    measured = [0]
    while (k := 2 ** (len(measured) - 1)) <= len(order):
        measured.append(k)
    return ParetoLine(to=to, order=tuple(order), measured=tuple(measured), points=tuple(points))


def read_earlier_result(path: Path, checkpoint: Checkpoint) -> Sensitivity:
    """The result that an earlier run wrote.

    Raises EvaluationError for another file, NotComparableError for the result of another model.
    """
    other = EvaluationError(
        f"{path} is not a result that sensitivity has written", hint="give one, or run it again"
    )
    try:
        content = read_json(path, "")
    except CheckpointError:
        raise other from None
    version = content.get("schema_version")
    if "sets" not in content:
        raise other
    if version != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has format {version}, but this quantkit reads {SCHEMA_VERSION}",
            hint="run sensitivity again",
        )
    try:
        result = Sensitivity.from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise other from None
    result.require_model(checkpoint, str(path))
    return replace(result, was_finished=False)


def solve_again(
    result: Sensitivity, max_size: str | None, max_kld: float | None, alternatives: Sequence[str]
) -> Sensitivity:
    """The result with another budget's solution. Nothing is run.

    alternatives: those that the solution may use; all that were scored if none is named.
    """
    named = [name if name == KEEP else QuantScheme.parse(name).name for name in alternatives]
    unknown = next(
        (name for name in named if name != KEEP and name not in result.alternatives), None
    )
    if unknown is not None:
        raise EvaluationError(
            f"{unknown} was not scored as an alternative",
            hint=f"run again with `alternatives={[unknown]}`",
        )
    allowed = named or result.alternatives
    return replace(result, solution=solve(result.scores, max_size, max_kld, allowed))


def solve(
    scores: GroupScores, max_size: str | None, max_kld: float | None, allowed: Sequence[str]
) -> Solution | None:
    """The optimal choice for each group within the budget, by predictions. None without a budget.

    Raises EvaluationError if no choice meets the budget.
    """
    if max_size is None and max_kld is None:
        return None
    sizes, limit = scores.bytes, None
    if max_size is not None:
        limit = knapsack.parse_size(max_size, sizes.all_kept, sizes.all_quantized)
    items = [_item(scores, group, allowed) for group in scores.groups]
    fixed = sizes.all_quantized - sum(group.choices[RECIPE].bytes for group in scores.groups)
    floor = scores.noise_floor.deepest
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
            predicted_kld(scores, [RECIPE] * len(items)),
        )
        raise EvaluationError(
            f"no choice meets {' and '.join(asked)}: the smallest is {smallest} bytes, and the"
            f" lowest predicted KL is {best:.2g}",
            hint="raise the limit, or allow more `alternatives`",
        )
    choices = tuple(item.names[number] for item, number in zip(items, found))
    return Solution(
        max_size=max_size,
        max_size_bytes=limit,
        max_kld=max_kld,
        choices=choices,
        bytes=checkpoint_bytes(scores, choices),
        kld_predicted=predicted_kld(scores, choices),
        moved=sum(name != RECIPE for name in choices),
    )


def _item(scores: GroupScores, group: ScoredGroup, allowed: Sequence[str]) -> knapsack.Item:
    """A group's choices, their bytes and their predicted KLs."""
    names = tuple(name for name in (RECIPE, *allowed) if name in group.choices)
    choices = [group.choices[name] for name in names]
    costs = tuple(
        0.0 if name == KEEP else _factor(scores, name) * choice.own_kld
        for name, choice in zip(names, choices)
    )
    return knapsack.Item(names, tuple(choice.bytes for choice in choices), costs)


def _factor(scores: GroupScores, name: str) -> float:
    """The factor that scales a scheme's KLs to predictions.

    It is the recipe's factor if some group can't have this scheme.
    """
    return scores.additivity.get(name, scores.additivity[RECIPE]).factor
