"""The HTML page: whole, self-contained, and with the plots that a result has."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest

from quantkit.evaluation.html import GROUPS, evaluation_html
from quantkit.evaluation.result import Evaluation


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
    return {
        re.search('aria-label="(.*?)"', text)[1]: ElementTree.fromstring(text)
        for text in re.findall("<svg .*?</svg>", page, re.DOTALL)
    }


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
