"""README and docs/ are true: their tree, schemes, tables, commands, recipes, files and links.
`PYTHONPATH=tests/support python tests/end_to_end/test_readme.py` writes their tables and the plot
anew.
"""

import json
import re
import shlex
import sys

import pytest
import yaml
from documents import (
    DOCS,
    README,
    ROOT,
    WRITTEN,
    anchors,
    code_blocks,
    commands,
    links,
    sentences,
    word_count,
)

from quantkit.cli.main import main
from quantkit.cli.schemes import describe_schemes
from quantkit.schemes.recipe import Recipe
from quantkit.schemes.scheme import CATALOGUE, SCHEMES
from quantkit.schemes.serving import HARDWARE, RUNTIMES

sys.path.insert(0, str(ROOT / "benchmarks"))
from plot_quality import PLOT, quality_svg  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MOST_README_LINES = 250
# Words in a sentence. Docs have room for one longer sentence now and then.
MOST_WORDS = {README: 25}
MOST_WORDS_IN_DOCS = 30
# Written by `make gpu` on a machine with a GPU.
NOT_YET = {"kernels/bench/results/gpu.md"}
REGENERATE = "run: PYTHONPATH=tests/support python tests/end_to_end/test_readme.py"

written = pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)


# ---- Tables that are made from code and from measurements.


def quality_rows() -> tuple[list[str], dict[str, list[str]]]:
    """The table that `benchmarks/quality.py` wrote: its columns, and recipe → cells."""
    lines = (RESULTS / "quality.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return rows[0], {row[0]: row for row in rows[2:]}


def quality_table(recipes: list[str], columns: list[str]) -> str:
    names, rows = quality_rows()
    chosen = [[rows[recipe][names.index(column)] for column in columns] for recipe in recipes]
    return markdown(columns, chosen)


def markdown(columns, rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def schemes_table() -> str:
    rows = [
        [
            f"`{row['scheme']}`",
            ", ".join(row["aliases"]),
            row["weight"],
            row["input"] or "not quantized",
            "needed" if row["needs_calibration"] else "",
        ]
        for row in describe_schemes()
    ]
    return markdown(["scheme", "alias", "weights", "input activations", "calibration"], rows)


def stored_forms():
    """(scheme or scheme with format, support by runtime, support by hardware)."""
    for row in describe_schemes():
        yield f"`{row['scheme']}`", row["runtimes"], row["hardware"]
        for name, runtimes in row["formats"].items():
            yield f"`{row['scheme']}`, `--format {name}`", runtimes, row["hardware"]


def support_table() -> str:
    rows = []
    for name, runtimes, hardware in stored_forms():
        loads = ["yes" if runtimes[each]["loads"] else "no" for each in RUNTIMES]
        modes = [
            {"native": "yes", "weights": "W8A16"}.get(hardware[each], "no") for each in HARDWARE
        ]
        rows.append([name, *loads, *modes])
    return markdown(["scheme", *RUNTIMES, *HARDWARE], rows)


def notes_table() -> str:
    rows = []
    for name, runtimes, hardware in stored_forms():
        rows += [[name, each, of["note"]] for each, of in runtimes.items() if of["note"]]
        if "--format" not in name:
            modes = hardware.items()
            rows += [[name, each, m] for each, m in modes if m not in ("native", "weights")]
    return markdown(["scheme", "runtime or hardware", "condition or reason"], rows)


def algorithms_table() -> str:
    """What `benchmarks/algorithms.py` wrote, without its title."""
    text = (RESULTS / "algorithms.md").read_text(encoding="utf-8")
    return text.partition("\n\n")[2].rstrip() + "\n"


COLUMNS = ["recipe", "ΔPPL [95 %]", "KL mean", "same top-1", "size"]
# Document, marker → the text between `<!-- marker:begin -->` and `<!-- marker:end -->`.
GENERATED = {
    (README, "quality"): lambda: quality_table(
        ["bfloat16", "int8-weight-only", "fp8-block", "int8-dynamic", "fp8-dynamic", "int8-static"],
        ["recipe", "perplexity", *COLUMNS[1:]],
    ),
    (README, "best"): lambda: quality_table(
        [
            "int8-dynamic-best-mixed",
            "int8-dynamic-rotated",
            "int8-dynamic-best",
            "fp8-dynamic-best",
        ],
        COLUMNS,
    ),
    (DOCS / "schemes.md", "schemes"): schemes_table,
    (DOCS / "schemes.md", "support"): support_table,
    (DOCS / "schemes.md", "notes"): notes_table,
    (DOCS / "recipes.md", "algorithms"): algorithms_table,
}


def markers(marker: str) -> tuple[str, str]:
    return f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"


def with_table(text: str, marker: str, table: str) -> str:
    begin, end = markers(marker)
    head, _, rest = text.partition(begin)
    return head + begin + table + rest[rest.index(end) :]


@pytest.mark.parametrize(
    ("path", "marker"), GENERATED, ids=[f"{path.stem}-{marker}" for path, marker in GENERATED]
)
def test_tables_are_those_of_the_code_and_of_the_measurements(path, marker):
    text = path.read_text(encoding="utf-8")
    assert text == with_table(text, marker, GENERATED[path, marker]()), REGENERATE


def test_plot_is_that_of_the_measurements():
    results = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    assert PLOT.read_text(encoding="utf-8") == quality_svg(results), REGENERATE


@written
def test_numbers_of_recipes_in_prose_are_the_measured_ones(path):
    """Such as "+2.93 % → +0.71 %": the change of perplexity of a scheme and of a recipe."""
    measured = "".join((RESULTS / f"{name}.md").read_text() for name in ("quality", "algorithms"))
    text = path.read_text(encoding="utf-8")
    for pair in re.findall(r"(\+[\d.]+ %) → (\+[\d.]+ %)", text):
        for change in pair:
            assert f"| {change} [" in measured, change


# ---- README.


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_tree_names_every_room_and_no_other():
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", README.read_text(), re.DOTALL)[1]
    named = re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.MULTILINE)
    rooms = [path.parent.name for path in (ROOT / "quantkit").glob("*/__init__.py")]
    assert sorted(named) == sorted([*rooms, "errors"])
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_readme_has_every_scheme_as_the_code_has_it():
    text = README.read_text(encoding="utf-8")
    for name, scheme in SCHEMES.items():
        row = (
            f"| `{name}` | {scheme.weight} | {scheme.input or 'not quantized'} |"
            f" {'needed' if scheme.needs_calibration else ''} |"
        )
        assert row in text, row
    named = re.findall(r"^\| `([\w-]+)` \| (?:E4M3|INT8)", text, re.MULTILINE)
    assert named == list(CATALOGUE)


# ---- All documents.


@written
def test_commands_parse(path):
    for where, line in commands(path):
        words = shlex.split(line)
        while re.match(r"\w+=", words[0]):
            words = words[1:]
        if words[0] == "torchrun":
            words = words[words.index("quantkit") :]
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), where
        elif words[0] == "quantkit":
            main.commands[words[1]].make_context(words[1], words[2:])
        else:
            assert words[0] in ("pip", "git", "vllm"), f"{where}: {line}"


