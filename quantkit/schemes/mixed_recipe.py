"""A recipe in which some Linears take other choices than the rest: written as few patterns, which
match what is meant and nothing else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quantkit.schemes.pattern import Pattern
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme


def patterns_for(names: Iterable[str], others: Iterable[str]) -> list[Pattern]:
    """Patterns that match all of `names` and none of `others`: blocks of one kind of Linear
    together, experts of a layer as one.
    """
    names, others = list(dict.fromkeys(names)), list(others)
    # what stands before a block's number and behind it → blocks
    by_path: dict[tuple[str, str], list[str]] = defaultdict(list)
    alone: list[str] = []
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..+)", name)
        if match is None:
            alone.append(name)
            continue
        numbers = by_path[match[1], re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(match[3]))]
        if match[2] not in numbers:
            numbers.append(match[2])
    by_blocks: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (before, behind), numbers in by_path.items():
        parent, _, leaf = behind.rpartition(r"\.")
        by_blocks[before, parent, tuple(sorted(numbers, key=int))].append(leaf)
    found = []
    for (before, parent, numbers), leaves in by_blocks.items():
        pattern = Pattern(f"re:{re.escape(before)}{_either(numbers)}{parent}\\.{_either(leaves)}$")
        found.append(pattern)
    meant, matched = (
        set(names) - set(alone),
        {name for name in (*names, *others) if any(pattern.matches(name) for pattern in found)},
    )
    # Numbers that mean something else than an expert's may be told apart by exact names only.
    return [*(found if matched == meant else map(Pattern, sorted(meant))), *map(Pattern, alone)]


def _either(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"


def mixed_recipe(
    recipe: Recipe, kept: Iterable[str], moved: Mapping[str, QuantScheme], modules: Iterable[str]
) -> Recipe:
    """The recipe with some Linears left as they are and others in another scheme. modules: all
    names that patterns may meet.
    """
    kept, modules = list(kept), list(modules)
    by_scheme: dict[QuantScheme, list[str]] = defaultdict(list)
    for name, scheme in moved.items():
        by_scheme[scheme].append(name)
    ignore = (*recipe.ignore, *(patterns_for(kept, set(modules) - set(kept)) if kept else ()))
    layers = [
        (pattern, scheme)
        for scheme, names in by_scheme.items()
        for pattern in patterns_for(names, set(modules) - set(names))
    ]
    open_names = {name for name in modules if not any(pattern.matches(name) for pattern in ignore)}
    applying = []
    for pattern, scheme in (*layers, *recipe.layers):
        matched = {name for name in open_names if pattern.matches(name)}
        open_names -= matched
        if matched:  # one that never applies would be refused
            applying.append((pattern, scheme))
    return replace(recipe, ignore=ignore, layers=tuple(applying))


def recipe_text(recipe: Recipe, comments: Iterable[str]) -> str:
    """A recipe file."""
    import yaml

    content: dict[str, Any] = {
        key: value
        for key, value in recipe.to_mapping().items()
        if value and (key, value) != ("observer", "absmax")
    }
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(
        content, sort_keys=False, width=10_000, default_flow_style=None
    )
