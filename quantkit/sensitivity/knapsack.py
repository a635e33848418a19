"""Which choice each item takes so that a budget is kept and the sum of costs is least: the
multiple-choice knapsack problem, solved exactly.

Partial sums are built up item by item. Of two that hold the same items, one that is neither smaller
nor cheaper is dropped, and so is what can't end better than a solution that is known: the rest of
the items can at best follow the lower convex hull of their choices, whose sum over items is one
piecewise linear curve.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantkit.checkpoint.units import parse_bytes
from quantkit.errors import EvaluationError, QuantkitError

# Sums of the same numbers in another order differ by less than this share of what they could be at
# most.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Item:
    """names: of its choices; sizes and costs: of each of them."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    costs: tuple[float, ...]


def parse_size(text: str, whole: int, quantized: int) -> int:
    """A budget in bytes from `150MB`, `65%` (of the unquantized model) or `+5%` (beyond the model
    quantized throughout).
    """
    match = re.fullmatch(r"\s*(\+?)(\d+(?:\.\d+)?)\s*%\s*", text)
    if match:
        share = float(match[2]) / 100
        return int(quantized * (1 + share)) if match[1] else int(whole * share)
    try:
        return parse_bytes(text)
    except QuantkitError:
        raise EvaluationError(
            f"--max-size '{text}' is not understood; write for example 150MB, 65% (of the model's"
            " size) or +5% (more than all quantized)"
        ) from None


def solve(items: Sequence[Item], max_size: int | None, max_cost: float | None) -> list[int] | None:
    """The number of each item's choice; None where nothing keeps the budget.

    With max_size the cost is least within it (and must keep max_cost, if given). With max_cost
    alone the size is least, and of all so small the cheapest.
    """
    # whole numbers below 2^53: sums are exact
    sizes = [np.array(item.sizes, dtype=np.float64) for item in items]
    costs = [np.array(item.costs, dtype=np.float64) for item in items]
    if max_size is None:
        if max_cost is None:
            raise ValueError("a budget has a size or a cost")
        chosen = _least(sizes, costs, max_cost)
        if chosen is None:
            return None
        max_size = int(sum(size[number] for size, number in zip(sizes, chosen)))
    chosen = _least(costs, sizes, max_size)
    if chosen is None or (
        max_cost is not None
        and sum(float(cost[number]) for cost, number in zip(costs, chosen))
        > max_cost + ROUNDING * sum(float(cost.max()) for cost in costs)
    ):
        return None
    return chosen


def _least(
    objective: Sequence[np.ndarray], weight: Sequence[np.ndarray], limit: float
) -> list[int] | None:
    """The choices of least total objective whose total weight is at most the limit."""
    slack, margin = (
        ROUNDING * sum(float(np.abs(values).max()) for values in sums)
        for sums in (weight, objective)
    )
    limit = limit + slack
    curves = _remaining_curves(objective, weight)
    if limit < curves[0][0][0]:
        return None
    best = _rounded_relaxation(objective, weight, limit)
    # Each state: total weight, total objective, the state before it and the choice that led here.
    totals, values = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(len(objective)):
        new_totals = (totals[:, None] + weight[number]).ravel()
        new_values = (values[:, None] + objective[number]).ravel()
        before = np.repeat(np.arange(len(totals)), len(weight[number]))
        choice = np.tile(np.arange(len(weight[number])), len(totals))
        at, least = curves[number + 1]
        fits = limit - new_totals >= at[0] - slack
        bound = new_values + np.interp(limit - new_totals, at, least)
        kept = np.flatnonzero(fits & (bound <= best + margin))
        ranked = kept[np.lexsort((new_values[kept], new_totals[kept]))]
        smallest = np.minimum.accumulate(new_values[ranked])
        undominated = (
            np.concatenate([[True], new_values[ranked][1:] < smallest[:-1]])
            if len(ranked)
            else np.zeros(0, bool)
        )
        ranked = ranked[undominated]
        totals, values = new_totals[ranked], new_values[ranked]
        history.append((before[ranked], choice[ranked]))
    if not len(values):
        return None
    state, chosen = int(values.argmin()), []
    for before, choice in reversed(history):
        chosen.append(int(choice[state]))
        state = int(before[state])
    return chosen[::-1]


def _hull(objective: np.ndarray, weight: np.ndarray) -> list[int]:
    """The choices on the lower convex hull of (weight, objective), from the lightest to the
    best.
    """
    hull: list[int] = []
    for number in np.lexsort((objective, weight)):
        if hull and objective[number] >= objective[hull[-1]]:
            continue
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            rise = (objective[second] - objective[first]) * (weight[number] - weight[first])
            if rise < (objective[number] - objective[first]) * (weight[second] - weight[first]):
                break
            hull.pop()
        hull.append(int(number))
    return hull


def _steps(
    objective: Sequence[np.ndarray], weight: Sequence[np.ndarray]
) -> list[list[tuple[float, float, int]]]:
    """Of each item: the hull's steps as (weight more, objective less, choice)."""
    steps = []
    for values, totals in zip(objective, weight):
        hull = _hull(values, totals)
        steps.append(
            [
                (float(totals[b] - totals[a]), float(values[a] - values[b]), b)
                for a, b in zip(hull, hull[1:])
            ]
        )
    return steps


def _remaining_curves(
    objective: Sequence[np.ndarray], weight: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each number of items done: the least objective that the others could have at a weight if
    choices could be mixed, as a curve (weights, objectives).
    """
    steps = _steps(objective, weight)
    curves = []
    for done in range(len(objective) + 1):
        lightest = [
            int(np.lexsort((values, totals))[0])
            for values, totals in zip(objective[done:], weight[done:])
        ]
        start = (
            sum(float(totals[n]) for totals, n in zip(weight[done:], lightest)),
            sum(float(values[n]) for values, n in zip(objective[done:], lightest)),
        )
        ordered = sorted(
            (step for each in steps[done:] for step in each), key=lambda step: -step[1] / step[0]
        )
        at = np.cumsum([start[0], *(step[0] for step in ordered)])
        least = start[1] - np.cumsum([0.0, *(step[1] for step in ordered)])
        curves.append((at, least))
    return curves


def _rounded_relaxation(
    objective: Sequence[np.ndarray], weight: Sequence[np.ndarray], limit: float
) -> float:
    """The objective of a solution that fits: the best steps that still do, taken one after the
    other.
    """
    total = sum(float(totals.min()) for totals in weight)
    value = sum(
        float(values[np.lexsort((values, totals))[0]]) for values, totals in zip(objective, weight)
    )
    taken, steps = [0] * len(objective), _steps(objective, weight)
    ordered = sorted(
        (
            (gain / more, number, place)
            for number, each in enumerate(steps)
            for place, (more, gain, _) in enumerate(each)
        ),
        key=lambda step: -step[0],
    )
    for _, number, place in ordered:
        more, gain, _ = steps[number][place]
        if taken[number] == place and total + more <= limit:
            total, value, taken[number] = total + more, value - gain, place + 1
    return value
