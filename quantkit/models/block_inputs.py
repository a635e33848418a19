"""Captured block inputs: what a model's own forward calls each of its blocks with. Recorders stand
in the blocks' places, keep their arguments and return the hidden states that they are given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError

# Names of a block's hidden states where they aren't its first positional argument.
_HIDDEN_NAMES = ("hidden_states", "x", "inputs")


@dataclass(frozen=True)
class BlockReturn:
    """How a model's loop over its blocks takes the hidden states out of what a block returns.

    length: items of the tuple whose first one they are; None where a block returns them alone.
    first_block_runs: whether the first block must run for the other items, which all blocks share
    (T5's position bias).
    """

    length: int | None
    first_block_runs: bool = False


ALONE = BlockReturn(None)
FIRST_BLOCK_RUNS = BlockReturn(3, first_block_runs=True)


class SideOutput:
    """One item that a block returns after its hidden states, for a later block that is called with
    it (GLM-5's choice of tokens, ZAYA's routers).

    is_read: whether a later block is called with it.
    """

    def __init__(self) -> None:
        self.is_read = False
        self._values: list[Any] = []

    def put(self, value: Any) -> None:
        self._values = [value]

    def get(self) -> Any:
        if not self._values:
            raise CheckpointError(
                "a decoder block is called with what the one before it returns, and that one hasn't"
                " run; it can't be run by itself"
            )
        return self._values[0]


def _value_of(argument: Any) -> Any:
    return argument.get() if isinstance(argument, SideOutput) else argument


@dataclass(frozen=True)
class BlockInputs:
    """What the model calls one block with, for one batch, apart from its hidden states.

    arguments, keywords: those of the call.
    hidden_name: the keyword of the hidden states, or "" where they are the first argument.
    side_outputs: places for what the block returns after its hidden states, in that order.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    hidden_name: str
    side_outputs: tuple[SideOutput, ...] = ()

    def resolved(self) -> BlockInputs:
        """The same with the values of earlier blocks' side outputs."""
        values = (*self.arguments, *self.keywords.values())
        if not any(isinstance(value, SideOutput) for value in values):
            return self
        return replace(
            self,
            arguments=tuple(map(_value_of, self.arguments)),
            keywords={key: _value_of(value) for key, value in self.keywords.items()},
        )

    def keep_side_outputs(self, returned: Sequence[Any]) -> None:
        """returned: the items after the hidden states."""
        for place, value in zip(self.side_outputs, returned):
            if place.is_read:
                place.put(value)


class WrongReturn(Exception):
    """The model's loop takes the blocks' outputs apart in another way than the recorders return
    them.
    """


# arrive(arguments, keywords, side outputs) gives the hidden states to return
Arrive = Callable[[tuple[Any, ...], dict[str, Any], tuple[SideOutput, ...]], Tensor]


class Recorder(nn.Module):
    """Stands in place of a block: keeps what it is called with, and returns its hidden states (the
    last one may return others).

    with_side_outputs: return places after the hidden states, which show where the loop takes them.
    """

    def __init__(
        self,
        block: nn.Module,
        arrive: Arrive,
        returns: BlockReturn,
        with_side_outputs: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # no child: its parameters are not this module's
        self._arrive, self._returns = arrive, returns
        self._with_side_outputs = with_side_outputs

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        places = (SideOutput(), SideOutput()) if self._with_side_outputs else ()
        hidden = self._arrive(arguments, keywords, places)
        if self._returns.length is None:
            return hidden
        return (hidden, *(places or (None, None)))[: self._returns.length]

    def __getattr__(self, name: str) -> Any:
        """Models ask their blocks for what kind they are (`attention_type`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


class RunningRecorder(Recorder):
    """A recorder that also runs its block, and returns the block's other items."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden = self._arrive(arguments, keywords, ())
        return (hidden, *self.__dict__["_block"](*arguments, **keywords)[1:])


class InputRecord:
    """The block inputs of one forward, in the order of the blocks. shape: of the batch's tokens."""

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
        if not isinstance(output, Tensor) or tuple(output.shape[:2]) != self._shape:
            raise WrongReturn


class SharedTensors:
    """Keeps equal tensors of captured inputs once: masks and position embeddings of batch after
    batch.
    """

    COMPARED = 8  # the last few of a shape; values that depend on the tokens never come again

    def __init__(self) -> None:
        self._by_shape: dict[tuple[Any, ...], deque[Tensor]] = {}
        self._seen: dict[int, tuple[Any, Tensor]] = {}

    def of_batch(self, captured: Sequence[BlockInputs]) -> list[BlockInputs]:
        """The inputs of each block for one batch, made of tensors that are kept already where they
        are equal.
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
        # the first keeps the identity from being used again
        self._seen[id(tensor)] = (tensor, same)
        return same
