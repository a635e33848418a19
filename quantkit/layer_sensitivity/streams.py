"""Streams of hidden states that variants share. A stream branches at the block in which two of its
variants differ for the first time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# A variant: for each place, the number of its choice.
Variant = tuple[int, ...]


def count_block_runs(variants: Sequence[Variant], block_of: Sequence[int], blocks: int) -> int:
    """How often `run_variants` runs a block. block_of: the block of each place."""
    total = 0
    for block in range(blocks):
        reached = [place for place, of in enumerate(block_of) if of <= block]
        total += len({tuple(variant[place] for place in reached) for variant in variants})
    return total


@dataclass(frozen=True)
class Numbering:
    """The numbers of hidden states, by stream and window.

    here: the windows of this rank.
    windows: how many there are on all ranks.
    """

    here: Sequence[int]
    windows: int

    def of(self, stream: int, window: int) -> int:
        return stream * self.windows + window

    def of_streams(self, streams: Iterable[int]) -> list[int]:
        return [self.of(stream, window) for stream in streams for window in self.here]


@dataclass(frozen=True)
class Job:
    """The streams that a block runs with the same choices.

    pairs: the stream before the block (parent) and after it (child). If the stream continues, both
        are the same.
    """

    choices: tuple[int, ...]
    pairs: list[tuple[int, int]]


class Streams:
    """The streams before each block, and the block's jobs.

    A stream has the number of its first variant.
    """

    def __init__(
        self, variants: Sequence[Variant], block_of: Sequence[int], block_count: int
    ) -> None:
        self.places = [
            [place for place, of in enumerate(block_of) if of == number]
            for number in range(block_count)
        ]
        # The variants of each stream: before each block, and after the last.
        self.members: list[dict[int, list[int]]] = [{0: list(range(len(variants)))}]
        self.jobs: list[list[Job]] = []
        for places in self.places:
            jobs, members = _branched(self.members[-1], variants, places)
            self.jobs.append(jobs)
            self.members.append(members)
        self.total_runs = sum(len(job.pairs) for jobs in self.jobs for job in jobs)

    @property
    def of_variants(self) -> tuple[int, ...]:
        """Each variant's stream after the last block."""
        stream_of = {
            variant: stream for stream, members in self.members[-1].items() for variant in members
        }
        return tuple(stream_of[variant] for variant in range(len(stream_of)))


def _branched(
    streams: Mapping[int, list[int]], variants: Sequence[Variant], places: Sequence[int]
) -> tuple[list[Job], dict[int, list[int]]]:
    """A block's jobs, and the streams after it.

    New streams come first: a stream that continues overwrites the hidden states of its parent.
    """
    after: dict[int, list[int]] = {}
    branching: dict[tuple[int, ...], Job] = {}
    going_on: dict[tuple[int, ...], Job] = {}
    for parent, members in streams.items():
        by_choices: dict[tuple[int, ...], list[int]] = {}
        for variant in members:
            choices = tuple(variants[variant][place] for place in places)
            by_choices.setdefault(choices, []).append(variant)
        for choices, alike in by_choices.items():
            child = alike[0]
            after[child] = alike
            jobs = going_on if child == parent else branching
            jobs.setdefault(choices, Job(choices, [])).pairs.append((parent, child))
    return [*branching.values(), *going_on.values()], after
