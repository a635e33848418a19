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
    """A pattern for module names. Raises RecipeError if the text is no such pattern.

    text: an exact name; a glob, with `*`, `?` or `[`; or `re:` and a regular expression, which is
        anchored at the start of the name only.
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
        """Raise RecipeError if the pattern matches none of `names`: with a typo, the wrong layers
        would be quantized or skipped.

        purpose: the pattern's part in the recipe, for the message, such as "ignore".
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


# The number of a decoder block: the first path component that is a number, after the name of a list
# (`layers.3.`, `h.3.`, `block.3.`).
BLOCK = re.compile(r"^(?P<prefix>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.(?P<number>\d+)\.")


# Names become patterns in two ways. `covering_patterns` returns globs that a user can type for
# `ignore`: as few as possible, each as wide as the other names allow. `patterns_for` returns
# regular expressions for a recipe file, which list the blocks explicitly.


def covering_patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest patterns for `ignore` that match all of `names` and none of `others`.

    Each name is covered by the widest candidate that is allowed: its parent module, the same Linear
    in every block (numbers become `*`), its block, or the name itself.
    """
    others = list(others)
    patterns: list[Pattern] = []
    refused: set[str] = set()
    for name in names:
        if any(pattern.matches(name) for pattern in patterns):
            continue
        for text in _candidates(name):
            pattern = Pattern(text)
            if text == name or (
                text not in refused
                and pattern.matches(name)
                and not any(pattern.matches(other) for other in others)
            ):
                patterns.append(pattern)
                break
            refused.add(text)
    return [pattern.text for pattern in patterns]


def _candidates(name: str) -> list[str]:
    """Patterns that may cover a name, the widest first. The last is the name itself."""
    numberless = ".".join("*" if part.isdigit() else part for part in name.split("."))
    parent = numberless.rpartition(".")[0]
    block = BLOCK.match(name)
    wide = [f"{parent}.*", numberless] if parent else []
    return [*wide, *([f"{block[0]}*"] if block else []), name]


def patterns_for(names: Iterable[str], others: Iterable[str]) -> list[Pattern]:
    """Patterns for a recipe that match all of `names` and none of `others`.

    Blocks in which the same Linears are named share one pattern, and so do all experts of a layer.
    """
    names, others = list(dict.fromkeys(names)), list(others)
    found, unnumbered = _block_patterns(names)
    numbered_names = set(names) - set(unnumbered)
    matched = {name for name in (*names, *others) if any(p.matches(name) for p in found)}
    if matched == numbered_names:
        return [*found, *map(Pattern, unnumbered)]
    # A further number was no expert's, so one pattern for all of them matches too much.
    return [*map(Pattern, sorted(numbered_names)), *map(Pattern, unnumbered)]


def _block_patterns(names: list[str]) -> tuple[list[Pattern], list[str]]:
    """One pattern for each group of blocks that name the same Linears, with any expert number; and
    the names that have no block number.
    """
    # (path before the block number, path after it) → block numbers
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
    """A regular expression for one of these words."""
    words = list(words)
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
