"""docs/architecture.md speaks of files and names that are there.
`python tests/test_architecture.py` writes its list of files anew, from their docstrings.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text()
BEGIN, END = "<!-- files:begin -->\n", "<!-- files:end -->"
ROOMS = sorted(path.parent.name for path in (ROOT / "quantkit").glob("*/__init__.py"))
FILES = sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py)", TEXT)))
DRAWN = sorted(
    set(re.findall(rf"(?:{'|'.join(ROOMS)})/[\w/]*(?:\.py)?", " ".join(TEXT.split("```text")[1:])))
)
NAMES = sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py): ([\w.]+)`", TEXT)))


def first_sentence(path: Path) -> str:
    """Of a module's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<! al)\. (?=[A-Z`])", text)[0].removesuffix(".")


def file_list() -> str:
    """Each room with its files, in the order of the rooms, as Markdown."""
    order = [room for room in re.findall(r"\w+", TEXT.split("```")[1]) if room in ROOMS]
    blocks = []
    for room in order:
        package = ROOT / "quantkit" / room
        files = sorted(path for path in package.rglob("*.py") if path.name != "__init__.py")
        rows = [
            f"| `{path.relative_to(package.parent).as_posix()}` | {first_sentence(path)} |\n"
            for path in files
        ]
        blocks.append(f"### {room}\n\n| file | |\n|---|---|\n{''.join(rows)}")
    return "\n".join(blocks)


def test_the_list_of_files_is_that_of_their_docstrings():
    listed = TEXT[TEXT.index(BEGIN) + len(BEGIN) : TEXT.index(END)]
    assert listed == file_list(), "run: python tests/test_architecture.py"


def test_each_room_is_described():
    described = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", TEXT, re.MULTILINE)
    assert [room for room in described if room != "errors"] == [
        room for room in re.findall(r"\w+", TEXT.split("```")[1]) if room in ROOMS
    ]
    assert set(described) == {*ROOMS, "errors"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_named_exists(name):
    assert (ROOT / "quantkit" / name).is_file()


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_drawing_names_exists(name):
    assert (ROOT / "quantkit" / name).exists()


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_a_name_in_a_file_is_defined_there(file, name):
    found = importlib.import_module("quantkit." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)


if __name__ == "__main__":
    start, end = TEXT.index(BEGIN) + len(BEGIN), TEXT.index(END)
    PAGE.write_text(TEXT[:start] + file_list() + TEXT[end:])
