"""A stack of blocks (one nn.ModuleList), and how the model's own forward calls it.

The arguments of a block aren't guessed: the forward runs with recorders in place of the blocks. How
it unpacks a block's return value is found by trying.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError, QuantkitError
from quantkit.models.block_inputs import (
    ALONE,
    Arrive,
    BlockInputs,
    BlockReturn,
    InputRecord,
    Recorder,
    RunningRecorder,
    WrongReturn,
)
from quantkit.models.threads import one_thread


@dataclass(frozen=True)
class Captured:
    """The inputs of a stack for one batch.

    hidden: hidden states before the first block, [windows, positions, hidden size] in most models.
    inputs: the other arguments of each block.
    """

    hidden: Tensor
    inputs: list[BlockInputs]


class BlockStack:
    """One list of blocks in the module tree.

    name: its path.
    returns: forms in which the blocks may return hidden states, tried in this order.
    has_side_outputs: whether blocks read side outputs of earlier blocks; known after the first
        capture.
    """

    def __init__(self, model: nn.Module, name: str, returns: Sequence[BlockReturn]) -> None:
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        self.name, self.blocks = name, blocks
        self._model_name, self._candidates = type(model).__name__, returns
        self._returns: BlockReturn | None = None  # known after the first capture
        self.has_side_outputs = False

    def __len__(self) -> int:
        return len(self.blocks)

    def capture(self, shape: torch.Size, forward: Callable[[], Tensor]) -> Captured:
        """Run the model with recorders in place of the blocks.

        shape: shape of the batch's token ids, [windows, positions].
        forward: runs the model on the batch.

        Raises CheckpointError if the model can't be run block by block.
        """
        known = [self._returns] if self._returns is not None else []
        reason = "its blocks return more than hidden states"
        for returns in dict.fromkeys((*known, *self._candidates)):
            found = self._try(returns, shape, forward)
            if isinstance(found, str):
                reason = found or reason
                continue
            if len(found.inputs) != len(self.blocks):
                raise self._unusual(
                    f"its forward calls {len(found.inputs)} of {len(self.blocks)} blocks"
                )
            if self._returns is None:
                found = self._with_side_outputs(returns, shape, forward) or found
                self.has_side_outputs = found.reads_side_outputs
            self._returns = returns
            assert found.first is not None
            return Captured(found.first, found.inputs)
        raise self._unusual(reason)

    def _try(
        self, returns: BlockReturn, shape: torch.Size, forward: Callable[[], Tensor]
    ) -> InputRecord | str:
        """The recorded inputs; or, if the forward can't unpack such return values, the reason (""
        if unknown).
        """
        record = InputRecord(shape)
        try:
            with self._recorders(record.arrive, returns, self.has_side_outputs):
                record.require_end(forward())
        except WrongReturn as wrong:
            return str(wrong)
        return record

    def _with_side_outputs(
        self, returns: BlockReturn, shape: torch.Size, forward: Callable[[], Tensor]
    ) -> InputRecord | None:
        """The inputs recorded with placeholders for side outputs, or None if no block reads
        them.
        """
        if returns.first_block_runs or returns.length not in (2, 3):
            return None
        record = InputRecord(shape)
        try:
            with self._recorders(record.arrive, returns, with_side_outputs=True):
                record.require_end(forward())
        except (
            WrongReturn,
            QuantkitError,
            RuntimeError,
        ):  # the model computes with the placeholders
            if record.reads_side_outputs:
                raise self._unusual(
                    "its blocks pass more than hidden states to each other, in an unknown way"
                ) from None
        return record if record.reads_side_outputs else None

    def _unusual(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._model_name} can't be run block by block: {why}")

    @contextmanager
    def bypassed(self, final: Tensor | None = None) -> Iterator[None]:
        """A context in which the blocks return their hidden states unchanged. Use it after
        `capture`.

        final: hidden states that the last block returns instead.
        """
        record = InputRecord(torch.Size())
        with self._recorders(record.arrive, self._returns or ALONE, final=final):
            yield

    @contextmanager
    def _recorders(
        self,
        arrive: Arrive,
        returns: BlockReturn,
        with_side_outputs: bool = False,
        final: Tensor | None = None,
    ) -> Iterator[None]:
        blocks = list(self.blocks)

        def give_final(*_: Any) -> Tensor:
            assert final is not None
            return final

        for number, block in enumerate(blocks):
            if returns.first_block_runs and number == 0 and final is None:
                self.blocks[number] = RunningRecorder(block, arrive, returns)
                continue
            is_last = final is not None and number == len(blocks) - 1
            self.blocks[number] = Recorder(
                block, give_final if is_last else arrive, returns, with_side_outputs
            )
        try:
            yield
        finally:
            for number, block in enumerate(blocks):
                self.blocks[number] = block


class Stage(Protocol):
    """One stack of a model, and the part of the forward before and after it.

    A decoder or an encoder alone has one stage; an encoder-decoder model has two.

    stack: its blocks.
    loads_first_block: whether the first block needs its weights while inputs are captured.
    """

    stack: BlockStack
    loads_first_block: bool

    def capture(self, tokens: Tensor, encoded: Tensor | None, cache: Any) -> Captured:
        """The inputs of the stage's blocks for one batch.

        tokens: token ids [windows, positions].
        encoded: final hidden states of the stage before, or None.
        cache: given to the forward as `past_key_values`, or None.
        """
        ...

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any) -> Tensor:
        """The stage's final hidden states (after its last norm).

        hidden: output of its last block.
        """
        ...

    def hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """The shape of a batch's hidden states between blocks. The weights outside of the blocks
        must be loaded.
        """
        ...


def call_forward(body: nn.Module, **keywords: Any) -> Tensor:
    """The first output of a module's forward, computed on one thread.

    Raises WrongReturn if the forward can't unpack what the recorders return.
    """
    with one_thread(), torch.inference_mode():
        try:
            return body(**keywords)[0]
        except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise WrongReturn(f"{type(error).__name__}: {error}") from error


TEXT_RETURNS = (ALONE, BlockReturn(1), BlockReturn(2), BlockReturn(3))
_PROBED = (2, 3)  # windows and positions of a batch that shows the shape of hidden states


class SingleStage:
    """The only stage of a decoder or an encoder."""

    loads_first_block = False

    def __init__(
        self, model: nn.Module, blocks_name: str, device: torch.device, takes_cache: bool
    ) -> None:
        self.stack = BlockStack(model, blocks_name, TEXT_RETURNS)
        self._model, self._device, self._takes_cache = model, device, takes_cache
        self._probed_shape: tuple[int, ...] | None = None

    def capture(self, tokens: Tensor, encoded: Tensor | None, cache: Any) -> Captured:
        """See `Stage.capture`; `encoded` isn't used."""
        try:
            return self.stack.capture(tokens.shape, lambda: self._forward(tokens, cache))
        except CheckpointError:
            if not getattr(cache, "may_be_left_out", False):
                raise
        # Some models accept only their own cache class, and have no keys and values to measure.
        self._takes_cache = False
        return self.stack.capture(tokens.shape, lambda: self._forward(tokens, None))

    def finish(self, tokens: Tensor, hidden: Tensor, cache: Any) -> Tensor:
        """See `Stage.finish`."""
        with self.stack.bypassed(hidden):
            return self._forward(tokens, cache)

    def hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        """The shape of a batch's hidden states, found by running a small batch once.

        Some models have several streams: [streams, windows, positions, hidden size] (Gemma 3n), or
        streams after the positions (DeepSeek V4). CPM-Ant has more positions than tokens; the shape
        returned for it is too small.
        """
        if self._probed_shape is None:
            probe = torch.zeros(_PROBED, dtype=torch.long, device=self._device)
            self._probed_shape = tuple(self.capture(probe, None, None).hidden.shape)
        found = self._probed_shape
        place = next(
            (place for place in range(len(found)) if found[place : place + 2] == _PROBED), None
        )
        if place is None:
            return (*tokens.shape, found[-1])
        return (*found[:place], *tokens.shape, *found[place + 2 :])

    def _forward(self, tokens: Tensor, cache: Any) -> Tensor:
        body_name = self.stack.name.rpartition(".")[0]
        body = self._model.get_submodule(body_name)
        accepted = inspect.signature(body.forward).parameters
        if "input_ids" not in accepted:  # an encoder whose embeddings are in the parent module
            body = self._model.get_submodule(body_name.rpartition(".")[0])
            accepted = inspect.signature(body.forward).parameters
        keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if cache is not None and "past_key_values" in accepted and self._takes_cache:
            keywords = {"past_key_values": cache, "use_cache": True}
        return call_forward(body, input_ids=tokens, **keywords)
