"""The site of docs/: its navigation, its links, and nothing from other hosts.

`make docs` checks links as well, but a test needs no generator.
"""

import importlib
import re
from pathlib import Path

import pytest
import yaml

import quantkit
import quantkit.errors

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
# Written by `make gpu` on a machine with a GPU.
NOT_YET = {"kernels/bench/results/gpu.md"}
PAGES = sorted(DOCS.glob("*.md"))


def navigated(entries) -> list[str]:
    """The files of a navigation, in its order."""
    files = []
    for entry in entries:
        for target in entry.values():
            files += [target] if isinstance(target, str) else navigated(target)
    return files


def without_code(text: str) -> str:
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "", text)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^()\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """The ids of a page's headings, as Markdown's `toc` makes them, and of objects that it
    describes.
    """
    ids = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    ids |= {f"quantkit.errors.{name}" for name in vars(quantkit.errors)}
    outside = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.+?) *$", outside, re.MULTILINE):
        kept = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower()
        base = name = re.sub(r"[-\s]+", "-", kept)
        number = 0
        while name in ids:
            number += 1
            name = f"{base}_{number}"
        ids.add(name)
    return ids


def test_the_navigation_names_each_page_once():
    assert sorted(navigated(CONFIG["nav"])) == [path.name for path in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_pages_and_headings_of_the_site(path):
    for link in links(path.read_text()):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = DOCS / target if target else path
        assert file.resolve().is_relative_to(DOCS), f"{link}: outside of the site"
        assert file.is_file(), f"{link}: no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), f"{link}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_list_begins_after_an_empty_line_or_it_would_be_a_paragraph(path):
    lines = without_code(path.read_text()).split("\n")
    for before, line in zip(lines, lines[1:]):
        if re.match(r"(\d+\.|[-*]) ", line):
            assert not before or re.match(r"\d+\. |[-*] |  ", before), line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_has_one_title(path):
    outside = re.sub(r"^(`{3,}).*?^\1", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"^# ", outside, re.MULTILINE)) == 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_draws_with_text_because_mermaid_is_loaded_from_another_host(path):
    assert "```mermaid" not in path.read_text()


def described() -> list[str]:
    """The objects that the page of the Python API describes."""
    return re.findall(r"^::: ([\w.]+)$", (DOCS / "python.md").read_text(), re.MULTILINE)


def test_the_page_of_the_python_api_describes_each_public_name():
    names = {f"quantkit.{name}" for name in quantkit.__all__ if name != "QuantkitError"}
    assert names <= set(described()) and "quantkit.errors" in described()


@pytest.mark.parametrize("name", described())
def test_what_the_page_of_the_python_api_describes_exists(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_fonts_come_from_the_reader_s_machine():
    assert CONFIG["theme"]["font"] is False


def test_files_that_the_pages_name_exist():
    names = r"`((?:benchmarks|configs|docs|kernels|quantkit|tests)/[\w./-]*)`"
    for path in PAGES:
        # Words in capitals stand for names that a reader chooses.
        for name in (name for name in re.findall(names, path.read_text()) if name.islower()):
            assert (ROOT / name).exists() or name in NOT_YET, f"{path.name}: {name}"
