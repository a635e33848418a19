"""Show the lines `name: meaning` of quantkit's docstrings as lists of parameters or fields.

A griffe extension, which `make docs` loads: such lines become a section of a Google-style
docstring, so that each parameter stands on the page with its type and default.
"""

import re

import griffe

_LINE = re.compile(r"(\w+(?:, \w+)*): \S")


class Fields(griffe.Extension):
    """Rewrites the docstrings of functions and classes while their modules are read."""

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        _rewrite(func, "Parameters", {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        attributes = {name for name, member in cls.members.items() if member.is_attribute}
        initializer = cls.members.get("__init__")
        parameters = (
            {parameter.name for parameter in initializer.parameters}
            if isinstance(initializer, griffe.Function)
            else set()
        )
        _rewrite(cls, "Attributes", attributes | parameters)


def _rewrite(described: griffe.Object, section: str, names: set[str]) -> None:
    if described.docstring:
        described.docstring.value = with_section(described.docstring.value, section, names)


def with_section(docstring: str, section: str, names: set[str]) -> str:
    """The docstring, whose blocks of lines `name: meaning` have become sections.

    names: the parameters or fields that exist; a block begins with the line of one or more of them.
        Lines that are indented continue a meaning.
    """
    blocks = docstring.split("\n\n")
    for number, block in enumerate(blocks):
        found = _LINE.match(block)
        if found and names.issuperset(found[1].split(", ")):
            lines = [line for entry in re.split(r"\n(?! )", block) for line in _apart(entry)]
            blocks[number] = "\n".join([f"{section}:", *(f"    {line}" for line in lines)])
    return "\n\n".join(blocks)


def _apart(entry: str) -> list[str]:
    """The lines of an entry; `a, b: meaning` becomes one entry for each name."""
    found = _LINE.match(entry)
    if not found:
        return entry.split("\n")
    meaning = entry[found.end(1) :]
    return [line for name in found[1].split(", ") for line in f"{name}{meaning}".split("\n")]
