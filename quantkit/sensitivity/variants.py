"""Many variants of one model over the same windows, block by block: each block's weights are read
once, and variants that are alike up to a block share everything before it.

A variant says for each set of Linears which of its choices it takes. Before the first block there
is one stream of hidden states; it branches where two variants differ for the first time. So the
states of all streams lie between two blocks (in memory, or in a file where they don't fit), and a
block runs once for each stream that leaves it: with n variants that differ in one block each, on
average half of n times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError, NonFiniteError
from quantkit.models.blockwise import BlockwiseModel
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.threads import each_batch

# For each set the number of its choice.
Variant = tuple[int, ...]


@dataclass(frozen=True)
class Swap:
    """What takes another's place in a block while a variant runs: a module, a parameter, or a
    setting of one.
    """

    owner: nn.Module
    leaf: str
    value: Any


# (block's number, the block, set's number, choice) → what changes; called once for each choice that
# a block has to make.
Installer = Callable[[int, nn.Module, int, int], Sequence[Swap]]


@dataclass(frozen=True)
class VariantStates:
    """Final hidden states of each variant. block_runs: how often a block met all windows."""

    states: HiddenStates
    windows: int
    stream_of: tuple[int, ...]  # by variant: equal variants share one
    block_runs: int

    def get(self, variant: int, window: int) -> Tensor:
        """[positions, hidden size]"""
        return self.states.get(self.stream_of[variant] * self.windows + window)[0]

    def close(self) -> None:
        self.states.close()


def count_block_runs(variants: Sequence[Variant], block_of: Sequence[int], blocks: int) -> int:
    """How often `run_variants` runs a block. block_of: the block of each set."""
    total = 0
    for block in range(blocks):
        last = [number for number, of in enumerate(block_of) if of <= block]
        total += len({tuple(variant[number] for number in last) for variant in variants})
    return total


class Keeper(Protocol):
    """What an interrupted run goes on from."""

    def restore(self, states: HiddenStates, numbers_behind: Callable[[int], Sequence[int]]) -> int:
        """Put in place the states that were saved, of these numbers behind each block; returns the
        block to begin with.
        """

    def block_done(
        self, number: int, blocks: int, states: HiddenStates, numbers: Sequence[int]
    ) -> None:
        """Behind each block; numbers: of the states that lie there."""


def run_variants(
    blocks: BlockwiseModel,
    batches: Mapping[int, Tensor],
    variants: Sequence[Variant],
    block_of: Sequence[int],
    install: Installer,
    look: Callable[[int, nn.Module, Callable[[int], Tensor]], None] = lambda number, block, run: (
        None
    ),
    on_progress: Callable[[float, float], None] = lambda done, total: None,
    keeper: Keeper | None = None,
    count: int | None = None,
) -> VariantStates:
    """batches: the windows' token ids, [1, positions] each, by number. variants: the first is the
    one that all others branch off from.

    look: called with each block's number, the block, and a function that runs a window through it
    as the first variant does. count: how many windows there are, where some are run elsewhere.
    Leaves the model with its output head in memory and without its blocks.
    """
    run = _Run(blocks, batches, variants, block_of, install, count or len(batches), on_progress)
    try:
        run.begin(keeper)
        for number in range(run.first, blocks.block_count):
            run.block(number, look)
            if keeper is not None:
                keeper.block_done(number, blocks.block_count, run.states, run.numbers)
        run.finish()
    except BaseException:
        run.states.close()
        raise
    finally:
        blocks.close()
    stream_of = {variant: stream for stream, members in run.streams.items() for variant in members}
    return VariantStates(
        run.states,
        run.count,
        tuple(stream_of[number] for number in range(len(variants))),
        run.total,
    )


class _Run:
    """One walk through the blocks. count: of the windows; a stream's states of a window are number
    stream · count + window.
    """

    def __init__(
        self,
        blocks: BlockwiseModel,
        batches: Mapping[int, Tensor],
        variants: Sequence[Variant],
        block_of: Sequence[int],
        install: Installer,
        count: int,
        on_progress: Callable[[float, float], None],
    ) -> None:
        self._blocks, self._batches, self._variants, self._install, self._on_progress = (
            blocks,
            batches,
            variants,
            install,
            on_progress,
        )
        self.count, self.first, self._done = count, 0, 0
        self.total = count_block_runs(variants, block_of, blocks.block_count)
        self._here = [
            [place for place, of in enumerate(block_of) if of == number]
            for number in range(blocks.block_count)
        ]
        # a stream is called after the first of its variants
        self.streams = {0: list(range(len(variants)))}
        # It lies on the CPU: a GPU's memory wouldn't hold so many.
        self.states = HiddenStates()

    @property
    def numbers(self) -> list[int]:
        """Of the states that there are."""
        return [stream * self.count + window for stream in self.streams for window in self._batches]

    def _numbers_behind(self, number: int) -> list[int]:
        streams = self.streams
        for here in self._here[: number + 1]:
            streams = _branched(streams, self._variants, here)[1]
        return [stream * self.count + window for stream in streams for window in self._batches]

    def begin(self, keeper: Keeper | None) -> None:
        """What comes before the blocks; and those that an earlier run went through."""
        blocks, windows = self._blocks, list(self._batches)
        blocks.load_outer(with_head=False)
        shapes = {window: blocks.states_shape(tokens) for window, tokens in self._batches.items()}
        places = range(len(self._variants))
        self.states.expect(
            {
                stream * self.count + window: shape
                for stream in places
                for window, shape in shapes.items()
            },
            blocks.states_dtype,
        )
        self._calls = dict(
            zip(windows, blocks.record(list(self._batches.values()), self.states, numbers=windows))
        )
        blocks.free_outer()
        for place in [
            place for calls in self._calls.values() for call in calls for place in call.hands_on
        ]:
            place.put(None)  # `_output` requires that it stays so
        self.first = keeper.restore(self.states, self._numbers_behind) if keeper is not None else 0
        for number in range(self.first):
            jobs, self.streams = _branched(self.streams, self._variants, self._here[number])
            self._done += sum(len(pairs) for _, pairs in jobs)
            self._forget_calls(number)

    def _forget_calls(self, number: int) -> None:
        for calls in self._calls.values():
            calls[number] = None

    def block(
        self, number: int, look: Callable[[int, nn.Module, Callable[[int], Tensor]], None]
    ) -> None:
        jobs, self.streams = _branched(self.streams, self._variants, self._here[number])
        with self._blocks.block(number) as block:
            look(number, block, lambda window: self._output(number, block, 0, window))
            swaps = _Swaps(number, block, self._here[number], self._install)
            for choices, pairs in jobs:
                with swaps.in_place(choices):
                    self._run_pairs(number, block, pairs)
        self._forget_calls(number)
        self.states.turn()

    def _output(self, number: int, block: nn.Module, parent: int, window: int) -> Tensor:
        hidden, call = (
            self.states.get(parent * self.count + window).to(self._blocks.device),
            self._calls[window][number],
        )
        output = self._blocks.run_block(block, call, hidden)
        if any(place.get() is not None for place in call.hands_on):
            raise CheckpointError(
                f"the decoder blocks of {self._blocks.where} hand on more than hidden states, which"
                " sensitivity doesn't keep for each variant; export the model in several recipes"
                " and let eval compare them"
            )
        return output

    def _run_pairs(self, number: int, block: nn.Module, pairs: Sequence[tuple[int, int]]) -> None:
        """Each of the windows through the block, from one stream (parent) into another (child)."""
        blocks = self._blocks
        work = [(parent, stream, window) for parent, stream in pairs for window in self._batches]

        def step(index: int) -> None:
            parent, stream, window = work[index]
            output = self._output(number, block, parent, window)
            if not torch.isfinite(output).all():
                raise NonFiniteError(
                    f"{blocks.where} gives NaN or infinity in window {window + 1}, first behind"
                    f" {blocks.block_name(number)}",
                    blocks.where,
                )
            self.states.put(stream * self.count + window, output)

        for index, _ in enumerate(
            each_batch(step, range(len(work)), blocks.device, torch.get_num_threads()), 1
        ):
            self._on_progress(self._done + index / len(self._batches), self.total)
        self._done += len(pairs)

    def finish(self) -> None:
        self._blocks.load_outer(with_head=True)
        for stream in self.streams:
            for window, tokens in self._batches.items():
                number = stream * self.count + window
                self.states.put(number, self._blocks.finish(tokens, self.states.get(number)))
        self.states.turn()


def _branched(
    streams: Mapping[int, list[int]], variants: Sequence[Variant], here: Sequence[int]
) -> tuple[list[tuple[tuple[int, ...], list[tuple[int, int]]]], dict[int, list[int]]]:
    """What a block has to run: for each of its choices, which streams (parent, child); and the
    streams behind it.

    New streams come first: one that goes on under its own name may overwrite what it was made from.
    """
    behind: dict[int, list[int]] = {}
    branching: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    going_on: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for parent, members in streams.items():
        by_choices: dict[tuple[int, ...], list[int]] = {}
        for variant in members:
            by_choices.setdefault(tuple(variants[variant][place] for place in here), []).append(
                variant
            )
        for choices, alike in by_choices.items():
            behind[alike[0]] = alike
            (going_on if alike[0] == parent else branching).setdefault(choices, []).append(
                (parent, alike[0])
            )
    return [*branching.items(), *going_on.items()], behind


class _Swaps:
    """The choices of one block, each made when it is first asked for."""

    def __init__(
        self, number: int, block: nn.Module, here: Sequence[int], install: Installer
    ) -> None:
        self._number, self._block, self._here, self._install = number, block, here, install
        self._made: dict[tuple[int, int], Sequence[Swap]] = {}

    @contextmanager
    def in_place(self, choices: Sequence[int]) -> Iterator[None]:
        swaps = [
            swap for place, choice in zip(self._here, choices) for swap in self._of(place, choice)
        ]
        before = [(swap.owner, swap.leaf, getattr(swap.owner, swap.leaf, None)) for swap in swaps]
        for swap in swaps:
            setattr(swap.owner, swap.leaf, swap.value)
        try:
            yield
        finally:
            for owner, leaf, value in before:
                setattr(owner, leaf, value)

    def _of(self, place: int, choice: int) -> Sequence[Swap]:
        if (place, choice) not in self._made:
            self._made[place, choice] = self._install(self._number, self._block, place, choice)
        return self._made[place, choice]
