"""The README is true: its help texts, its tree, its schemes and its commands.
`PYTHONPATH=tests/support python tests/end_to_end/test_readme.py` writes the help texts and the
tables of architectures and recipes anew.
"""

import re
import shlex
from pathlib import Path

import click
from architecture_kinds import architecture_table

from quantkit.cli.console import CONTEXT
from quantkit.cli.main import main
from quantkit.schemes.scheme import CATALOGUE, SCHEMES

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- help:begin -->\n", "<!-- help:end -->"
QUALITY_BEGIN, QUALITY_END = "<!-- quality:begin -->\n", "<!-- quality:end -->"
TABLE_BEGIN, TABLE_END = "<!-- architectures:begin -->\n", "<!-- architectures:end -->"


def help_texts() -> str:
    """`quantkit --help` and that of each command, as Markdown."""
    commands = [
        ("quantkit", main),
        *((f"quantkit {name}", main.commands[name]) for name in sorted(main.commands)),
    ]
    blocks = []
    for name, command in commands:
        context = click.Context(command, info_name=name, terminal_width=100, **CONTEXT)
        blocks.append(
            f"<details><summary><code>{name}"
            f" --help</code></summary>\n\n```text\n{command.get_help(context)}\n```\n\n</details>\n"
        )
    return "\n".join(blocks)


def quality_table() -> str:
    """What `benchmarks/quality.py` wrote, without its title."""
    return (ROOT / "benchmarks" / "results" / "quality.md").read_text().partition("\n\n")[
        2
    ].rstrip() + "\n"


def between(text: str, begin: str, end: str) -> str:
    return text[text.index(begin) + len(begin) : text.index(end)]


def with_between(text: str, begin: str, end: str, new: str) -> str:
    return text[: text.index(begin) + len(begin)] + new + text[text.index(end) :]


def test_help_texts_are_those_of_the_commands():
    assert between(README.read_text(), BEGIN, END) == help_texts(), (
        "run: PYTHONPATH=tests/support python tests/end_to_end/test_readme.py"
    )


def test_table_of_architectures_is_that_of_the_tests():
    assert between(README.read_text(), TABLE_BEGIN, TABLE_END) == architecture_table(), (
        "run: PYTHONPATH=tests/support python tests/end_to_end/test_readme.py"
    )


def test_table_of_recipes_is_the_measured_one():
    assert between(README.read_text(), QUALITY_BEGIN, QUALITY_END) == quality_table(), (
        "run: PYTHONPATH=tests/support python tests/end_to_end/test_readme.py"
    )


def test_tree_names_every_room_and_no_other():
    tree = re.search(r"## The house\n\n```text\n(.*?)```", README.read_text(), re.DOTALL)[1]
    named = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    rooms = [path.parent.name for path in (ROOT / "quantkit").glob("*/__init__.py")]
    assert sorted(named) == sorted(rooms)
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_table_of_schemes_is_that_of_the_code():
    text = README.read_text()
    for name, scheme in SCHEMES.items():
        aliases = ", ".join(CATALOGUE[name].aliases)
        row = (
            f"| `{name}` | {aliases} | {scheme.weight} | {scheme.input or 'as they are'} |"
            f" {'yes' if scheme.needs_calibration else ''} |"
        )
        assert row in text, row


def test_commands_of_the_readme_parse():
    commands = re.findall(r"^\$ (quantkit .*?)(?:  #.*)?$", README.read_text(), re.MULTILINE)
    assert len(commands) >= 6
    for line in commands:
        name, *arguments = shlex.split(line)[1:]
        main.commands[name].make_context(name, arguments)


def test_recipe_of_the_readme_is_one():
    import yaml

    from quantkit.schemes.recipe import Recipe

    for block in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL):
        recipe = Recipe.from_mapping(yaml.safe_load(block), "README")
        assert recipe.ignore[0].matches("model.layers.0.mlp.up_proj") and not recipe.ignore[
            0
        ].matches("model.layers.1.mlp.up_proj")


def test_files_that_the_readme_names_exist():
    for path in re.findall(
        r"`((?:configs|benchmarks|quantkit|tests)/[\w./-]*)`", README.read_text()
    ):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":
    made = with_between(README.read_text(), BEGIN, END, help_texts())
    made = with_between(made, TABLE_BEGIN, TABLE_END, architecture_table())
    README.write_text(with_between(made, QUALITY_BEGIN, QUALITY_END, quality_table()))
