"""docs/architecture.md speaks of files and names that are there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = sorted(path.parent.name for path in (ROOT / "quantkit").glob("*/__init__.py"))
FILES = sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py)", TEXT)))
NAMES = sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py): ([\w.]+)`", TEXT)))


def test_each_room_is_described():
    described = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", TEXT, re.MULTILINE)
    assert [room for room in described if room != "errors"] == [
        room for room in re.findall(r"\w+", TEXT.split("```")[1]) if room in ROOMS
    ]
    assert set(described) == {*ROOMS, "errors"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_named_exists(name):
    assert (ROOT / "quantkit" / name).is_file()


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_a_name_in_a_file_is_defined_there(file, name):
    found = importlib.import_module("quantkit." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
