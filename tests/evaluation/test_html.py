"""The HTML page: whole, self-contained, and with the plots that a result has."""

import json
import re
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quantkit.evaluation.html import GROUPS, evaluation_fragment, evaluation_html
from quantkit.evaluation.html_page import HeatScale
from quantkit.evaluation.report import (
    evaluation_remarks,
    evaluation_title,
    layer_table,
    metric_table,
    model_table,
)
from quantkit.evaluation.result import Evaluation, LayerError

STORED = Path(__file__).with_name("stored_result.json")


@pytest.fixture
def stored() -> Evaluation:
    return Evaluation.from_json(json.loads(STORED.read_text()))


@pytest.fixture
def result(run, llama, text, export_to, tmp_path):
    """result(schemes …) → what `eval --noise-floor` finds of them."""

    def make(*schemes: str, options=("--noise-floor", "--gate", "size_ratio<=0.9")) -> Evaluation:
        outs = [export_to(scheme) for scheme in schemes]
        assert (
            run(
                "eval",
                llama,
                *outs,
                "--data",
                text,
                "--seq-len",
                32,
                "--max-tokens",
                960,
                "-o",
                tmp_path / "r.json",
                "-q",
                *options,
            ).exit_code
            == 0
        )
        return Evaluation.from_json(json.loads((tmp_path / "r.json").read_text()))

    return make


def drawings(page: str) -> dict[str, ElementTree.Element]:
    """Name → SVG of each plot and heat map."""
    return {
        re.search('data-plot="(.*?)"', text)[1]: ElementTree.fromstring(text)
        for text in re.findall("<svg [^>]*data-plot=.*?</svg>", page, re.DOTALL)
    }


