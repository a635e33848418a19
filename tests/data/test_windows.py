"""Text to token windows, against loops that follow each protocol's own description."""

import base64
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantkit.data.protocols import evaluation_windows
from quantkit.data.sampling import MIN_REST, calibration_windows
from quantkit.data.sources import read_source
from quantkit.data.text_overlap import PIECE, count_known_windows, token_pieces
from quantkit.data.windows import Window, Windows, window_length
from quantkit.errors import DataError

BOS, EOS = 1, 2
WORDS, CHARACTERS = r"\S+", r"(?s)."


@dataclass
class Encoding:
    input_ids: list[int]


class FakeTokenizer:
    """A token is a match of `pattern`; ids are given in the order of first sight. `calls` holds
    every text that was tokenized.
    """

    def __init__(self, pattern: str = WORDS, bos: int | None = BOS, append_eos: bool = False):
        self.bos_token_id, self.eos_token_id = bos, EOS
        self.pattern, self.append_eos = re.compile(pattern), append_eos
        self.ids: dict[str, int] = {}
        self.calls: list[str] = []

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> Encoding:
        self.calls.append(text)
        tokens = [
            self.ids.setdefault(token, 10 + len(self.ids)) for token in self.pattern.findall(text)
        ]
        if add_special_tokens:
            tokens = (
                [self.bos_token_id] * (self.bos_token_id is not None)
                + tokens
                + [EOS] * self.append_eos
            )
        return Encoding(tokens)

    def decode(self, tokens) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[token] for token in tokens)

    def apply_chat_template(self, messages: list[dict], tokenize: bool = True) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}> {message['content']}\n" for message in messages)


def numbers(start: int, stop: int) -> str:
    """Words that are all different."""
    return " ".join(f"n{number}" for number in range(start, stop))


