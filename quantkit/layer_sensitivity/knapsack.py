"""The multiple-choice knapsack problem, solved exactly: one choice for each item, so that the sum
of costs is minimal within a budget.

Partial sums are built up item by item. A partial sum is dropped if another one is smaller and
cheaper (dominance), or if it can't lead to a better solution than a known one (bound). For the
bound, the other items can at best follow the lower convex hulls of their choices, whose sum over
items is one piecewise linear curve (Sinha & Zoltners 1979, The Multiple-Choice Knapsack Problem).

A mixed-integer solver would stop at a relative gap and accept small violations of the budget.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.checkpoint.units import parse_bytes
from quantkit.errors import EvaluationError, QuantkitError

# Sums of the same numbers in another order differ by less than this fraction of the largest
# possible sum.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Item:
    """An item and its choices.

    names: of the choices.
    sizes: of the choices, bytes.
    costs: of the choices.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    costs: tuple[float, ...]


def parse_size(text: str, whole: int, quantized: int) -> int:
    """The bytes of `150MB`, `65%` (of the unquantized model) or `+5%` (more than all quantized).

    whole: bytes of the unquantized model. quantized: bytes of the model with all groups quantized.
    """
    match = re.fullmatch(r"\s*(\+?)(\d+(?:\.\d+)?)\s*%\s*", text)
    if match:
        share = float(match[2]) / 100
        return int(quantized * (1 + share)) if match[1] else int(whole * share)
    try:
        return parse_bytes(text)
    except QuantkitError:
        raise EvaluationError(
            f"`max_size={text!r}` is not understood",
            hint="write for example 150MB, 65% (of the model's size) or +5% (more than with all"
            " layer groups quantized)",
        ) from None


def solve(items: Sequence[Item], max_size: int | None, max_cost: float | None) -> list[int] | None:
    """The number of each item's choice, or None if no solution meets the budget.

    With max_size, the cost is minimal within it, and None is returned if it exceeds max_cost. With
    max_cost alone, the size is minimal; of the smallest solutions, the cheapest is returned.
    """
    # Integers below 2^53: their sums are exact.
    sizes = [np.array(item.sizes, dtype=np.float64) for item in items]
    costs = [np.array(item.costs, dtype=np.float64) for item in items]
    if max_size is None:
        if max_cost is None:
            raise ValueError("a budget has a size or a cost")
        smallest = _least(sizes, costs, max_cost)
        if smallest is None:
            return None
        max_size = sum(item.sizes[number] for item, number in zip(items, smallest))
    found = _least(costs, sizes, max_size)
    if found is None or max_cost is None:
        return found
    total = sum(item.costs[number] for item, number in zip(items, found))
    return found if total <= max_cost + _rounding(costs) else None


def _rounding(values: Sequence[np.ndarray]) -> float:
    return ROUNDING * sum(float(np.abs(each).max()) for each in values)


def _least(
    objective: Sequence[np.ndarray], weight: Sequence[np.ndarray], limit: float
) -> list[int] | None:
    """The choices with the least total objective and a total weight of at most `limit`.

    objective, weight: by item, of its choices.
    """
    slack, margin = _rounding(weight), _rounding(objective)
    limit += slack
    hulls = [_Hull.of(*item) for item in zip(objective, weight)]
    curves = _remaining_curves(hulls)
    if limit < curves[0].weights[0]:
        return None
    best = _rounded_relaxation(hulls, limit)
    # Partial sums over the items so far: total weight and total objective.
    weights, values = np.zeros(1), np.zeros(1)
    # For each item and partial sum: the previous partial sum, and the choice that was added.
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for item, curve in enumerate(curves[1:]):
        choices = len(objective[item])
        before = np.repeat(np.arange(len(weights)), choices)
        choice = np.tile(np.arange(choices), len(weights))
        new_weights = weights[before] + weight[item][choice]
        new_values = values[before] + objective[item][choice]
        room = limit - new_weights
        bound = new_values + np.interp(room, curve.weights, curve.objectives)
        useful = np.flatnonzero((room >= curve.weights[0] - slack) & (bound <= best + margin))
        ranked = useful[np.lexsort((new_values[useful], new_weights[useful]))]
        # In the order of weights, only sums with a smaller objective than all before.
        least_before = np.minimum.accumulate(np.append(np.inf, new_values[ranked]))[:-1]
        ranked = ranked[new_values[ranked] < least_before]
        weights, values = new_weights[ranked], new_values[ranked]
        history.append((before[ranked], choice[ranked]))
    if not len(values):
        return None
    state, found = int(values.argmin()), []
    for before, choice in reversed(history):
        found.append(int(choice[state]))
        state = int(before[state])
    return found[::-1]


@dataclass(frozen=True)
class _Hull:
    """The lower convex hull of an item's choices in the plane of weight and objective.

    weight, objective: of the lightest choice.
    steps: to each next choice on the hull, (weight more, objective less).
    """

    weight: float
    objective: float
    steps: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, objective: np.ndarray, weight: np.ndarray) -> _Hull:
        points: list[tuple[float, float]] = []
        for number in np.lexsort((objective, weight)):
            point = float(weight[number]), float(objective[number])
            if points and point[1] >= points[-1][1]:
                continue
            while len(points) > 1 and not _is_convex(points[-2], points[-1], point):
                points.pop()
            points.append(point)
        steps = tuple((b[0] - a[0], a[1] - b[1]) for a, b in zip(points, points[1:]))
        return cls(*points[0], steps)


def _is_convex(
    first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]
) -> bool:
    """Whether the second of three points of rising weight is below the line of the others."""
    return (second[1] - first[1]) * (third[0] - first[0]) < (third[1] - first[1]) * (
        second[0] - first[0]
    )


@dataclass(frozen=True)
class _Curve:
    """The least total objective of some items, if choices could be mixed, by total weight.

    It is piecewise linear between these points.
    """

    weights: np.ndarray
    objectives: np.ndarray


def _remaining_curves(hulls: Sequence[_Hull]) -> list[_Curve]:
    """For each number of items already chosen, the curve of the others."""
    curves = []
    for done in range(len(hulls) + 1):
        others = hulls[done:]
        # The steps that gain most per weight come first.
        steps = sorted(
            (step for hull in others for step in hull.steps), key=lambda step: -step[1] / step[0]
        )
        weight, objective = sum(h.weight for h in others), sum(h.objective for h in others)
        curves.append(
            _Curve(
                np.cumsum([weight, *(more for more, _ in steps)]),
                objective - np.cumsum([0.0, *(less for _, less in steps)]),
            )
        )
    return curves


def _rounded_relaxation(hulls: Sequence[_Hull], limit: float) -> float:
    """The objective of a solution within the limit.

    It takes the steps that gain most per weight, as long as they fit.
    """
    weight, objective = sum(h.weight for h in hulls), sum(h.objective for h in hulls)
    taken = [0] * len(hulls)
    steps = [(item, place) for item, hull in enumerate(hulls) for place in range(len(hull.steps))]

    def gain(step: tuple[int, int]) -> float:
        more, less = hulls[step[0]].steps[step[1]]
        return less / more

    for item, place in sorted(steps, key=gain, reverse=True):
        more, less = hulls[item].steps[place]
        if taken[item] == place and weight + more <= limit:
            weight, objective, taken[item] = weight + more, objective - less, place + 1
    return objective
