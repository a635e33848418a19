"""Many variants of one model run over the same windows, block by block. Each block's weights are
read once, and variants that are the same up to a block share the work before it.

A variant has a choice for each place (a layer group). Before the first block there is one stream of
hidden states; it branches at the block in which two variants differ for the first time. The hidden
states of all streams are stored between two blocks, in memory, or in a file if they don't fit. A
block runs once for each stream after it: with n variants that differ in one block each, n/2 times
on average.

In a model of encoder and decoder, each stream's decoder reads the output of its own encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError, NonFiniteError
from quantkit.layer_sensitivity.streams import Job, Numbering, Streams, Variant
from quantkit.models.blockwise import BlockStep, BlockwiseModel, Walk
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.saved_states import SavedStates
from quantkit.models.threads import each_batch


@dataclass(frozen=True)
class Swap:
    """A module, a parameter or a setting that is replaced in a block while a variant runs.

    owner: the module that has it.
    leaf: its attribute.
    value: the replacement.
    """

    owner: nn.Module
    leaf: str
    value: Any


# (block's number, the block, place, choice) → its changes; called once for each choice of a place
# in the block.
MakeSwaps = Callable[[int, nn.Module, int, int], Sequence[Swap]]
# (block's number, the block, a function that runs a window through it for the first variant)
BeforeBlock = Callable[[int, nn.Module, Callable[[int], Tensor]], None]


@dataclass(frozen=True)
class VariantStates:
    """Final hidden states of each variant.

    windows: how many there are on all ranks.
    stream_of: each variant's stream; equal variants share one.
    """

    states: HiddenStates
    windows: int
    stream_of: tuple[int, ...]

    def get(self, variant: int, window: int) -> Tensor:
        """[rows, positions, hidden size]"""
        return self.states.get(self.stream_of[variant] * self.windows + window)

    def close(self) -> None:
        self.states.close()


def run_variants(
    blocks: BlockwiseModel,
    batches: Mapping[int, Tensor],
    variants: Sequence[Variant],
    block_of: Sequence[int],
    make_swaps: MakeSwaps,
    *,
    windows: int | None = None,
    saved: SavedStates | None = None,
    before_block: BeforeBlock | None = None,
    after_block: Callable[[int], None] = lambda number: None,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> VariantStates:
    """Run all variants through all blocks. Afterwards the model has its output head in memory.

    batches: the token ids of each window of this rank, [rows, positions], by number.
    variants: all others branch off from the first.
    block_of: the block of each place.
    windows: how many there are on all ranks; None if all are in `batches`.
    saved: the stored hidden states of an interrupted run, or None.
    """
    # On the CPU: so many wouldn't fit in a GPU's memory.
    states, streams = HiddenStates(), Streams(variants, block_of, blocks.block_count)
    numbering = Numbering(list(batches), windows or len(batches))
    run = _Run(blocks, streams, numbering, make_swaps, before_block, on_progress)

    def end_block(number: int, walk: Walk) -> None:
        after_block(number)
        if saved is not None:
            saved.stop_or_save(
                number,
                blocks.block_count,
                states,
                numbering.of_streams(streams.members[number + 1]),
                lambda: run.encoded_states(walk),
            )

    try:
        walk = blocks.walk(
            {numbering.of(0, window): tokens for window, tokens in batches.items()},
            states,
            run.block,
            branches={
                numbering.of(stream, window): numbering.of(0, window)
                for stream in range(1, len(variants))
                for window in batches
            },
            restore=None if saved is None else lambda walk: run.restored(walk, saved),
            after_block=end_block,
        )
        for _ in walk.finish():
            pass
    except BaseException:
        states.close()
        raise
    return VariantStates(states, numbering.windows, streams.of_variants)


@dataclass
class _Run:
    """One walk of all streams through the blocks. done: how often blocks ran over all windows."""

    blocks: BlockwiseModel
    streams: Streams
    numbering: Numbering
    make_swaps: MakeSwaps
    before_block: BeforeBlock | None
    on_progress: Callable[[float, float], None]
    done: int = 0

    def block(self, step: BlockStep) -> None:
        """Run a block on all streams, with each of its choices."""
        number, block = step.number, step.block
        for batch in step.walk.batches:
            for place in step.inputs(batch).side_outputs:
                place.put(None)  # `_output` checks that it stays None
        if self.before_block is not None:
            self.before_block(
                number, block, lambda window: self._output(step, self.numbering.of(0, window))
            )
        self._branch(step.walk, number)
        swaps = _Swaps(number, block, self.streams.places[number], self.make_swaps)
        for job in self.streams.jobs[number]:
            with swaps.in_place(job.choices):
                self._run_job(step, job)

    def _branch(self, walk: Walk, number: int) -> None:
        """Add a block's new streams to the walk."""
        for job in self.streams.jobs[number]:
            for parent, child in job.pairs:
                if child != parent:
                    for window in self.numbering.here:
                        of = self.numbering.of
                        walk.branch(of(parent, window), into=of(child, window))

    def _run_job(self, step: BlockStep, job: Job) -> None:
        work = [
            (parent, child, window) for parent, child in job.pairs for window in self.numbering.here
        ]

        def run(index: int) -> None:
            parent, child, window = work[index]
            output = self._output(step, self.numbering.of(parent, window))
            if not torch.isfinite(output).all():
                where = self.blocks.where
                raise NonFiniteError(
                    f"{where} gives NaN or infinity in window {window + 1}, first after"
                    f" {self.blocks.block_name(step.number)}",
                    path=where,
                )
            step.put(self.numbering.of(child, window), output)

        batches = each_batch(run, range(len(work)), self.blocks.device, torch.get_num_threads())
        with closing(batches):
            for count, _ in enumerate(batches, 1):
                done = self.done + count / len(self.numbering.here)
                self.on_progress(done, self.streams.total_runs)
        self.done += len(job.pairs)

    def _output(self, step: BlockStep, batch: int) -> Tensor:
        output = step.run(batch)
        if any(place.get() is not None for place in step.inputs(batch).side_outputs):
            raise CheckpointError(
                f"the blocks of {self.blocks.where} return side outputs that later blocks read,"
                " which sensitivity doesn't store for each variant; export the model with several"
                " recipes and compare them with eval"
            )
        return output

    # -- An interrupted run.

    def restored(self, walk: Walk, saved: SavedStates) -> int:
        """Restore the hidden states that an earlier run saved. Returns the first block to run."""
        encoder_blocks = self._encoder_blocks()

        def begin_decoder(found: Mapping[str, Tensor]) -> None:
            for number in range(encoder_blocks):
                self._branch(walk, number)
            walk.begin_decoder({batch: found[_encoded_name(batch)] for batch in walk.batches})

        def names_after(number: int) -> list[str]:
            if not self.blocks.reads_encoder(number + 1):
                return []
            return [_encoded_name(batch) for batch in self._numbers_before(encoder_blocks)]

        first = saved.restore(
            walk.states, lambda number: self._numbers_before(number + 1), names_after, begin_decoder
        )
        branched = encoder_blocks if self.blocks.reads_encoder(first) else 0
        for number in range(branched, first):
            self._branch(walk, number)
        self.done = sum(len(job.pairs) for jobs in self.streams.jobs[:first] for job in jobs)
        return first

    def encoded_states(self, walk: Walk) -> dict[str, Tensor]:
        """The encoder's output for each of its streams, while decoder blocks remain to be run."""
        if not walk.encoded:
            return {}
        batches = self._numbers_before(self._encoder_blocks())
        return {_encoded_name(batch): walk.encoded[batch] for batch in batches}

    def _numbers_before(self, number: int) -> list[int]:
        return self.numbering.of_streams(self.streams.members[number])

    def _encoder_blocks(self) -> int:
        encoder, *decoder = self.blocks.stages
        return len(encoder.stack) if decoder else 0


def _encoded_name(batch: int) -> str:
    return f"encoded-{batch}"


class _Swaps:
    """The changes to one block, each made when it is first needed."""

    def __init__(
        self, number: int, block: nn.Module, places: Sequence[int], make_swaps: MakeSwaps
    ) -> None:
        self._number, self._block, self._places = number, block, places
        self._make_swaps = make_swaps
        self._made: dict[tuple[int, int], Sequence[Swap]] = {}

    @contextmanager
    def in_place(self, choices: Sequence[int]) -> Iterator[None]:
        """Apply the changes of these choices, one for each place in the block, and undo them."""
        swaps = [swap for item in zip(self._places, choices) for swap in self._of(*item)]
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
            made = self._make_swaps(self._number, self._block, place, choice)
            self._made[place, choice] = made
        return self._made[place, choice]
