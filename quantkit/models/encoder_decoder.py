"""The two stages of an encoder-decoder model: the encoder's blocks, then the decoder's.

Such a model is evaluated by its loss on a target text. The encoder reads the first half of a
window. The decoder predicts every token of the second half, from the tokens before it and the
encoder's final hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError
from quantkit.models.block_inputs import ALONE, FIRST_BLOCK_RUNS, BlockReturn
from quantkit.models.block_stack import BlockStack, Captured, call_forward

_RETURNS = (ALONE, BlockReturn(1), BlockReturn(2), FIRST_BLOCK_RUNS)


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that the encoder reads, and those that the decoder predicts.

    tokens: token ids [windows, positions].

    Returns two tensors [windows, positions // 2]; the last token of an odd length is dropped.
    """
    half = tokens.shape[1] // 2
    return tokens[:, :half], tokens[:, half : 2 * half]


class EncoderStage:
    """The encoder, which reads the first half of each window."""

    loads_first_block = True

    def __init__(self, model: Any) -> None:
        self._side, self._hidden_size = model.get_encoder(), model.config.hidden_size
        self.stack = BlockStack(model, _largest_list(model, self._side), _RETURNS)

    def capture(self, tokens: Tensor, encoded: Tensor | None, cache: Any) -> Captured:
        """See `Stage.capture`; tokens are whole windows [windows, positions]."""
        source = halves(tokens)[0]
        return self.stack.capture(source.shape, lambda: call_forward(self._side, input_ids=source))

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any) -> Tensor:
        """See `Stage.finish`; hidden: [windows, positions // 2, hidden size]."""
        with self.stack.bypassed(hidden):
            return call_forward(self._side, input_ids=halves(tokens)[0])

    def hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """[windows, positions // 2, hidden size], the shape for the first half of each window."""
        return (*halves(tokens)[0].shape, self._hidden_size)


class DecoderStage:
    """The decoder, which predicts the second half of each window."""

    loads_first_block = True

    def __init__(self, model: Any) -> None:
        self._side, self._config = model.get_decoder(), model.config
        self.stack = BlockStack(model, _largest_list(model, self._side), _RETURNS)

    def capture(self, tokens: Tensor, encoded: Tensor | None, cache: Any) -> Captured:
        """See `Stage.capture`; tokens are whole windows [windows, positions]."""
        assert encoded is not None
        read = self._shifted(halves(tokens)[1])
        return self.stack.capture(read.shape, lambda: self._forward(read, encoded))

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any) -> Tensor:
        # The blocks have read the encoder's hidden states already; here none of them runs.
        """See `Stage.finish`; hidden: [windows, positions // 2, hidden size]."""
        encoded = torch.zeros_like(hidden)
        with self.stack.bypassed(hidden):
            return self._forward(self._shifted(halves(tokens)[1]), encoded)

    def hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """[windows, positions // 2, hidden size], the shape for the second half of each window."""
        return (*halves(tokens)[1].shape, self._config.hidden_size)

    def _forward(self, read: Tensor, encoded: Tensor) -> Tensor:
        return call_forward(
            self._side, input_ids=read, encoder_hidden_states=encoded, use_cache=False
        )

    def _shifted(self, target: Tensor) -> Tensor:
        """The decoder's input ids: a start token, then the target without its last token."""
        starts = (
            getattr(self._config, name, None)
            for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id")
        )
        start = next((token for token in starts if token is not None), 0)
        return torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)


def _largest_list(model: nn.Module, side: nn.Module) -> str:
    """The path of an encoder's or decoder's list of blocks: the list with the most parameters.

    side: the encoder or the decoder.
    """
    lists = [module for module in side.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=_parameter_count, default=None)
    if largest is None:
        raise CheckpointError(
            f"{type(model).__name__} has no lists of encoder and of decoder blocks, so it can't be"
            " run block by block"
        )
    return next(name for name, module in model.named_modules() if module is largest)


def _parameter_count(blocks: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in blocks.parameters())
