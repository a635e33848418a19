"""A cache that keeps nothing: it returns keys and values to the attention that made them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache


class _NoLayers(list):
    """The layers of a cache that has none: whoever looks for one of his own (DeepSeek V4's
    compressors) finds None, and works as without a cache.
    """

    def __getitem__(self, _: Any) -> Any:
        return None


class NullCache(DynamicCache):
    """A cache without a past that keeps nothing: layers with a recurrent state begin afresh in each
    window, and threads can share it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = _NoLayers()

    def update_indexer(self, indexer_key_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return indexer_key_states

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None

    def update_conv_state(self, conv_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return recurrent_states

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        return False
