"""The pages of docs/ that follow from code and measurements are up to date, and complete."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from quantkit.cli.main import main

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def load(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("generate")
PAGES = generate.pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_generated_page_is_up_to_date(path):
    assert path.read_text() == PAGES[path], "run: python docs/generate.py"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_the_page_of_commands_has_each_option_in_the_command_s_own_section(name):
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGES[DOCS / "cli.md"], re.M | re.S)[1]
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert all(option in section for option in parameter.opts), parameter.opts


@pytest.mark.parametrize("name", sorted(main.commands))
def test_an_example_parses(name):
    program, command, *arguments = shlex.split(generate.EXAMPLES[name])
    assert (program, command) == ("quantkit", name)
    main.commands[name].make_context(name, arguments)


def test_exit_codes_are_those_of_the_errors():
    from quantkit import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    of_errors = {
        kind.exit_code
        for kind in kinds
        if issubclass(kind, errors.QuantkitError) and isinstance(kind.exit_code, int)
    }
    assert set(generate.EXIT_CODES) == of_errors | {0, 2}


@pytest.mark.parametrize("folder", ["benchmarks/results", "kernels/bench/results"])
def test_each_measured_table_is_on_a_page(folder):
    shown = {
        path
        for sections in (generate.QUALITY, generate.SPEED, generate.KERNELS)
        for section in sections
        for path in section.files
    } | {"benchmarks/results/sweep.md", "benchmarks/results/architectures.md"}
    for path in (ROOT / folder).glob("*.md"):
        assert path.relative_to(ROOT).as_posix() in shown


def test_each_measured_section_names_its_machine():
    for sections in (generate.QUALITY, generate.SPEED, generate.KERNELS):
        for section in sections:
            for path in section.files:
                assert "Intel" in generate.Measured(path).text, path


def test_a_cell_of_code_may_hold_a_bar():
    assert generate.code("--kind [a|b]") == "<code>--kind [a&#124;b]</code>"


def test_a_notebook_s_code_and_outputs_are_fenced(tmp_path):
    import json

    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Words"]},
        {
            "cell_type": "code",
            "source": "print(1)\n2",
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
                {"output_type": "execute_result", "data": {"text/plain": "2"}},
            ],
        },
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    page = generate.notebook_page(tmp_path / "n.ipynb")
    assert page.startswith("# Title\n\n<!--") and "[n.ipynb](n.ipynb)" in page
    assert page.endswith(
        "Words\n\n```python\nprint(1)\n2\n```\n\n```text\n1\n```\n\n```text\n2\n```\n"
    )


def test_lines_of_fields_become_a_section():
    griffe = pytest.importorskip("griffe", reason="the extra docs isn't installed")
    assert griffe
    rewritten = load("griffe_fields").with_section(
        "Do it.\n\nfirst: one thing,\n    on two lines.\nsecond, third: another.\n\n"
        "Note: not a field.",
        "Parameters",
        {"first", "second", "third"},
    )
    assert rewritten == (
        "Do it.\n\nParameters:\n    first: one thing,\n        on two lines.\n"
        "    second: another.\n    third: another.\n\nNote: not a field."
    )
