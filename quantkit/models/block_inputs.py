"""Captured block inputs: the arguments with which a model's own forward calls each of its blocks.

Recorders replace the blocks. They store their arguments and return the hidden states unchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError

# Keywords by which blocks are given hidden states, if these aren't the first positional argument.
_HIDDEN_NAMES = ("hidden_states", "x", "inputs")


@dataclass(frozen=True)
class BlockReturn:
    """How a model's forward unpacks a block's return value into hidden states.

    length: number of items in the returned tuple, which begins with the hidden states; None if they
        are returned alone.
    first_block_runs: whether the first block must run for the other items, which all blocks share
        (T5's position bias).
    """

    length: int | None
    first_block_runs: bool = False


ALONE = BlockReturn(None)
FIRST_BLOCK_RUNS = BlockReturn(3, first_block_runs=True)


class SideOutput:
    """A placeholder for one item that a block returns after its hidden states and a later block is
    called with (GLM-5's token selection, ZAYA's routers).

    is_read: whether a later block is called with it.
    """

    def __init__(self) -> None:
        self.is_read = False
        self._values: list[Any] = []

    def put(self, value: Any) -> None:
        """Store the item that the block returned."""
        self._values = [value]

    def get(self) -> Any:
        """The item that the block returned. Raises CheckpointError if the block hasn't run."""
        if not self._values:
            raise CheckpointError(
                "a decoder block takes an output of an earlier block, which hasn't run; it can't be"
                " run on its own"
            )
        return self._values[0]


def _value_of(argument: Any) -> Any:
    return argument.get() if isinstance(argument, SideOutput) else argument


@dataclass(frozen=True)
class BlockInputs:
    """The arguments of one block's call for one batch, except the hidden states.

    arguments: positional arguments after the hidden states.
    keywords: keyword arguments.
    hidden_name: keyword of the hidden states, or "" if they are the first positional argument.
    side_outputs: placeholders for the items that the block returns after its hidden states, in
        order.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    hidden_name: str
    side_outputs: tuple[SideOutput, ...] = ()

    def resolved(self) -> BlockInputs:
        """The same, with placeholders replaced by the values of earlier blocks' side outputs."""
        values = (*self.arguments, *self.keywords.values())
        if not any(isinstance(value, SideOutput) for value in values):
            return self
        return replace(
            self,
            arguments=tuple(map(_value_of, self.arguments)),
            keywords={key: _value_of(value) for key, value in self.keywords.items()},
        )

    def keep_side_outputs(self, returned: Sequence[Any]) -> None:
        """Store the side outputs that later blocks read.

        returned: the items that the block returned after its hidden states.
        """
        for place, value in zip(self.side_outputs, returned):
            if place.is_read:
                place.put(value)


class WrongReturn(Exception):
    """The model's forward unpacks the blocks' outputs differently than the recorders return
    them.
    """


# arrive(arguments, keywords, side_outputs) → the hidden states that a recorder returns
Arrive = Callable[[tuple[Any, ...], dict[str, Any], tuple[SideOutput, ...]], Tensor]


class Recorder(nn.Module):
    """Replaces a block: stores the arguments of its call, and returns hidden states that `arrive`
    supplies.

    with_side_outputs: also return placeholders after the hidden states, to find out which calls use
        them.
    """

    def __init__(
        self,
        block: nn.Module,
        arrive: Arrive,
        returns: BlockReturn,
        with_side_outputs: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule, so its parameters aren't this module's
        self._arrive, self._returns = arrive, returns
        self._with_side_outputs = with_side_outputs

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        places = (SideOutput(), SideOutput()) if self._with_side_outputs else ()
        hidden = self._arrive(arguments, keywords, places)
        if self._returns.length is None:
            return hidden
        return (hidden, *(places or (None, None)))[: self._returns.length]

    def __getattr__(self, name: str) -> Any:
        """The block's attribute: models ask their blocks for their kind (`attention_type`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


class RunningRecorder(Recorder):
    """A recorder that also runs its block, and returns the items after the block's hidden
    states.
    """

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden = self._arrive(arguments, keywords, ())
        return (hidden, *self.__dict__["_block"](*arguments, **keywords)[1:])


class InputRecord:
    """The block inputs of one forward, in the order of the blocks.

    shape: shape of the batch's token ids, [windows, positions].
    """

    def __init__(self, shape: torch.Size) -> None:
        self.inputs: list[BlockInputs] = []
        self.first: Tensor | None = None
        self._shape = tuple(shape)

    @property
    def reads_side_outputs(self) -> bool:
        """Whether a block was called with a side output of an earlier one."""
        return any(place.is_read for inputs in self.inputs for place in inputs.side_outputs)

    def arrive(
        self,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        side_outputs: tuple[SideOutput, ...] = (),
    ) -> Tensor:
        """Record one block's call, and return the hidden states that it was given.

        Raises WrongReturn if they don't look like hidden states, and CheckpointError if the model
        can't be run block by block.
        """
        name = "" if arguments else next((name for name in _HIDDEN_NAMES if name in keywords), None)
        if name is None:
            raise CheckpointError(
                f"a decoder block is called without hidden states, only with {', '.join(keywords)};"
                " it can't be run block by block"
            )
        hidden = arguments[0] if arguments else keywords[name]
        if self.first is None:
            self.first = hidden
        elif not isinstance(hidden, Tensor) or hidden.shape != self.first.shape:
            raise WrongReturn
        elif hidden is not self.first and not torch.equal(hidden, self.first):
            raise CheckpointError(
                "the model changes hidden states between its decoder blocks; it can't be run block"
                " by block"
            )
        for value in (*arguments, *keywords.values()):
            if isinstance(value, SideOutput):
                value.is_read = True
        others = {key: value for key, value in keywords.items() if key != name}
        self.inputs.append(BlockInputs(arguments[1:], others, name, side_outputs))
        return hidden

    def require_end(self, output: Any) -> None:
        """Raise WrongReturn unless a forward's output looks like final hidden states."""
        if not isinstance(output, Tensor) or tuple(output.shape[:2]) != self._shape:
            raise WrongReturn


class SharedTensors:
    """Deduplicates tensors of captured inputs: masks and position embeddings are equal in batch
    after batch.
    """

    # Tensors of one shape that a new one is compared with. More isn't needed: values that depend on
    # the tokens don't repeat.
    COMPARED = 8

    def __init__(self) -> None:
        self._by_shape: dict[tuple[Any, ...], deque[Tensor]] = {}
        self._seen: dict[int, tuple[Any, Tensor]] = {}

    def of_batch(self, captured: Sequence[BlockInputs]) -> list[BlockInputs]:
        """The inputs of each block for one batch, with equal tensors replaced by those stored
        already.
        """
        shared = [
            replace(
                inputs,
                arguments=self._value(inputs.arguments),
                keywords=self._value(inputs.keywords),
            )
            for inputs in captured
        ]
        self._seen.clear()
        return shared

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self._value(item) for item in value)
        return (
            {key: self._value(item) for key, item in value.items()}
            if type(value) is dict
            else value
        )

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._seen:
            return self._seen[id(tensor)][1]
        alike = self._by_shape.setdefault(
            (tuple(tensor.shape), tensor.stride(), tensor.dtype), deque(maxlen=self.COMPARED)
        )
        same = next((known for known in alike if torch.equal(known, tensor)), None)
        if same is None:
            alike.append(tensor)
            same = tensor
        # The tensor itself is kept as well, so that its id isn't reused.
        self._seen[id(tensor)] = (tensor, same)
        return same
