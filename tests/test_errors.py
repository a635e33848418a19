"""Every refusal is one sentence: what the library raises says something, on one line. It speaks of
parameters, as Python does, and the command line prints them as its options.
"""

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from quantkit import errors
from quantkit.cli.main import main
from quantkit.cli.option_names import as_command_line
from quantkit.layer_sensitivity.knapsack import parse_size
from quantkit.models.skeleton import pick_device

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


def library_files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "cli")]


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of a file's strings except docstrings, with `'{}'` for each value in them."""
    tree = ast.parse(path.read_text())
    # docstrings, and the parts of f-strings, which are strings of their own to ast
    passed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= {id(part) for part in node.values}
            parts = [
                part.value if isinstance(part, ast.Constant) else "'{}'" for part in node.values
            ]
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and id(node) not in passed:
            yield node.lineno, node.value


def test_the_library_names_no_option_of_the_command_line():
    """Neither in messages nor in docstrings and comments: its reader may be a Python program's."""
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in library_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"(?<!var\()(?<![\w-])(--[a-z]|-o\b)", line)  # CSS has variables so
    ]
    assert found == []


def test_what_a_message_has_in_backticks_is_printed_as_an_option_or_a_command():
    """Each is a parameter or a call that the command line knows, so that none is printed raw."""
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {phrase}": f"`{phrase}`"
        for path in library_files()
        for line, text in strings(path)
        for phrase in re.findall(r"`([^`]+)`", text)
        if phrase != "'{}'"
    }
    assert len(found) > 80
    with click.Context(main):
        unknown = [where for where, text in found.items() if as_command_line(text) == text]
    assert unknown == []


def test_the_library_prints_nothing():
    """It returns, raises and reports progress; whether and where that is shown is its caller's."""
    found = []
    for path in library_files():
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name) and node.id == "print":
                found.append(where)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.stdout",
                "sys.stderr.write",
            ):
                found.append(where)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                if any((name or "").partition(".")[0] in ("click", "rich") for name in names):
                    found.append(where)
    assert found == []


def test_a_hint_ends_the_message():
    error = errors.OutputError("it exists", hint="pass `overwrite=True`")
    assert (
        str(error) == "it exists; pass `overwrite=True`" and error.hint == "pass `overwrite=True`"
    )
    assert str(errors.OutputError("it exists")) == "it exists"


def test_a_refusal_has_parameters_in_python_and_options_on_the_command_line(llama, tmp_path, run):
    from quantkit.checkpoint.output_checks import check_output

    with pytest.raises(errors.OutputError) as caught:
        check_output(llama, overwrite=False)
    assert caught.value.hint == "choose another `output` or pass `overwrite=True`"
    (tmp_path / "file").write_text("")
    printed = run("export", llama, "-o", tmp_path, "--scheme", "fp8-dynamic").stderr
    assert printed == (
        f"Error: {tmp_path} exists and is not empty; choose another -o or pass --overwrite\n"
    )


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (
            ("calibrate", "{llama}", "-o", "{out}", "--seq-len", 512),
            "--seq-len 512 is more than the 256 positions of this model; use 256 or less",
        ),
        (
            ("export", "{llama}", "-o", "{out}", "--scheme", "fp8-static"),
            "first `quantkit calibrate {llama} -o CALIB`, then pass --calibration CALIB",
        ),
        (
            ("export", "{llama}", "-o", "{out}", "--scheme", "int8-dynamic", "--format", "fp8"),
            "--format fp8 holds fp8-block only, not int8-dynamic; use --scheme fp8-block, or"
            " --format compressed-tensors",
        ),
        (
            ("export", "{llama}", "-o", "{out}", "--recipe", "{gptq}"),
            "first `quantkit calibrate {llama} -o CALIB --recipe RECIPE`, then pass --calibration",
        ),
        (
            ("eval", "{llama}", "--data", "{text}", "--gate", "top1>=1"),
            "--gate needs a quantized model to compare with the base",
        ),
        (
            ("eval", "{llama}", "--data", "{text}", "--seq-len", 100_000),
            "--seq-len 100000 is more than",
        ),
        (
            ("sensitivity", "{llama}", "--scheme", "fp8-dynamic", "--max-kld", 0),
            "--max-kld must be more than 0",
        ),
    ],
)
def test_the_command_line_prints_options(arguments, printed, llama, text, tmp_path, run):
    (tmp_path / "gptq.yaml").write_text("scheme: int8-dynamic\nalgorithms: [gptq]\n")
    places = {"llama": llama, "text": text, "out": tmp_path / "o", "gptq": tmp_path / "gptq.yaml"}
    done = run(*(str(argument).format(**places) for argument in arguments))
    assert done.exit_code == 1 and printed.format(**places) in done.stderr, done.stderr
    assert not re.search(r"`\w+(=[^`]*)?`", done.stderr)


def test_values_are_in_the_message_as_python_has_them():
    with pytest.raises(errors.EvaluationError, match=r"^`max_size='lots'` is not understood; "):
        parse_size("lots", 1, 1)
    with pytest.raises(errors.QuantkitError, match="^unknown device 'gpu'"):
        pick_device("gpu")


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


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_errors_go_from_process_to_process(name):
    arguments = (75,) if name == "FollowerStopped" else ("wrong", "mend it")
    error = getattr(errors, name)(*arguments)
    if name == "NonFiniteError":
        error = errors.NonFiniteError("wrong", "mend it", path="model")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and vars(again) == vars(error) and str(again) == str(error)
