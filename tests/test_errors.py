"""Every refusal is one sentence: what the library raises says something, on one line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit import errors

PACKAGE = Path(errors.__file__).parent
REFUSALS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.QuantkitError)
}


def literal_text(node: ast.expr) -> str | None:
    """A message as written, with `{}` for each value in it; None of one that is made elsewhere."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal_text(part) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [literal_text(side) for side in (node.left, node.right)]
        return "".join(part or "{}" for part in parts) if any(parts) else None
    return None


def messages() -> Iterator[tuple[str, str | None]]:
    """Where a QuantkitError is made, and its message. FollowerStopped has none: rank 0 speaks."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in REFUSALS - {"FollowerStopped"}:
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                yield where, literal_text(node.args[0]) if node.args else ""


def test_every_message_is_one_line_that_says_something():
    found = dict(messages())
    literal = {where: text for where, text in found.items() if text is not None}
    assert len(literal) > 150 and len(literal) > 0.8 * len(found)
    for where, text in literal.items():
        assert "\n" not in text, f"{where} has several lines"
        assert text == text.strip() and text.replace("{}", "").strip(" :;,."), f"{where}: '{text}'"
        assert not text.endswith("."), f"{where} ends with a period: the command line adds none"


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_every_kind_of_refusal_has_an_exit_code_of_its_own_or_1(name):
    refusal = getattr(errors, name)
    expected = {"FaultsFound": 3, "Inconclusive": 4, "NotComparableError": 5, "Interrupted": 75}
    if name != "FollowerStopped":
        assert refusal.exit_code == expected.get(name, 1)
