"""How a model reads text: its tokenizer, and how many tokens a window can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.data.tokenizer import load_tokenizer
from quantkit.data.windows import DEFAULT_LENGTH, window_length
from quantkit.models.skeleton import auto_config


def tokenizer_and_length(
    model: Path,
    requested: int | None,
    trust_remote_code: bool,
    default: int = DEFAULT_LENGTH,
    reserved: int = 0,
) -> tuple[Any, int]:
    """The model's tokenizer, and the number of tokens per window.

    requested: tokens per window; None takes `default`, or fewer if the model has fewer positions.
    reserved: number of the model's positions that a window can't use.

    Raises DataError or CheckpointError if the model has no usable tokenizer, configuration or
    length.
    """
    config = auto_config(model, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokenizer, window_length(requested, positions and positions - reserved, default)
