"""How a model reads text: its tokenizer, and the length of the windows that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.data.windows import load_tokenizer, window_length
from quantkit.models.skeleton import auto_config

DEFAULT_LENGTH = 2048


def tokenizer_and_length(
    model: Path,
    requested: int | None,
    trust_remote_code: bool,
    default: int = DEFAULT_LENGTH,
    reserved: int = 0,
) -> tuple[Any, int]:
    """The model's tokenizer, and the length of its windows in tokens.

    requested: --seq-len; None takes the default, or fewer where the model has fewer positions.
    reserved: the model's positions that a window can't use.
    """
    config = auto_config(model, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokenizer, window_length(requested, positions and positions - reserved, default)
