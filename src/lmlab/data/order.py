"""Which rows each optimizer step sees: a pure function of (seed, index).

Training counts steps over one endless index stream: index ``i`` is place ``i % n`` of epoch ``i // n``'s
permutation. Step ``s`` takes the indices ``s * G .. (s + 1) * G - 1`` of a global batch of ``G`` rows, dealt to
micro-batches and ranks; so the rows of a step are the same for every world size that divides ``G``, and the whole
state of the order is the number of steps done.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


class EndlessOrder:
    """Row index of every position of the endless stream over ``num_rows`` rows."""

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._permutation = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        # Philox is counter-based: its stream is fixed by (seed, epoch) alone, on every platform.
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_rows)

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.num_rows)
        return int(self._permutation(epoch)[place])


class StepBatches(Sampler[list[int]]):
    """Endless micro-batches of row indices for one rank, from a given optimizer step on.

    Args:
        order: the endless order.
        batch_size: rows per micro-batch and rank.
        accumulate: micro-batches per optimizer step.
        rank, world_size: which share of each global batch is ours.
        start_step: optimizer steps already done.
    """

    def __init__(
        self,
        order: EndlessOrder,
        *,
        batch_size: int,
        accumulate: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        self.order, self.batch_size, self.accumulate = order, batch_size, accumulate
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start_step * self.accumulate
        while True:
            start = (micro * self.world_size + self.rank) * self.batch_size
            yield [self.order[i] for i in range(start, start + self.batch_size)]
            micro += 1


BLANK = -1
"""Row index of a row without content: one token and nothing to predict (`packing.blank_row`)."""


class ShareOfRows(Sampler[list[int]]):
    """Batches over rows ``rank, rank + world_size, ...`` once, in order: each row is on exactly one rank.

    Every rank yields the same number of batches: one whose share is used up (or empty, with fewer rows than
    ranks) yields a `BLANK` row, so that all of them make the same forward passes and reductions and none waits.
    """

    def __init__(self, num_rows: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows = range(rank, num_rows, world_size)
        self.batch_size = batch_size
        self.num_batches = -(
            -len(range(0, num_rows, world_size)) // batch_size
        )  # of rank 0, who has the most

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.num_batches):
            yield list(self.rows[batch * self.batch_size : (batch + 1) * self.batch_size]) or [BLANK]
