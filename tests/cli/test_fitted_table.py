"""Tables that fit a width: no line is wider, no number is cut, names that differ stay different."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from quantkit.cli.fitted_table import Part, fitted_table, shorter_names, wrap_words

COLUMNS = ("model", "scheme", "perplexity", "ΔPPL [95 %]", "KL mean", "size", "note")
ROWS = [
    ("SmolLM2-135M-fp8-dynamic", "fp8-dynamic", "33.5295", "+3.74 % [+3.16, +4.31]", "0.03273")
    + ("163.5 MB", "loads everywhere"),
    ("SmolLM2-135M-int8-static", "int8-static", "114.5221", "+254.35 % [+228.03, +280.86]")
    + ("1.35594", "163.5 MB", ""),
]
RIGHT, IMPORTANT = (2, 3, 4, 5), (0, 3, 4)


def text_of(part: Part) -> str:
    return "\n".join([*part.heading, *(line for row in part.rows for line in row)])


def test_a_wide_window_shows_the_table_as_it_is():
    (part,) = fitted_table(COLUMNS, ROWS, RIGHT, IMPORTANT, 300)
    assert list(part.columns) == list(range(7)) and len(part.heading) == 1
    for cell in (*COLUMNS, *ROWS[0], *ROWS[1]):
        assert cell in text_of(part)


@pytest.mark.parametrize("width", range(44, 140, 3))
def test_no_line_is_wider_and_all_parts_together_have_all_columns(width):
    parts = fitted_table(COLUMNS, ROWS, RIGHT, IMPORTANT, width)
    assert set(IMPORTANT) <= set(parts[0].columns)
    assert all(0 in part.columns for part in parts)
    assert sorted({each for part in parts for each in part.columns}) == list(range(7))
    for part in parts:
        assert max(map(cell_len, text_of(part).splitlines())) <= part.width <= width
    everything = "\n".join(map(text_of, parts))
    for row in ROWS:
        for number in re.findall(r"[+\-]?\d+\.\d+(?: %| MB)?", " ".join(row[2:6])):
            assert number in everything


def test_the_least_important_columns_go_first():
    shown = [set(fitted_table(COLUMNS, ROWS, RIGHT, IMPORTANT, w)[0].columns) for w in (60, 200)]
    assert set(IMPORTANT) <= shown[0] < shown[1] == set(range(7))


def test_an_interval_takes_its_own_line_only_if_an_important_column_needs_it():
    narrow = text_of(fitted_table(COLUMNS, ROWS, RIGHT, IMPORTANT, 48)[0])
    wide = text_of(fitted_table(COLUMNS, ROWS, RIGHT, IMPORTANT, 70)[0])
    assert "+3.74 % [+3.16, +4.31]" not in narrow and "[+228.03, +280.86]" in narrow
    assert "+3.74 % [+3.16, +4.31]" in wide


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "model.layers.12.self_attn.q_proj",
            ["model.layers.12.…q_proj", "…layers.12.…q_proj", "…12.…q_proj"],
        ),
        (
            "model.layers.3.mlp.down_proj.weight",
            [
                "model.layers.3.…down_proj.weight",
                "…layers.3.…down_proj.weight",
                "…3.…down_proj.weight",
            ],
        ),
        ("SmolLM2-135M-int8-static", ["SmolLM2-…int8-static", "…int8-static"]),
        ("/models/a/out", ["a/out", "out"]),
        ("lm_head", []),
        ("", []),
    ],
)
def test_names_lose_their_middle(name, expected):
    assert shorter_names(name) == expected


def test_names_that_differ_stay_different():
    names = [
        f"model.layers.{block}.{kind}" for block in (1, 11) for kind in ("a.q_proj", "b.q_proj")
    ]
    part = fitted_table(("name", "dB"), [(name, "1.5") for name in names], (1,), (), 30)[0]
    shown = [row[0].split()[0] for row in part.rows]
    assert len(set(shown)) == 4


def test_words_are_kept_whole_where_they_fit():
    assert wrap_words("norms are skipped by rule", 12) == ["norms are", "skipped by", "rule"]
    assert wrap_words("SmolLM2-135M-Instruct", 12) == ["SmolLM2-", "135M-", "Instruct"]
    assert wrap_words("abcdefgh", 3) == ["abc", "def", "gh"]
    assert wrap_words("", 10) == []


@given(
    st.lists(
        st.tuples(st.text("ab.-/1 漢", max_size=30), st.integers(0, 10**9).map(str)), max_size=6
    ),
    st.integers(30, 90),
)
def test_any_names_fit_any_window(rows, width):
    for part in fitted_table(("a name", "number"), rows, (1,), (), width):
        for line in text_of(part).splitlines():
            assert cell_len(line) <= width
        for row, lines in zip(rows, part.rows):
            assert 1 not in part.columns or row[1] in "\n".join(lines)
