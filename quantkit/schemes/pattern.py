"""Patterns that name modules: exact names, globs and regular expressions."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from quantkit.errors import RecipeError


@dataclass(frozen=True)
class Pattern:
    """A module name to match: exact, a glob with `*?[`, or `re:` and a regular expression anchored
    at the start.
    """

    text: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.removeprefix("re:").strip():
            raise RecipeError(
                f"the pattern {self.text!r} is not a module name, a glob, or 're:' with a regular"
                " expression"
            )
        if self.text.startswith("re:"):
            try:
                regex = re.compile(self.text[3:])
            except re.error as error:
                raise RecipeError(
                    f"the pattern '{self.text}' is not a regular expression: {error}"
                ) from None
        elif any(character in self.text for character in "*?["):
            regex = re.compile(fnmatch.translate(self.text))
        else:
            regex = re.compile(re.escape(self.text) + r"\Z")
        object.__setattr__(self, "_regex", regex)

    def matches(self, name: str) -> bool:
        return self._regex.match(name) is not None

    def require_match(self, names: Iterable[str], purpose: str) -> None:
        """Refuse a pattern that matches none of `names`: a typo here would quantize, or skip, the
        wrong layers.
        """
        names = list(names)
        if any(self.matches(name) for name in names):
            return
        suffixes = {name.rsplit(".", 1)[-1] for name in names}
        hint = f"did you mean 're:.*{self.text}'?" if self.text in suffixes else ""
        if not hint:
            close = difflib.get_close_matches(self.text, [*names, *suffixes], n=1, cutoff=0.6)
            hint = (
                f"the nearest name is '{close[0]}'"
                if close
                else f"a name looks like '{names[0]}'"
                if names
                else ""
            )
        raise RecipeError(
            f"the {purpose} pattern '{self.text}' matches no module of this model; {hint}".rstrip(
                "; "
            )
        )


# A block's number: the first path component that is a number, after a list's name (`layers.3.`,
# `h.3.`, `block.3.`).
BLOCK = re.compile(r"^(?P<prefix>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(?P<number>\d+)\.")


# Two ways to write names as patterns. `covering_patterns` makes globs for a person to type after
# --ignore: as few as possible, each as wide as the other names allow. `patterns_for` makes regular
# expressions for a recipe file: exactly these blocks, so that the recipe says which they are.


def covering_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """As few patterns for --ignore as match all of `names` and none of `others`: a whole module
    where all in it is meant, numbers as `*`, or a whole block.
    """
    others = list(others)
    patterns: list[Pattern] = []
    refused: set[str] = set()
    for name in names:
        if any(pattern.matches(name) for pattern in patterns):
            continue
        numberless = ".".join("*" if part.isdigit() else part for part in name.split("."))
        block = BLOCK.match(name)
        for text in (
            f"{numberless.rpartition('.')[0]}.*",
            numberless,
            f"{block[0]}*" if block else name,
            name,
        ):
            pattern = Pattern(text)
            if text == name or (
                text not in refused and not any(pattern.matches(other) for other in others)
            ):
                patterns.append(pattern)
                break
            refused.add(text)
    return [pattern.text for pattern in patterns]


def patterns_for(names: Iterable[str], others: Iterable[str]) -> list[Pattern]:
    """Patterns for a recipe that match all of `names` and none of `others`: one for the blocks that
    share their kinds of Linear, with the experts of a layer as one.
    """
    names, others = list(dict.fromkeys(names)), list(others)
    found, unnumbered = _block_patterns(names)
    meant = set(names) - set(unnumbered)
    matched = {name for name in (*names, *others) if any(p.matches(name) for p in found)}
    # Numbers that mean something else than an expert's may be told apart by exact names only.
    numbered = found if matched == meant else [Pattern(name) for name in sorted(meant)]
    return [*numbered, *map(Pattern, unnumbered)]


def _block_patterns(names: list[str]) -> tuple[list[Pattern], list[str]]:
    """A pattern for each set of blocks and the Linears that are meant in them, whatever the numbers
    of experts; and the names without a block's number.
    """
    # (before a block's number, after it) → numbers
    by_path: dict[tuple[str, str], list[str]] = defaultdict(list)
    unnumbered: list[str] = []
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..+)", name)
        if match is None:
            unnumbered.append(name)
            continue
        path = re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(match[3]))
        numbers = by_path[match[1], path]
        if match[2] not in numbers:
            numbers.append(match[2])
    by_blocks: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (before, path), numbers in by_path.items():
        parent, _, leaf = path.rpartition(r"\.")
        by_blocks[before, parent, tuple(sorted(numbers, key=int))].append(leaf)
    patterns = [
        Pattern(f"re:{re.escape(before)}{_either(blocks)}{parent}\\.{_either(leaves)}$")
        for (before, parent, blocks), leaves in by_blocks.items()
    ]
    return patterns, unnumbered


def _either(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
