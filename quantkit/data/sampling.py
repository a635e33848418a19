"""Sampling calibration windows with a seed, evenly from all sources."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from quantkit.data.sources import DataSource, Source, read_source
from quantkit.data.tokenizer import encode, leading_special_tokens, prepend
from quantkit.data.windows import Window, Windows
from quantkit.errors import DataError

# A shorter rest of a source isn't used: most of its tokens would be near the window's start.
MIN_REST_TOKENS = 32


def calibration_windows(
    data: Sequence[DataSource], tokenizer: Any, num_samples: int, seq_len: int, seed: int
) -> Windows:
    """Sample `num_samples` windows of `seq_len` tokens, evenly from all sources.

    Windows of one source don't overlap. If the text is too short, the rest of each source becomes a
    shorter window. The result may still hold fewer windows than `num_samples`.

    data: text sources.
    seed: decides the order in which a source's windows are drawn.

    Raises DataError if a source is shorter than one window, or if there are more sources than
    windows.
    """
    if num_samples < len(data):
        raise DataError(
            f"`num_samples={num_samples}` leaves some of the {len(data)} sources of `data` without"
            " a window",
            hint=f"ask for {len(data)} or more",
        )
    sources = [read_source(source, tokenizer) for source in data]
    available, rests = [], []
    for source in sources:
        windows, rest = _windows_and_rest(source, tokenizer, seq_len)
        random.Random(f"{seed}:{source.sha256}").shuffle(windows)
        available.append(windows)
        if len(rest) >= min(seq_len, MIN_REST_TOKENS):
            rests.append(Window(rest))
    drawn: list[Window] = []
    while len(drawn) < num_samples and any(available):
        drawn += [windows.pop() for windows in available if windows][: num_samples - len(drawn)]
    drawn += rests[: num_samples - len(drawn)]
    return Windows(tuple(drawn), tuple(source.sha256 for source in sources))


def _windows_and_rest(
    source: Source, tokenizer: Any, seq_len: int
) -> tuple[list[Window], tuple[int, ...]]:
    """A source's complete windows in order, and the tokens after the last one."""
    prefix = leading_special_tokens(tokenizer)
    stream = [
        token
        for document in source.documents
        for token in prepend(prefix, encode(tokenizer, document))
    ]
    windows = [
        Window(tuple(stream[start : start + seq_len]))
        for start in range(0, len(stream) - seq_len + 1, seq_len)
    ]
    if not windows:
        raise DataError(
            f"{source.name} gives {len(stream)} tokens, less than one window of {seq_len}",
            hint="give more text or a smaller `seq_len`",
        )
    return windows, tuple(stream[len(windows) * seq_len :])
