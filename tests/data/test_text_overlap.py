"""Whether windows were seen before."""

import base64
import random

import pytest

from quantkit.data.text_overlap import PIECE, count_known_windows, token_pieces
from quantkit.data.windows import Window, Windows


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
