"""Windows of tokens: what goes through a model together, and how much of it is scored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from quantkit.errors import DataError


@dataclass(frozen=True)
class Window:
    """Tokens that go through the model together.

    tokens: their ids.
    first_scored: the position from which on tokens are predicted and scored.
    """

    tokens: tuple[int, ...]
    first_scored: int = 1

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.first_scored


@dataclass(frozen=True)
class Windows:
    """Windows and what they were made of.

    windows: in order.
    source_sha256: the hash of each source.
    words: of the original text, for lmeval's metrics; 0 in other protocols.
    utf8_bytes: of the original text, likewise.
    """

    windows: tuple[Window, ...]
    source_sha256: tuple[str, ...]
    words: int = 0
    utf8_bytes: int = 0

    @property
    def data_sha256(self) -> str:
        """The hash of the one source, or of all sources' hashes."""
        if len(self.source_sha256) == 1:
            return self.source_sha256[0]
        return hashlib.sha256("".join(self.source_sha256).encode()).hexdigest()

    @property
    def tokens_scored(self) -> int:
        return sum(window.scored for window in self.windows)

    @property
    def tokens_sha256(self) -> str:
        """A hash of all tokens, window by window, and of which are scored."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(f"{window.first_scored}:{','.join(map(str, window.tokens))};".encode())
        return digest.hexdigest()


def targets_of(windows: Windows) -> Windows:
    """The same windows for an encoder-decoder model: the encoder reads the first half, and every
    token of the second half is predicted. An odd last token is dropped.
    """
    halved = [
        Window(window.tokens[: len(window.tokens) // 2 * 2], len(window.tokens) // 2)
        for window in windows.windows
    ]
    return Windows(tuple(halved), windows.source_sha256)


def window_length(requested: int | None, model_limit: int | None, default: int = 2048) -> int:
    """Tokens per window: as requested, else the default, or the model's positions where these are
    fewer.

    Raises DataError where more are requested than the model has positions.
    """
    if model_limit is not None and model_limit < 1:
        model_limit = None  # XLNet's -1
    if requested is None:
        return min(default, model_limit or default)
    if model_limit is not None and requested > model_limit:
        raise DataError(
            f"--seq-len {requested} is more than the {model_limit} positions of this model; use"
            f" {model_limit} or less"
        )
    return requested