def test_commands_are_found():
    found = [line for path in WRITTEN for _, line in commands(path)]
    assert sum("quantkit " in line for line in found) > 30


@written
def test_recipes_load(path):
    for block in code_blocks(path):
        if block.language == "yaml":
            Recipe.from_mapping(yaml.safe_load(block.text), block.where)


@written
def test_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:configs|benchmarks|quantkit|tests|kernels|docs)/[\w./-]*)`", text
    ):
        assert name in NOT_YET or (ROOT / name).exists(), name


@written
def test_links_lead_somewhere(path):
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        assert target.exists(), f"{path.name}: {link}"
        if path != README:
            assert DOCS in target.resolve().parents, f"{path.name}: {link} leaves the site"
        if anchor:
            assert anchor in anchors(target), f"{path.name}: {link}"


@written
def test_sentences_are_short(path):
    most = MOST_WORDS.get(path, MOST_WORDS_IN_DOCS)
    long = [each for each in sentences(path) if word_count(each) > most]
    assert not long, f"more than {most} words: {long}"


def test_sentences_are_counted_as_people_count_them():
    assert word_count("It costs +2.00 % [+1.73, +2.28], doesn't it?") == 7


if __name__ == "__main__":
    for (path, marker), made in GENERATED.items():
        path.write_text(with_table(path.read_text(encoding="utf-8"), marker, made()), "utf-8")
    PLOT.write_text(quality_svg(json.loads((RESULTS / "quality.json").read_text())), "utf-8")
