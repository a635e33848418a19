"""Change a recipe so that some Linears are skipped and others get another scheme, with as few
patterns as possible. `sensitivity` writes such recipes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quantkit.schemes.pattern import patterns_for
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import QuantScheme


def mixed_recipe(
    recipe: Recipe,
    skipped: Iterable[str],
    schemes: Mapping[str, QuantScheme],
    modules: Iterable[str],
) -> Recipe:
    """The recipe with changes for some Linears.

    recipe: the recipe to change.
    skipped: names of the Linears that stay unquantized.
    schemes: Linear → the scheme that it gets instead of the recipe's.
    modules: names of all modules, so that patterns match no others.
    """
    skipped, modules = list(skipped), list(modules)
    by_scheme: dict[QuantScheme, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        by_scheme[scheme].append(name)
    skipping = patterns_for(skipped, set(modules) - set(skipped)) if skipped else ()
    ignore = (*recipe.ignore, *skipping)
    layers = [
        (pattern, scheme)
        for scheme, names in by_scheme.items()
        for pattern in patterns_for(names, set(modules) - set(names))
    ]
    unassigned = {name for name in modules if not any(pattern.matches(name) for pattern in ignore)}
    applying = []
    for pattern, scheme in (*layers, *recipe.layers):
        matched = {name for name in unassigned if pattern.matches(name)}
        unassigned -= matched
        if matched:  # a recipe with a pattern that never applies would be refused
            applying.append((pattern, scheme))
    return replace(recipe, ignore=ignore, layers=tuple(applying))


def recipe_text(recipe: Recipe, comments: Iterable[str]) -> str:
    """The recipe as a YAML file. comments: lines at its top, without the `#`."""
    import yaml

    content: dict[str, Any] = {
        key: value
        for key, value in recipe.to_mapping().items()
        if value and (key, value) != ("observer", "absmax")
    }
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(
        content, sort_keys=False, width=10_000, default_flow_style=None
    )
