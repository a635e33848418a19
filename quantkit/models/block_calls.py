"""What a model's own forward calls each of its decoder blocks with: recorders stand in the blocks'
places, keep their arguments and return what they are given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError

# Ways in which blocks return hidden states: a tensor, or a tuple of this length; RUN_FIRST: of
# three, for which the first block is run.
WAYS, RUN_FIRST = (0, 1, 2, 3), -1
# How a block's hidden states are called where they aren't the first positional argument.
_HIDDEN_NAMES = ("hidden_states", "x", "inputs")


class Handed:
    """What a block returns beside hidden states, put here when it has run, for the next block that
    is called with it (GLM-5's choice of tokens, ZAYA's routers).
    """

    def __init__(self) -> None:
        self.is_wanted = False
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


@dataclass(frozen=True)
class Call:
    """What one block was called with beside its hidden states, for one batch. hidden_name: their
    keyword, or "" for the first argument.

    hands_on: where what the block returns beside hidden states goes, in the order of its tuple.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    hidden_name: str
    hands_on: tuple[Handed, ...] = ()

    def given(self) -> Call:
        """The call with what the block before has handed on."""
        if not any(
            isinstance(value, Handed) for value in (*self.arguments, *self.keywords.values())
        ):
            return self
        arguments = tuple(
            value.get() if isinstance(value, Handed) else value for value in self.arguments
        )
        return replace(
            self,
            arguments=arguments,
            keywords={
                key: value.get() if isinstance(value, Handed) else value
                for key, value in self.keywords.items()
            },
        )

    def hand_on(self, beside: Sequence[Any]) -> None:
        for place, value in zip(self.hands_on, beside):
            if place.is_wanted:
                place.put(value)


class WrongReturn(Exception):
    """The model's loop takes the blocks' outputs apart in another way than the recorders return
    them.
    """


class Recorder(nn.Module):
    """Stands in place of a block: keeps what it is called with, returns its hidden states (or, from
    the last one, those that were given).

    hands_on: what it returns beside them shows where the model's loop takes it.
    """

    def __init__(
        self, block: nn.Module, arrive: Callable[..., Tensor], outputs: int, hands_on: bool = False
    ) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # no child: its parameters are not this module's
        self._arrive, self._outputs, self._hands_on = arrive, outputs, hands_on

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        places = (Handed(), Handed()) if self._hands_on else ()
        hidden = self._arrive(arguments, keywords, places)
        return (
            (hidden, *(places or (None, None)))[
                : 3 if self._outputs == RUN_FIRST else self._outputs
            ]
            if self._outputs
            else hidden
        )

    def __getattr__(self, name: str) -> Any:
        """Models ask their blocks for what kind they are (`attention_type`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


class RunningRecorder(Recorder):
    """The same for a block that is run all the same, hidden states apart: what else it returns, all
    blocks share (T5's position bias).
    """

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden = self._arrive(arguments, keywords)
        return (hidden, *self.__dict__["_block"](*arguments, **keywords)[1:])


class Tape:
    """The calls of one forward, in the order of the blocks. shape: of the batch's tokens."""

    def __init__(self, shape: torch.Size) -> None:
        self.calls: list[Call] = []
        self.first: Tensor | None = None
        self._shape = tuple(shape)

    @property
    def is_handed_on(self) -> bool:
        """Whether a block was called with what the one before it returned beside hidden states."""
        return any(place.is_wanted for call in self.calls for place in call.hands_on)

    def arrive(
        self,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        hands_on: tuple[Handed, ...] = (),
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
            if isinstance(value, Handed):
                value.is_wanted = True
        self.calls.append(
            Call(
                arguments[1:],
                {key: value for key, value in keywords.items() if key != name},
                name,
                hands_on,
            )
        )
        return hidden

    def require_end(self, output: Any) -> None:
        if not isinstance(output, Tensor) or tuple(output.shape[:2]) != self._shape:
            raise WrongReturn


class Interned:
    """Tensors that hold the same are kept once: masks and position embeddings of batch after
    batch.
    """

    COMPARED = 8  # the last few of a shape; values that depend on the tokens never come again

    def __init__(self) -> None:
        self._by_shape: dict[tuple[Any, ...], deque[Tensor]] = {}
        self._seen: dict[int, tuple[Any, Tensor]] = {}

    def call(self, call: Call) -> Call:
        return replace(
            call, arguments=self._value(call.arguments), keywords=self._value(call.keywords)
        )

    def forget_identities(self) -> None:
        self._seen.clear()

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
