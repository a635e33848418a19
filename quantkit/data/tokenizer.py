"""Loading a model's tokenizer, and the special tokens that it puts before a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import DataError, brief

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model directory.

    Raises DataError if there is none, or if transformers can't load it.
    """
    advice = "copy the tokenizer's files from where the model comes from"
    if not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(
            f"{path} has no tokenizer (tokenizer.json), which is needed to read text; {advice}"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers and its backends raise plain Exceptions here
        raise DataError(
            f"the tokenizer in {path} can't be loaded ({brief(error)}); {advice}"
        ) from None


def leading_special_tokens(tokenizer: Any) -> list[int]:
    """The ids of the special tokens that the tokenizer puts before a text (BOS), without those
    after it.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    wrapped = tokenizer("a").input_ids
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain:
            return wrapped[:start]
    return []


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def prepend(prefix: list[int], tokens: list[int]) -> list[int]:
    """The prefix and the tokens, unless the tokens already begin with the prefix: many chat
    templates write BOS.
    """
    return tokens if tokens[: len(prefix)] == prefix else prefix + tokens
