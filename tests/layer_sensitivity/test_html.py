"""The page of sensitivity: its verdict, all cells of its tables, its heat map; and the fragment."""

import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quantkit.layer_sensitivity.html import sensitivity_fragment, sensitivity_html
from quantkit.layer_sensitivity.report import (
    GROUP_COLUMNS,
    LINE_COLUMNS,
    group_rows,
    line_rows,
    sensitivity_remarks,
    sensitivity_title,
)
from quantkit.layer_sensitivity.result import Sensitivity

STORED = Path(__file__).with_name("stored_result.json")


@pytest.fixture
def stored() -> Sensitivity:
    return Sensitivity.from_json(json.loads(STORED.read_text()))


def words_of(page: str) -> str:
    without = re.sub("<style>.*?</style>|<wbr>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub("<[^>]*>", " ", without)).split())


def test_the_page_has_every_cell_and_every_remark(stored):
    page = words_of(sensitivity_html(stored))
    rows = [row[1:] for row in group_rows(stored, None)] + line_rows(stored)
    for text in (*GROUP_COLUMNS, *LINE_COLUMNS, *(cell for row in rows for cell in row)):
        assert text in page, text
    for text in (sensitivity_title(stored), *sensitivity_remarks(stored)):
        assert text in page, text


def test_the_verdict_names_the_worst_group_and_comes_first(stored):
    page = sensitivity_html(stored)
    headline = unescape(re.search("<h1>(.*?)</h1>", page)[1])
    assert headline.startswith(f"{stored.ranking[0].name} costs most: ")
    places = [page.index(text) for text in ("<h1>", "<table", "<svg")]
    assert places == sorted(places)
    share = int(re.search(r"(\d+) % of the loss", headline)[1])
    losses = [group.own_kld for group in stored.ranking]
    assert share == round(100 * losses[0] / sum(losses))
    count = int(re.search(r"Half of the loss comes from (\d+) of", page)[1])
    assert sum(losses[: count - 1]) < sum(losses) / 2 <= sum(losses[:count])


def test_the_heat_map_has_a_cell_for_each_group_and_a_legend(stored):
    page = sensitivity_html(stored)
    svg = re.search('<svg [^>]*data-plot="layer groups".*?</svg>', page, re.DOTALL)[0]
    cells = ElementTree.fromstring(svg).iterfind(".//{*}rect/{*}title/..")
    strengths = {cell[0].text.split(": ")[0]: float(cell.get("fill-opacity")) for cell in cells}
    assert set(strengths) == {group.name for group in stored.scores.groups}
    assert strengths[stored.ranking[0].name] == 1.0 == max(strengths.values())
    assert page.count('class="scale"') == 1 and "prefers-color-scheme:dark" in page


def test_names_of_a_hostile_checkpoint_stay_text(stored):
    evil = "\"'</svg></style><script>{{ 7 * 7 }}$\\frac$"
    groups = [
        replace(group, name=f"{number}{evil}", kind=f"{evil}{number % 4}")
        for number, group in enumerate(stored.scores.groups)
    ]
    made = replace(
        stored,
        scores=replace(stored.scores, groups=tuple(groups)),
        model=replace(stored.model, path=evil),
        data=replace(stored.data, sources=(evil,)),
        remarks=(evil,),
    )
    for page in (sensitivity_html(made), sensitivity_fragment(made)):
        assert "<script" not in page and page.count("</style>") <= 1
        assert "{{ 7 * 7 }}" in page and ">49<" not in page


def test_the_fragment_is_small_and_needs_no_matplotlib(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = sensitivity_fragment(stored)
    ElementTree.fromstring(made)
    assert "<svg" not in made and len(made) < 10_000
    assert stored.ranking[0].name in words_of(made) and stored.ranking[1].name in words_of(made)
