"""What the public functions take: data, recipes and sizes, and what they refuse."""

from pathlib import Path

import pytest

from quantkit.api.inputs import data_sources, recipe_of, size_of
from quantkit.data.sources import Records, read_source
from quantkit.errors import ArgumentError, DataError, QuantkitError, RecipeError
from quantkit.schemes.recipe import Recipe


class ChatTokenizer:
    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def documents(data) -> tuple[str, ...]:
    return tuple(
        document
        for source in data_sources(data)
        for document in read_source(source, ChatTokenizer()).documents
    )


CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "notes"  # no suffix: only its existence tells that it is a file
    path.write_text("from a file")
    return path


def test_one_string_is_a_file_name(file):
    assert documents(str(file)) == documents(file) == ("from a file",)
    assert documents([file, str(file.parent / ".." / file.parent.name / "notes2")][:1]) == (
        "from a file",
    )
    with pytest.raises(DataError, match="no data file"):
        data_sources("missing.txt")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["one", "two"], ("one", "two")),
        (("one",), ("one",)),
        ((text for text in ["one", "two"]), ("one", "two")),
        ([{"text": "one", "id": 1}, {"text": "two", "id": object()}], ("one", "two")),
        (CONVERSATION, ("<user>Hi<assistant>Hello",)),
        ([CONVERSATION, CONVERSATION[:1]], ("<user>Hi<assistant>Hello", "<user>Hi")),
        ([{"messages": CONVERSATION}], ("<user>Hi<assistant>Hello",)),
        ([{"text": "one"}, "two"], ("one", "two")),
        (None, ()),
        ([], ()),
    ],
)
def test_texts_and_conversations_in_memory_are_documents(data, expected):
    assert documents(data) == expected


def test_rows_of_a_table_are_records():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "year": [1, 2]})
    assert documents(table) == ("one", "two")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text\nof two lines", "put it into a list"),
        (["wrong-name.jsonl"], "no data file wrong-name.jsonl"),
        (
            [{"content": "x"}],
            "record 1 of `data` has neither 'text' nor 'messages'; it has content",
        ),
        ([1, 2], "record 1 of `data` is int"),
        ({"train": ["x"]}, "one split"),
    ],
)
def test_what_is_neither_a_file_nor_a_text_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        data_sources(data)


def test_files_and_texts_are_not_mixed(file):
    with pytest.raises(DataError, match="both files"):
        data_sources([str(file), "a text"])
    with pytest.raises(DataError, match="given twice"):
        data_sources([str(file), file])


def test_other_records_in_memory_have_another_name():
    one, other = (Records(({"text": text},)) for text in ("one", "other"))
    assert str(one) == str(Records(({"text": "one"},))) != str(other)
    assert one.sha256 != other.sha256
    with pytest.raises(DataError, match="JSON"):
        Records(({"text": object()},))


def test_a_recipe_is_a_value_a_scheme_or_a_file(tmp_path):
    recipe = Recipe("int8-dynamic", algorithms=["gptq"])
    path = tmp_path / "mine.yaml"
    path.write_text("scheme: int8-dynamic\nalgorithms: [gptq]\n")
    assert recipe_of(recipe) is recipe
    assert recipe_of(path) == recipe_of(str(path)) == recipe
    assert recipe_of("W8A8") == Recipe("int8-dynamic")
    with pytest.raises(RecipeError, match="unknown scheme 'fp9'.*or give a recipe's .yaml file"):
        recipe_of("fp9")
    with pytest.raises(RecipeError, match="no recipe file"):
        recipe_of("missing.yaml")


def test_sizes_are_bytes_or_text():
    assert size_of("5GB", "memory") == size_of(5_000_000_000, "memory") == 5_000_000_000
    for wrong in ("0", 0, -1, True, "much"):
        with pytest.raises(QuantkitError):
            size_of(wrong, "memory")
    with pytest.raises(ArgumentError, match="`memory` is 0; give a size above 0"):
        size_of(0, "memory")


@pytest.mark.parametrize("length", [10, 300, 900, 5000])
def test_texts_of_any_length_are_texts(length):
    texts = ["x" * length, "~nobody y" + "z " * length]
    assert documents(texts) == tuple(texts)
    assert documents(["see notes.txt", "b"]) == ("see notes.txt", "b")
    with pytest.raises(DataError):
        data_sources("x" * length)
    with pytest.raises(RecipeError):
        recipe_of("x" * length)


def test_the_name_of_a_scheme_is_one_whatever_files_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fp8-dynamic").write_text("no recipe")
    assert recipe_of("fp8-dynamic") == Recipe("fp8-dynamic")
