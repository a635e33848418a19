"""Show the lines `name: meaning` of quantkit's docstrings as lists of parameters or fields.

A griffe extension, which `make docs` loads: such lines become a section of a Google-style
docstring, so that each parameter stands on the page with its type and default.
"""

import re

import griffe

_LINE = re.compile(r"(\w+): \S")


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

    names: the parameters or fields that exist; a block begins with the line of one of them. Lines
        that are indented continue a meaning.
    """
    blocks = []
    for block in docstring.split("\n\n"):
        lines = block.split("\n")
        found = _LINE.match(lines[0])
        if found and found[1] in names:
            lines = [f"{section}:", *(f"    {line}" for line in lines)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
