"""Many variants of one model over the same windows, block by block: each block's weights are read once, and variants that are alike up to a block share
everything before it.

A variant says for each set of Linears which of its choices it takes. Before the first block there is one stream of hidden states; it branches where two
variants differ for the first time. So the states of all streams lie between two blocks (in memory, or in a file where they don't fit), and a
block runs once for each stream that leaves it: with n variants that differ in one block each, on average half of n times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.blockwise import BlockwiseModel, each_batch
from quantkit.errors import NonFiniteError
from quantkit.states import HiddenStates

# For each set the number of its choice.
Variant = tuple[int, ...]


@dataclass(frozen=True)
class Swap:
    """What takes another's place in a block while a variant runs: a module, a parameter, or a setting of one."""

    owner: nn.Module
    leaf: str
    value: Any


# (block's number, the block, set's number, choice) → what changes; called once for each choice that a block has to make.
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


def run_variants(
    blocks: BlockwiseModel, batches: Sequence[Tensor], variants: Sequence[Variant], block_of: Sequence[int], install: Installer,
    look: Callable[[int, nn.Module, Callable[[int], Tensor]], None] = lambda number, block, run: None,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> VariantStates:  # fmt: skip
    """batches: the windows' token ids, [1, positions] each. variants: the first is the one that all others branch off from.

    look: called with each block's number, the block, and a function that runs a window through it as the first variant does. Leaves the model with its output
    head in memory and without its blocks.
    """
    count, model = len(batches), blocks.model
    total, done = count_block_runs(variants, block_of, blocks.block_count), 0
    # It lies on the CPU: a GPU's memory wouldn't hold so many.
    states = HiddenStates()
    streams = {0: list(range(len(variants)))}  # a stream is called after the first of its variants
    try:
        hidden_size = model.config.get_text_config().hidden_size
        shapes = {stream * count + window: (*tokens.shape, hidden_size) for stream in range(len(variants)) for window, tokens in enumerate(batches)}
        states.expect(shapes, blocks.states_dtype)
        blocks.load_outer(with_head=False)
        calls = blocks.record(list(batches), states)
        blocks.free_outer()
        for number in range(blocks.block_count):
            here = [place for place, of in enumerate(block_of) if of == number]
            jobs, streams = _branched(streams, variants, here)
            with blocks.block(number) as block:

                def run(parent: int, window: int, block: nn.Module = block, number: int = number) -> Tensor:
                    return blocks.run_block(block, calls[window][number], states.get(parent * count + window).to(blocks.device))

                look(number, block, lambda window, run=run: run(0, window))
                swaps = _Swaps(number, block, here, install)
                for choices, pairs in jobs:
                    with swaps.in_place(choices):
                        work = [(parent, stream, window) for parent, stream in pairs for window in range(count)]

                        def step(index: int, work: list[tuple[int, int, int]] = work, run: Any = run, number: int = number) -> None:
                            parent, stream, window = work[index]
                            output = run(parent, window)
                            if not torch.isfinite(output).all():
                                raise NonFiniteError(
                                    f"{blocks.where} gives NaN or infinity in window {window + 1}, first behind {blocks.block_name(number)}", blocks.where
                                )
                            states.put(stream * count + window, output)

                        for index, _ in enumerate(each_batch(step, range(len(work)), blocks.device, torch.get_num_threads()), 1):
                            on_progress(done + index / count, total)
                        done += len(pairs)
            for window_calls in calls:
                window_calls[number] = None
            states.turn()
        blocks.load_outer(with_head=True)
        for stream in streams:
            for window, tokens in enumerate(batches):
                states.put(stream * count + window, blocks.finish(tokens, states.get(stream * count + window)))
        states.turn()
    except BaseException:
        states.close()
        raise
    finally:
        blocks.close()
    stream_of = {variant: stream for stream, members in streams.items() for variant in members}
    return VariantStates(states, count, tuple(stream_of[number] for number in range(len(variants))), total)


def _branched(
    streams: Mapping[int, list[int]], variants: Sequence[Variant], here: Sequence[int]
) -> tuple[list[tuple[tuple[int, ...], list[tuple[int, int]]]], dict[int, list[int]]]:
    """What a block has to run: for each of its choices, which streams (parent, child); and the streams behind it.

    New streams come first: one that goes on under its own name may overwrite what it was made from.
    """
    behind: dict[int, list[int]] = {}
    branching: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    going_on: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for parent, members in streams.items():
        by_choices: dict[tuple[int, ...], list[int]] = {}
        for variant in members:
            by_choices.setdefault(tuple(variants[variant][place] for place in here), []).append(variant)
        for choices, alike in by_choices.items():
            behind[alike[0]] = alike
            (going_on if alike[0] == parent else branching).setdefault(choices, []).append((parent, alike[0]))
    return [*branching.items(), *going_on.items()], behind


class _Swaps:
    """The choices of one block, each made when it is first asked for."""

    def __init__(self, number: int, block: nn.Module, here: Sequence[int], install: Installer) -> None:
        self._number, self._block, self._here, self._install = number, block, here, install
        self._made: dict[tuple[int, int], Sequence[Swap]] = {}

    @contextmanager
    def in_place(self, choices: Sequence[int]) -> Iterator[None]:
        swaps = [swap for place, choice in zip(self._here, choices) for swap in self._of(place, choice)]
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
