"""A key-value cache that stores nothing: it returns new keys and values to the attention that made
them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache


class _NoLayers(list):
    """The layers of an empty cache.

    A module that looks up its own layer (DeepSeek V4's compressors) finds None, and works as
    without a cache.
    """

    def __getitem__(self, _: Any) -> Any:
        return None


class NullCache(DynamicCache):
    """A DynamicCache that stores nothing and is always empty.

    Layers with a recurrent state start from zero in each window, and threads can share the cache.
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
