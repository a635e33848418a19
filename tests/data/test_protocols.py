"""Windows by each protocol of evaluation, compared with the procedures that they copy."""

from pathlib import Path

import pytest
from fake_tokenizer import BOS, CHARACTERS, EOS, FakeTokenizer, jsonl, numbers, plain

from quantkit.data.protocols import evaluation_windows
from quantkit.data.sources import BUNDLED_CALIBRATION, BUNDLED_EVALUATION
from quantkit.errors import DataError


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


def test_the_bundled_texts_are_readable():
    for path in (BUNDLED_CALIBRATION, BUNDLED_EVALUATION):
        assert Path(path).is_file()
        assert len(evaluation_windows([str(path)], FakeTokenizer(), "gptq", 2048).windows) >= 2
