"""Reading the sources of --data."""

import json
import re

import pytest
from fake_tokenizer import FakeTokenizer, jsonl

from quantkit.data.protocols import evaluation_windows
from quantkit.data.sampling import calibration_windows
from quantkit.data.sources import read_source
from quantkit.errors import DataError


def test_a_text_file_is_one_document(write):
    assert read_source(write("a.txt", "one\n\ntwo\n"), FakeTokenizer()).documents == (
        "one\n\ntwo\n",
    )


def test_json_lines_hold_texts_and_conversations(write):
    records = jsonl(
        {"text": "one\ntwo"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    )
    assert read_source(write("a.jsonl", records + "\n"), FakeTokenizer()).documents == (
        "one\ntwo",
        "<user> hi\n<assistant> ho\n",
    )


def test_only_a_line_feed_ends_a_json_line(write):
    # U+2028 and U+0085 are ordinary characters inside a JSON string; str.splitlines breaks there.
    record = json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False)
    assert read_source(write("a.jsonl", record + "\n"), FakeTokenizer()).documents == (
        "one\u2028two\u0085three",
    )


@pytest.mark.parametrize(
    "record",
    [{"text": "a\ud800b"}, {"messages": [{"role": "user", "content": "a\ud800b"}]}],
    ids=["text", "messages"],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_line(write, record):
    # a whole pair of escapes is a character
    name = write("a.jsonl", jsonl({"text": "fine \U0001f600"}, record))
    for windows in (
        lambda: calibration_windows([name], FakeTokenizer(), 1, 2, seed=0),
        lambda: evaluation_windows([name], FakeTokenizer(), "gptq", 2),
    ):
        with pytest.raises(
            DataError, match=r"line 2 of .*a.jsonl holds .ud800, half of a surrogate pair"
        ):
            windows()


@pytest.mark.parametrize(
    "said",
    [
        "No template.",
        "None is set! " + "For more see the documentation at https://example.org. " * 9,
        "word " * 99,
    ],
)
def test_what_a_chat_template_says_is_not_cut_in_a_word(write, monkeypatch, said):
    def refuse(*_, **__):
        raise ValueError(said)

    tokenizer = FakeTokenizer()
    monkeypatch.setattr(tokenizer, "apply_chat_template", refuse)
    with pytest.raises(DataError) as raised:
        read_source(write("a.jsonl", jsonl({"messages": []})), tokenizer)
    inside = re.search(
        r"can't render line 1 of .*a.jsonl \((.*)\); use records with 'text'", str(raised.value)
    )[1]
    assert (
        len(inside) <= 202
        and inside[-1] in ".…"
        and (inside == said or said.startswith(inside.removesuffix(" …") + " "))
    )


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "other": [1, 2]}), path)
    assert read_source(str(path), FakeTokenizer()).documents == ("one", "two")
    parquet.write_table(pyarrow.table({"other": [1, 2]}), path)
    with pytest.raises(DataError, match="no column 'text' or 'messages'; it has other"):
        read_source(str(path), FakeTokenizer())


def test_the_hash_is_of_the_file(write):
    one, same, other = (
        read_source(write(name, text), FakeTokenizer()).sha256
        for name, text in (("a.txt", "x"), ("b.txt", "x"), ("c.txt", "y"))
    )
    assert one == same != other


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"good \xff bad", r"not UTF-8 text \(byte 5\)"),
        ("a.jsonl", jsonl({"text": "x"}) + "\nnot json\n", "line 3 of .*a.jsonl is not JSON"),
        ("a.jsonl", jsonl({"text": "x"}, {"txt": "y"}), "line 2 of .*a.jsonl has neither"),
        ("a.jsonl", jsonl({"text": 7}), "line 1 of .*a.jsonl has neither"),
        ("a.jsonl", "[1, 2]\n", "line 1 of .*a.jsonl has neither"),
        ("a.jsonl", jsonl({"messages": [{"role": "user"}]}), "chat template can't render line 1"),
        ("a.parquet", b"not parquet", "not readable as parquet"),
    ],
    ids=["utf-8", "json", "no text", "number", "list", "template", "parquet"],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(write, name, content, words):
    with pytest.raises(DataError, match=words):
        read_source(write(name, content), FakeTokenizer())


@pytest.mark.parametrize("name", ["missing.txt", "dataset:", "dataset:a:b:c:d", "."])
def test_what_is_no_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no data file|not understood"):
        read_source(name, FakeTokenizer())
