"""A recipe in which some Linears have another scheme than the rest, written as few patterns, which
match those Linears and no others.
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
