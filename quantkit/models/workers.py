"""The workers on one block: threads of this process, and the processes of the job."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.models.distributed import Ranks
from quantkit.models.threads import each_batch


@dataclass(frozen=True)
class Workers:
    """The threads and processes that share the work on one block.

    ranks: processes of the job.
    device: where this process computes.
    threads: how many calls run at once on a CPU.
    """

    ranks: Ranks
    device: torch.device
    threads: int

    def each(
        self, work: Callable[[int], Any], numbers: Iterable[int]
    ) -> Generator[Any, None, None]:
        """work(number) for each number, all in this process; yields the results in order. See
        `each_batch`.
        """
        return each_batch(work, list(numbers), self.device, self.threads)

    def shared(self, work: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
        """work(number) for each number, distributed over the ranks. Every rank returns all results,
        in order.
        """
        numbers = list(numbers)
        mine = numbers[self.ranks.rank :: self.ranks.count]
        shares = self.ranks.all_gather(dict(zip(mine, self.each(work, mine))))
        return [shares[place % self.ranks.count][number] for place, number in enumerate(numbers)]
