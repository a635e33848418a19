"""Windows drawn for calibration."""

import pytest
from fake_tokenizer import BOS, EOS, FakeTokenizer, jsonl, numbers, plain

from quantkit.data.protocols import evaluation_windows
from quantkit.data.sampling import MIN_REST_TOKENS, calibration_windows
from quantkit.errors import DataError


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
        DataError, match="`num_samples=1` leaves some of the 2 sources of `data` without a window"
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


@pytest.mark.parametrize(
    "length, is_window", [(MIN_REST_TOKENS, True), (MIN_REST_TOKENS - 1, False)]
)
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
