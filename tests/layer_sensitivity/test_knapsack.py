"""The budget's solver against brute force, and sizes as they are written."""

import itertools
import time

import numpy as np
import pytest

from quantkit.errors import EvaluationError
from quantkit.layer_sensitivity.knapsack import Item, parse_size, solve


def random_items(generator: np.random.Generator, count: int, choices: int) -> list[Item]:
    return [
        Item(
            tuple(map(str, range(choices))),
            tuple(int(size) for size in generator.integers(1, 12, choices)),
            tuple(
                float(cost)
                for cost in generator.choice([0.0, 0.1, 0.25, *generator.random(3)], choices)
            ),
        )
        for _ in range(count)
    ]


def brute_force(
    items: list[Item], max_size: int | None, max_cost: float | None
) -> tuple[float, float] | None:
    """(size, cost) of the best: least cost where a size is given, else least size and of these
    least cost.
    """
    found = []
    for chosen in itertools.product(*(range(len(item.sizes)) for item in items)):
        size = sum(item.sizes[number] for item, number in zip(items, chosen))
        cost = sum(item.costs[number] for item, number in zip(items, chosen))
        if (max_size is None or size <= max_size) and (
            max_cost is None or cost <= max_cost * (1 + 1e-12)
        ):
            found.append((cost, size) if max_size is not None else (size, cost))
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_is_better_than_the_solution(seed):
    generator = np.random.default_rng(seed)
    items = random_items(generator, int(generator.integers(1, 7)), int(generator.integers(1, 4)))
    most = sum(max(item.sizes) for item in items)
    max_size = int(generator.integers(0, most + 2)) if seed % 3 != 1 else None
    max_cost = float(generator.random() * len(items) * 0.6) if seed % 3 else None
    chosen, best = solve(items, max_size, max_cost), brute_force(items, max_size, max_cost)
    if best is None:
        assert chosen is None
        return
    size = sum(item.sizes[number] for item, number in zip(items, chosen))
    cost = sum(item.costs[number] for item, number in zip(items, chosen))
    if max_size is not None:
        assert size <= max_size and cost == pytest.approx(best[0], abs=1e-12)
    else:
        assert size == best[0] and cost == pytest.approx(best[1], abs=1e-12)
    assert max_cost is None or cost <= max_cost * (1 + 1e-9)


def test_a_hundred_and_sixty_items_of_unlike_sizes_take_seconds():
    generator = np.random.default_rng(0)
    items = []
    for _ in range(160):
        size, cost = int(generator.integers(10_000, 60_000_000)), float(generator.lognormal(-8, 2))
        items.append(
            Item(
                ("recipe", "keep", "other"),
                (size, 2 * size, size + 512),
                (cost, 0.0, cost * float(generator.random())),
            )
        )
    started = time.monotonic()
    for share in (1.01, 1.2, 1.7):
        assert solve(items, int(share * sum(item.sizes[0] for item in items)), None) is not None
    assert solve(items, None, 0.3 * sum(item.costs[0] for item in items)) is not None
    assert time.monotonic() - started < 20


def test_everything_fits_a_loose_budget_and_nothing_a_tight_one():
    items = [Item(("a", "b"), (1, 2), (1.0, 0.0))] * 3
    assert solve(items, 6, None) == [1, 1, 1]
    assert solve(items, 3, None) == [0, 0, 0]
    assert (
        solve(items, 2, None) is None
        and solve(items, None, -0.1) is None
        and solve(items, 3, 2.0) is None
    )
    assert solve(items, None, 1.0).count(1) == 2
    # Costs that add up to nothing but for rounding.
    uneven = [
        Item(("recipe", "keep"), (1, 2), (cost, 0.0))
        for cost in (1.3e-1, 1.7e-4, 0.9e-3, 1.1e-7, 0.3)
    ]
    assert solve(uneven, 10, None) == [1] * 5 and solve(uneven, None, 0.0) == [1] * 5


def test_sizes_are_bytes_shares_of_the_whole_or_more_than_all_quantized():
    assert parse_size("150MB", 1, 1) == 150_000_000
    assert parse_size("65%", 1000, 600) == 650 and parse_size(" 62.5 % ", 1000, 600) == 625
    assert parse_size("+5%", 1000, 600) == 630
    for text in ("much", "-5%", "5%%", "%"):
        with pytest.raises(EvaluationError, match="max_size"):
            parse_size(text, 1000, 600)