def plain(tokenizer: FakeTokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture
def write(tmp_path):
    """write("a.txt", content) → the file's path, as text."""

    def make(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# Sources


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


# Evaluation: gptq


@pytest.mark.parametrize("seq_len", [2, 7, 10, 101])
def test_gptq_cuts_one_stream_and_drops_the_tail(write, seq_len):
    tokenizer = FakeTokenizer()
    windows = evaluation_windows([write("a.txt", numbers(0, 100))], tokenizer, "gptq", seq_len)
    stream = [BOS, *plain(tokenizer, numbers(0, 100))]
    expected = [
        tuple(stream[number * seq_len : (number + 1) * seq_len])
        for number in range(len(stream) // seq_len)
    ]
    assert [window.tokens for window in windows.windows] == expected
    assert {window.first_scored for window in windows.windows} == {1}
    assert windows.tokens_scored == len(expected) * (seq_len - 1)


def test_special_tokens_stand_only_at_the_very_start(write):
    names = [
        write("a.jsonl", jsonl({"text": numbers(0, 9)}, {"text": numbers(9, 20)})),
        write("b.txt", numbers(20, 31)),
    ]
    tokens = [
        token
        for window in evaluation_windows(names, FakeTokenizer(append_eos=True), "gptq", 4).windows
        for token in window.tokens
    ]
    assert tokens[0] == BOS
    assert not {BOS, EOS} & set(tokens[1:])


def test_a_tokenizer_without_special_tokens_gets_none(write):
    tokenizer = FakeTokenizer(bos=None)
    (window,) = evaluation_windows([write("a.txt", numbers(0, 5))], tokenizer, "gptq", 5).windows
    assert list(window.tokens) == plain(tokenizer, numbers(0, 5))


@pytest.mark.parametrize("protocol", ["gptq", "llamacpp"])
def test_the_stream_is_tokenized_once_with_blank_lines_between_documents(write, protocol):
    tokenizer = FakeTokenizer()
    evaluation_windows(
        [write("a.jsonl", jsonl({"text": "one two"}, {"text": "three"})), write("b.txt", "four")],
        tokenizer,
        protocol,
        4,
    )
    assert [text for text in tokenizer.calls if text != "a"] == ["one two\n\nthree\n\nfour"]


@pytest.mark.parametrize("protocol", ["gptq", "llamacpp", "lmeval"])
def test_crlf_text_gives_the_windows_of_lf_text(write, protocol):
    names = [
        write("lf.txt", "one\ntwo\n\nthree\n"),
        write("crlf.txt", "one\r\ntwo\r\n\r\nthree\r\n"),
        write("cr.txt", "one\rtwo\r\rthree\r"),
    ]
    tokenizer = FakeTokenizer(CHARACTERS)
    lf, crlf, cr = (evaluation_windows([name], tokenizer, protocol, 4).windows for name in names)
    assert lf == crlf == cr


# Evaluation: llamacpp


@pytest.mark.parametrize("n_ctx", [4, 7, 16])
def test_llamacpp_scores_the_second_half_behind_a_bos(write, n_ctx):
    tokenizer = FakeTokenizer()
    windows = evaluation_windows(
        [write("a.txt", numbers(0, 100))], tokenizer, "llamacpp", n_ctx
    ).windows
    stream = [BOS, *plain(tokenizer, numbers(0, 100))]
    assert len(windows) == len(stream) // n_ctx
    for number, window in enumerate(windows):
        chunk = stream[number * n_ctx : (number + 1) * n_ctx]
        # perplexity.cpp: for j in first … n_ctx − 2, the logits at j are scored against the token
        # at j + 1.
        predicted = [chunk[j + 1] for j in range(n_ctx // 2, n_ctx - 1)]
        assert list(window.tokens) == [BOS, *chunk[1:]]
        assert list(window.tokens[window.first_scored :]) == predicted
        assert window.scored == n_ctx - 1 - n_ctx // 2


def test_llamacpp_puts_eos_first_where_there_is_no_bos(write):
    name = write("a.txt", numbers(0, 8))
    assert [
        window.tokens[0]
        for window in evaluation_windows([name], FakeTokenizer(bos=None), "llamacpp", 4).windows
    ] == [EOS, EOS]


@pytest.mark.parametrize("protocol", ["llamacpp", "lmeval"])
def test_protocols_with_a_bos_refuse_a_tokenizer_that_has_none(write, protocol):
    tokenizer = FakeTokenizer(bos=None)
    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="neither a BOS nor an EOS"):
        evaluation_windows([write("a.txt", numbers(0, 8))], tokenizer, protocol, 4)


# Evaluation: lmeval


def lm_eval_windows(
    tokens: list[int], prefix: int, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """(context, predicted) of each request, as lm-eval's get_rolling_token_windows and
    make_disjoint_window cut them.
    """
    first = min(max_length, len(tokens))
    pairs, done = [([prefix, *tokens[: first - 1]], tokens[:first])], first
    while done < len(tokens):
        count = min(len(tokens) - done, max_length)
        end = done + count
        pairs.append((tokens[end - max_length - 1 : end - 1], tokens[end - count : end]))
        done = end
    return [
        (context[: len(context) - (len(predicted) - 1)], predicted) for context, predicted in pairs
    ]


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 25, 40])
def test_lmeval_cuts_documents_as_lm_eval_does(write, length):
    tokenizer = FakeTokenizer()
    windows = evaluation_windows(
        [write("a.txt", numbers(0, length))], tokenizer, "lmeval", 10
    ).windows
    tokens = plain(tokenizer, numbers(0, length))
    assert [
        (list(w.tokens[: w.first_scored]), list(w.tokens[w.first_scored :])) for w in windows
    ] == lm_eval_windows(tokens, BOS, 10)


def test_lmeval_scores_every_token_of_every_document_once(write):
    lengths = (1, 7, 23, 30)
    texts = [numbers(100 * length, 101 * length) for length in lengths]
    tokenizer = FakeTokenizer()
    windows = evaluation_windows(
        [write("a.jsonl", jsonl(*({"text": text} for text in texts)))], tokenizer, "lmeval", 10
    )
    scored = [token for window in windows.windows for token in window.tokens[window.first_scored :]]
    assert scored == [token for text in texts for token in plain(tokenizer, text)]
    assert windows.tokens_scored == len(scored)


def test_lmeval_counts_words_and_bytes_of_the_original_text(write):
    windows = evaluation_windows(
        [write("a.jsonl", jsonl({"text": "zwei Wörter"}, {"text": "drei  mehr\nhier"}))],
        FakeTokenizer(),
        "lmeval",
        10,
    )
    assert (windows.words, windows.utf8_bytes) == (
        5,
        len("zwei Wörter".encode()) + len("drei  mehr\nhier"),
    )


# Evaluation: all protocols


def test_max_tokens_keeps_the_first_windows_that_fit(write):
    name = write("a.txt", numbers(0, 100))
    everything = evaluation_windows([name], FakeTokenizer(), "gptq", 8).windows
    assert (
        evaluation_windows([name], FakeTokenizer(), "gptq", 8, max_tokens=31).windows
        == everything[:3]
    )
    assert (
        evaluation_windows([name], FakeTokenizer(), "gptq", 8, max_tokens=32).windows
        == everything[:4]
    )
    assert (
        evaluation_windows([name], FakeTokenizer(), "gptq", 8, max_tokens=1).windows
        == everything[:1]
    )


def test_a_text_shorter_than_a_window_is_refused_with_its_length(write):
    with pytest.raises(DataError, match="gives 6 tokens, less than one window of 7"):
        evaluation_windows([write("a.txt", numbers(0, 5))], FakeTokenizer(), "gptq", 7)


@pytest.mark.parametrize("protocol", ["gptq", "llamacpp", "lmeval"])
def test_a_text_with_nothing_to_score_is_refused(write, protocol):
    with pytest.raises(DataError):
        evaluation_windows([write("a.txt", "")], FakeTokenizer(), protocol, 4)


def test_windows_of_one_token_hold_nothing_to_score(write):
    with pytest.raises(DataError, match="no token to score"):
        evaluation_windows([write("a.txt", numbers(0, 5))], FakeTokenizer(), "gptq", 1)


def test_the_tokens_hash_tells_tokens_and_scored_positions_apart(write):
    name = write("a.txt", numbers(0, 32))
    tokenizer = FakeTokenizer()
    gptq, again, llamacpp, shorter = (
        evaluation_windows([name], tokenizer, protocol, seq_len).tokens_sha256
        for protocol, seq_len in (("gptq", 8), ("gptq", 8), ("llamacpp", 8), ("gptq", 4))
    )
    assert gptq == again
    assert len({gptq, llamacpp, shorter}) == 3
    assert (
        Windows((Window((5, 6, 7), 1),), ()).tokens_sha256
        != Windows((Window((5, 6, 7), 2),), ()).tokens_sha256
    )


def test_a_window_scores_from_its_first_scored_position():
    assert Window((5, 6, 7)).scored == 2
    assert Window((5, 6, 7), 3).scored == 0


# Calibration


def words_of(tokenizer: FakeTokenizer, windows) -> list[list[int]]:
    """The numbers that each window's words stand for."""
    return [
        [
            int(word[1:])
            for word in tokenizer.decode(token for token in window.tokens if token > EOS).split()
        ]
        for window in windows.windows
    ]


def test_calibration_windows_are_cut_from_the_text_without_overlap(write):
    tokenizer = FakeTokenizer()
    chosen = words_of(
        tokenizer, calibration_windows([write("a.txt", numbers(0, 100))], tokenizer, 8, 10, seed=0)
    )
    assert len(chosen) == 8
    assert all(window == list(range(window[0], window[0] + len(window))) for window in chosen)
    flat = [number for window in chosen for number in window]
    assert len(flat) == len(set(flat))


def test_the_seed_decides_which_windows(write):
    name = write("a.txt", numbers(0, 500))
    tokenizer = FakeTokenizer()
    one, again, other = (calibration_windows([name], tokenizer, 8, 10, seed) for seed in (0, 0, 1))
    assert one == again
    assert {window.tokens for window in one.windows} != {window.tokens for window in other.windows}


def test_calibration_windows_are_drawn_from_the_whole_text(write):
    tokenizer = FakeTokenizer()
    chosen = words_of(
        tokenizer,
        calibration_windows([write("a.txt", numbers(0, 1000))], tokenizer, 10, 10, seed=0),
    )
    assert max(window[0] for window in chosen) > 500
    assert [window[0] for window in chosen] != sorted(window[0] for window in chosen)


@pytest.mark.parametrize("num_samples", [6, 7])
def test_sources_of_any_size_are_mixed_evenly(write, num_samples):
    names = [
        write("a.txt", numbers(0, 2000)),
        write("b.txt", numbers(5000, 5100)),
        write("c.txt", numbers(7000, 7100)),
    ]
    tokenizer = FakeTokenizer()
    chosen = words_of(tokenizer, calibration_windows(names, tokenizer, num_samples, 10, seed=0))
    counts = [
        sum(low <= window[0] < high for window in chosen)
        for low, high in ((0, 2000), (5000, 5100), (7000, 7100))
    ]
    assert sum(counts) == num_samples
    assert max(counts) - min(counts) <= 1


def test_fewer_windows_than_sources_are_refused(write):
    names = [write("a.txt", numbers(0, 100)), write("b.txt", numbers(500, 600))]
    assert len(calibration_windows(names, FakeTokenizer(), 2, 10, seed=0).windows) == 2
    with pytest.raises(
        DataError, match="--num-samples 1 leaves some of the 2 sources of --data without a window"
    ):
        calibration_windows(names, FakeTokenizer(), 1, 10, seed=0)


def test_when_one_source_runs_out_the_others_fill_up(write):
    names = [write("a.txt", numbers(0, 100)), write("b.txt", numbers(500, 515))]
    tokenizer = FakeTokenizer()
    chosen = words_of(tokenizer, calibration_windows(names, tokenizer, 6, 10, seed=0))
    assert [window[0] >= 500 for window in chosen].count(True) == 1
    assert len(chosen) == 6


def test_fewer_windows_come_back_when_the_text_holds_fewer(write):
    windows = calibration_windows(
        [write("a.txt", numbers(0, 34))], FakeTokenizer(), 128, 10, seed=0
    ).windows
    assert len(windows) == 3
    assert {len(window.tokens) for window in windows} == {10}


def test_the_rest_of_a_source_is_a_window_where_more_are_asked_for_than_there_are(write):
    # BOS and 114 words: two windows of 40 tokens and a rest of 35.
    name, tokenizer = write("a.txt", numbers(0, 114)), FakeTokenizer()
    for asked, lengths in ((1, [40]), (2, [40, 40]), (3, [40, 40, 35]), (9, [40, 40, 35])):
        windows = calibration_windows([name], tokenizer, asked, 40, seed=0).windows
        assert [len(window.tokens) for window in windows] == lengths
    stream = [
        token
        for window in sorted(windows, key=lambda window: window.tokens)
        for token in window.tokens
    ]
    assert sorted(stream) == sorted([BOS, *plain(tokenizer, numbers(0, 114))])
    assert windows[-1].tokens == tuple(plain(tokenizer, numbers(79, 114)))


def test_each_source_has_a_rest_and_whole_windows_come_first(write):
    # rests of 0, 33 and 0 tokens beside BOS
    names = [
        write("a.txt", numbers(0, 79)),
        write("b.txt", numbers(500, 612)),
        write("c.txt", numbers(900, 1019)),
    ]
    tokenizer = FakeTokenizer()
    lengths = [
        len(window.tokens)
        for window in calibration_windows(names, tokenizer, 99, 40, seed=0).windows
    ]
    assert lengths == [40] * 7 + [33]
    assert len(calibration_windows(names, tokenizer, 7, 40, seed=0).windows) == 7


@pytest.mark.parametrize("length, is_window", [(MIN_REST, True), (MIN_REST - 1, False)])
def test_a_rest_of_few_tokens_is_dropped(write, length, is_window):
    name = write("a.txt", numbers(0, 99 + length))
    windows = calibration_windows([name], FakeTokenizer(), 9, 100, seed=0).windows
    assert [len(window.tokens) for window in windows] == [100] + [length] * is_window


def test_every_calibration_document_begins_as_the_model_expects(write):
    tokenizer = FakeTokenizer(append_eos=True)
    windows = calibration_windows(
        [write("a.jsonl", jsonl({"text": numbers(0, 4)}, {"text": numbers(4, 8)}))],
        tokenizer,
        9,
        5,
        seed=0,
    ).windows
    assert sorted(window.tokens for window in windows) == [
        tuple([BOS, *plain(tokenizer, text)]) for text in (numbers(0, 4), numbers(4, 8))
    ]


@pytest.mark.parametrize("text", ["<s> n0 n1 n2", "n0 n1 n2"])
def test_a_text_that_begins_with_bos_gets_no_second_one(write, text):
    """Chat templates write bos_token themselves, and the tokenizer reads it back as one."""
    tokenizer = FakeTokenizer()
    tokenizer.ids["<s>"] = BOS
    name, wanted = (
        write("a.jsonl", jsonl({"text": text}, {"text": text})),
        [BOS, *plain(tokenizer, "n0 n1 n2")],
    )
    assert [
        list(window.tokens)
        for window in calibration_windows([name], tokenizer, 9, 4, seed=0).windows
    ] == [wanted, wanted]
    assert list(evaluation_windows([name], tokenizer, "gptq", 4).windows[0].tokens) == wanted
    assert list(evaluation_windows([name], tokenizer, "llamacpp", 4).windows[0].tokens) == wanted
    lmeval = evaluation_windows([name], tokenizer, "lmeval", 4).windows
    assert [(list(window.tokens), window.first_scored) for window in lmeval] == [(wanted, 1)] * 2


def test_a_calibration_source_shorter_than_a_window_is_refused_by_name(write):
    long, short = write("long.txt", numbers(0, 50)), write("short.txt", numbers(0, 5))
    with pytest.raises(DataError, match="short.txt gives 6 tokens, less than one window of 10"):
        calibration_windows([long, short], FakeTokenizer(), 4, 10, seed=0)


def test_the_data_hash_depends_on_every_source(write):
    a, b, c = (
        write(name, numbers(start, start + 20))
        for name, start in (("a.txt", 0), ("b.txt", 50), ("c.txt", 90))
    )
    hashes = [
        calibration_windows(names, FakeTokenizer(), 2, 5, seed=0).data_sha256
        for names in ([a], [a, b], [a, c], [b, a])
    ]
    assert len(set(hashes)) == 4
    assert hashes[0] == read_source(a, FakeTokenizer()).sha256


def test_the_bundled_texts_are_readable():
    from quantkit.data.bundled import BUNDLED_CALIBRATION, BUNDLED_EVALUATION

    for path in (BUNDLED_CALIBRATION, BUNDLED_EVALUATION):
        assert Path(path).is_file()
        assert len(evaluation_windows([str(path)], FakeTokenizer(), "gptq", 2048).windows) >= 2


# Whether windows were seen before


def random_windows(*lengths: int, seed: int = 0) -> Windows:
    generator = random.Random(seed)
    return Windows(
        tuple(
            Window(tuple(generator.randrange(1000) for _ in range(length))) for length in lengths
        ),
        (),
    )


def cut(windows: Windows, start: int, stop: int) -> Windows:
    """A window of other tokens, and between them a part of the first window's."""
    others = random_windows(50, 50, seed=99).windows
    return Windows(
        (Window(others[0].tokens + windows.windows[0].tokens[start:stop] + others[1].tokens),), ()
    )


@pytest.mark.parametrize("offset", [0, 1, 17, PIECE - 1, PIECE])
def test_text_that_was_seen_is_known_at_any_place(offset):
    seen = random_windows(256, 100)
    # From any place on, so many tokens hold a whole piece.
    assert count_known_windows(cut(seen, offset, offset + 2 * PIECE - 1), token_pieces(seen)) == 1


def test_less_than_a_piece_is_not_known():
    seen = random_windows(256)
    assert count_known_windows(cut(seen, 0, PIECE), token_pieces(seen)) == 1
    assert count_known_windows(cut(seen, 0, PIECE - 1), token_pieces(seen)) == 0
    assert count_known_windows(cut(seen, 1, PIECE), token_pieces(seen)) == 0


def test_each_window_is_counted_by_itself():
    seen, new = random_windows(128, 128, 128), random_windows(128, 128, seed=1)
    mixed = Windows((seen.windows[2], new.windows[0], seen.windows[0], new.windows[1]), ())
    assert count_known_windows(mixed, token_pieces(seen)) == 2
    assert count_known_windows(seen, token_pieces(seen)) == 3


def test_unrelated_text_and_the_same_tokens_in_another_order_are_not_known():
    seen = random_windows(*[512] * 20)
    pieces = token_pieces(seen)
    assert count_known_windows(random_windows(*[512] * 20, seed=1), pieces) == 0
    assert (
        count_known_windows(
            Windows(tuple(Window(window.tokens[::-1]) for window in seen.windows), ()), pieces
        )
        == 0
    )
    swapped = [
        tuple(token for pair in zip(window.tokens[1::2], window.tokens[::2]) for token in pair)
        for window in seen.windows
    ]
    assert count_known_windows(Windows(tuple(map(Window, swapped)), ()), pieces) == 0


@pytest.mark.parametrize("lengths", [(), (0,), (1, 5), (PIECE - 1,)])
def test_windows_without_a_whole_piece_are_neither_known_nor_make_others_known(lengths):
    short, seen = random_windows(*lengths), random_windows(256)
    assert token_pieces(short) == ""
    assert count_known_windows(short, token_pieces(seen)) == 0
    assert count_known_windows(seen, token_pieces(short)) == 0


def test_pieces_are_64_bits_for_each_piece_of_text():
    pieces = token_pieces(random_windows(256, 100))
    assert len(base64.b64decode(pieces)) == 8 * (256 // PIECE + 100 // PIECE)
    twice = Windows(random_windows(256).windows * 2, ())
    assert token_pieces(twice) == token_pieces(random_windows(256))


# Window length


def test_the_window_is_as_long_as_asked_for_within_the_models_positions():
    assert window_length(512, 4096) == 512
    assert window_length(4096, 4096) == 4096
    # as XLNet says that it has no limit
    assert window_length(8192, None) == window_length(8192, -1) == 8192
    assert window_length(None, 1024) == 1024
    assert window_length(None, 8192) == window_length(None, None) == 2048
    with pytest.raises(DataError, match="--seq-len 4097 is more than the 4096 positions"):
        window_length(4097, 4096)