def words_of(page: str) -> str:
    """What a reader sees, without markup and with single spaces."""
    without = re.sub("<style>.*?</style>|<wbr>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub("<[^>]*>", " ", without)).split())


@pytest.mark.slow
def test_every_plot_of_two_candidates(result):
    page = evaluation_html(result("int8-dynamic", "fp8-dynamic"))
    assert list(drawings(page)) == ["windows", "running", "kld", "size", "layers0", "layers1"]
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^")]+)\)', page))
    assert used and {first or second for first, second in used} <= set(names)
    for kind in GROUPS:
        assert f">{kind}<" in page
    assert "noise floor" in page and "size_ratio&lt;=0.9" in page and "The worst layers" in page


@pytest.mark.slow
def test_the_page_needs_no_network_and_no_script(result):
    page = evaluation_html(result("int8-dynamic"))
    assert "<script" not in page and "src=" not in page and "@import" not in page
    # Names of XML's vocabularies are no addresses that anything is fetched from.
    assert not [address for address in re.findall(r'(?:href|url)\W{1,2}(https?:[^"\')]+)', page)]
    assert 'name="viewport"' in page and len(page) < 300_000


@pytest.mark.slow
def test_the_same_result_gives_the_same_page(result):
    found = result("int8-dynamic")
    assert evaluation_html(found) == evaluation_html(found)


def test_a_base_alone_has_a_page_without_plots(result):
    page = evaluation_html(result(options=()))
    assert "<svg" not in page and "perplexity" in page


def test_one_window_and_names_with_markup_are_drawn(run, llama, text, export_to, tmp_path):
    import shutil

    out = shutil.copytree(export_to("int8-dynamic"), tmp_path / "a<b>&'$x_1$")
    page = tmp_path / "p.html"
    assert (
        run(
            "eval",
            llama,
            out,
            "--data",
            text,
            "--seq-len",
            64,
            "--max-tokens",
            64,
            "--html",
            page,
            "-q",
        ).exit_code
        == 0
    )
    assert "a<b>" not in page.read_text() and set(drawings(page.read_text())) == {
        "windows",
        "kld",
        "layers0",
    }


def test_without_matplotlib_it_is_said_before_anything_is_written(
    run, llama, text, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = run(
        "eval",
        llama,
        "--data",
        text,
        "--seq-len",
        64,
        "--max-tokens",
        64,
        "--html",
        tmp_path / "p.html",
    )
    assert (
        refused.exit_code == 1
        and "quantkit[report]" in refused.stderr
        and not (tmp_path / "p.html").exists()
    )
    assert "tokens in" not in refused.stdout


def test_the_page_has_every_cell_of_the_tables_and_every_remark(stored):
    page = words_of(evaluation_html(stored))
    for table in (model_table(stored), metric_table(stored), layer_table(stored)):
        for text in (*table.columns, *(cell for row in table.rows for cell in row)):
            assert text in page, text
    for remark in evaluation_remarks(stored):
        if not remark.startswith("gate "):
            assert remark.removeprefix("quant: ") in page, remark
    assert evaluation_title(stored) in page
    for gate in stored.gates:
        assert f"{gate.result} {gate.expr} on {gate.path}" in page


def test_the_verdict_comes_first_then_the_table_of_models(stored):
    page = evaluation_html(stored)
    places = [page.index(text) for text in ("<h1>", "<h2>Models", "<table", "<h2>Plots", "<svg")]
    assert places == sorted(places)


def test_long_paths_are_short_names_with_the_path_as_title(stored):
    paths = ["/somewhere/far/one/out", "/somewhere/far/two/out"]
    page = evaluation_html(
        replace(stored, quants=tuple(replace(stored.quants[0], path=path) for path in paths))
    )
    for path in paths:
        assert f'title="{path}">{path.removeprefix("/somewhere/far/")}<' in page
        assert path not in words_of(page)


def test_plots_have_the_colours_of_the_page_in_light_and_dark(stored):
    page = evaluation_html(stored)
    assert "prefers-color-scheme:dark" in page and "@media print" in page
    for svg in re.findall("<svg [^>]*data-plot=.*?</svg>", page, re.DOTALL):
        assert set(re.findall("#[0-9a-f]{6}", svg)) <= {"#ffffff", "#000000"}
    used = set(re.findall(r"var\((--\w+)\)", page))
    assert used <= set(re.findall(r"(--\w+):", page)) and {"--ink", "--s1"} <= used


def with_layers(stored: Evaluation, *decibels: float) -> Evaluation:
    """A quantized model for each level, with one layer of that level."""
    layer = replace(stored.quants[0].layers[0], name="model.layers.0.mlp.up_proj")
    made = [
        replace(
            stored.quants[0],
            path=f"q{number}",
            layers=(replace(layer, weight_sqnr_db=level, output_sqnr_db=level),),
        )
        for number, level in enumerate(decibels)
    ]
    return replace(stored, quants=tuple(made), gates=())


def test_heat_maps_of_several_candidates_share_one_scale(stored):
    page = evaluation_html(with_layers(stored, 20.0, 30.0, 20.0))
    assert len(re.findall('class="scale"', page)) == 1
    strengths = [
        re.search(r'fill-opacity="([\d.]+)"', ElementTree.tostring(svg).decode())[1]
        for name, svg in drawings(page).items()
        if name.startswith("layers")
    ]
    assert strengths == ["1.0", "0.06", "1.0"]


def test_the_worst_value_has_the_strongest_colour():
    scale = HeatScale(best=60.0, worst=10.0, unit="dB")
    assert scale.strength(10.0) == 1.0 and scale.strength(60.0) == scale.strength(99.0) == 0.06
    assert scale.strength(20.0) > scale.strength(30.0)
    assert scale.ticks()[0] == "60" and scale.ticks()[-1] == "10"
    logarithmic = HeatScale(0.001, 1.0, "nats", is_logarithmic=True)
    assert logarithmic.strength(0.0) == 0.06 and logarithmic.strength(1.0) == 1.0
    middle = (1 + 0.06) / 2
    assert logarithmic.strength(0.001**0.5) == pytest.approx(middle, abs=1e-3)
    assert HeatScale(5.0, 5.0, "dB").strength(5.0) == 1.0


def hostile(stored: Evaluation) -> Evaluation:
    evil = "' onload='x\" onload=\"y </style><script>z</script>{{ 7 * 7 }}$\\frac$"
    layer = stored.quants[0].layers[0]
    layers: list[LayerError] = [replace(layer, name=f"model.layers.0.{evil}.up_proj")]
    return replace(
        stored,
        base=replace(stored.base, path=f"{evil}/{evil}"),
        quants=tuple(
            replace(stored.quants[0], path=f"{place}/{evil}", scheme=evil, layers=tuple(layers))
            for place in ("a", "b")
        ),
        data=replace(stored.data, sources=(evil,)),
        gates=tuple(replace(gate, expr=evil, path=f"a/{evil}") for gate in stored.gates),
        remarks=(evil, f"Warning: {evil}", f"a/{evil}: {evil}"),
        kernel_level=evil,
        quantkit_version=evil,
    )


def tags_of(page: str) -> list[tuple[str, set[str]]]:
    """Each tag with the names of its attributes."""
    found: list[tuple[str, set[str]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, {name for name, _ in attrs}))

    Reader().feed(page)
    return found


def test_names_of_a_hostile_checkpoint_stay_text(stored):
    for made in (evaluation_html(hostile(stored)), evaluation_fragment(hostile(stored))):
        assert "<script" not in made and made.count("</style>") <= 1
        assert "{{ 7 * 7 }}" in made and ">49<" not in made
        assert not [tag for tag, attributes in tags_of(made) if "onload" in attributes]


def test_the_fragment_is_small_and_needs_no_matplotlib(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = evaluation_fragment(stored)
    ElementTree.fromstring(made)
    assert "<svg" not in made and "<style" not in made and len(made) < 10_000
    assert "#" not in re.sub("&#\\d+;", "", made), "no colour, which a dark page might not bear"
    delta = stored.quants[0].metrics.values["ppl_delta_pct"]
    assert f"{delta.value:+.2f} %" in made and "loses least" not in made
    alone = evaluation_fragment(replace(stored, quants=(), gates=()))
    assert "perplexity" in alone and "KL" not in alone
