"""Patterns that name modules: exact names, globs and regular expressions."""

from __future__ import annotations

import difflib
import fnmatch
import re
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
        """Refuse a pattern that matches none of `names`: a typo here would quantize, or leave, the
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
