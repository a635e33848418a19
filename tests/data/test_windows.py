"""Windows and their hashes."""

import pytest
from fake_tokenizer import FakeTokenizer, numbers

from quantkit.data.protocols import evaluation_windows
from quantkit.data.sampling import calibration_windows
from quantkit.data.sources import read_source
from quantkit.data.windows import Window, Windows, window_length
from quantkit.errors import DataError


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


def test_the_window_is_as_long_as_asked_for_within_the_models_positions():
    assert window_length(512, 4096) == 512
    assert window_length(4096, 4096) == 4096
    # as XLNet says that it has no limit
    assert window_length(8192, None) == window_length(8192, -1) == 8192
    assert window_length(None, 1024) == 1024
    assert window_length(None, 8192) == window_length(None, None) == 2048
    with pytest.raises(DataError, match="`seq_len=4097` is more than the 4096 positions"):
        window_length(4097, 4096)
