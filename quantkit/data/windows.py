"""Windows of tokens: the sequences that a model is run on, and which of their tokens are scored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from quantkit.errors import DataError

# Tokens per window, unless the user or the kind of model says otherwise.
DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Window:
    """One sequence that goes through the model.

    tokens: token ids.
    first_scored: position of the first token that is predicted and scored; all after it are too.
    """

    tokens: tuple[int, ...]
    first_scored: int = 1

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return len(self.tokens) - self.first_scored


@dataclass(frozen=True)
class Windows:
    """Windows and the sources that they were made from.

    windows: in order.
    source_sha256: hash of each source.
    words: number of words in the original text, for lmeval's metrics; 0 in other protocols.
    utf8_bytes: size of the original text in bytes, for lmeval's metrics; 0 in other protocols.
    """

    windows: tuple[Window, ...]
    source_sha256: tuple[str, ...]
    words: int = 0
    utf8_bytes: int = 0

    @property
    def data_sha256(self) -> str:
        """The hash of the only source, or a hash of all sources' hashes."""
        if len(self.source_sha256) == 1:
            return self.source_sha256[0]
        return hashlib.sha256("".join(self.source_sha256).encode()).hexdigest()

    @property
    def tokens_scored(self) -> int:
        """The number of scored tokens in all windows."""
        return sum(window.scored for window in self.windows)

    @property
    def tokens_sha256(self) -> str:
        """A hash of all tokens, window by window, and of the first scored positions."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(f"{window.first_scored}:{','.join(map(str, window.tokens))};".encode())
        return digest.hexdigest()


def targets_of(windows: Windows) -> Windows:
    """The same windows for an encoder-decoder model.

    The encoder reads the first half of a window, and every token of the second half is predicted.
    The last token of an odd length is dropped.
    """
    halved = [
        Window(window.tokens[: len(window.tokens) // 2 * 2], len(window.tokens) // 2)
        for window in windows.windows
    ]
    return Windows(tuple(halved), windows.source_sha256)


def window_length(
    requested: int | None, model_limit: int | None, default: int = DEFAULT_LENGTH
) -> int:
    """Tokens per window: `requested`, else `default`, or the model's number of positions if that is
    smaller.

    model_limit: the model's number of positions; None or less than 1 (XLNet's -1) is no limit.

    Raises DataError if more tokens are requested than the model has positions.
    """
    if model_limit is not None and model_limit < 1:
        model_limit = None
    if requested is None:
        return min(default, model_limit or default)
    if model_limit is not None and requested > model_limit:
        raise DataError(
            f"`seq_len={requested}` is more than the {model_limit} positions of this model",
            hint=f"use {model_limit} or less",
        )
    return requested
