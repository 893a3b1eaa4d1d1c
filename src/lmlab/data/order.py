"""Which rows each optimizer step sees: a pure function of (seed, index).

Training counts steps over one endless index stream: index ``i`` is place ``i % n`` of epoch ``i // n``'s
permutation. Step ``s`` takes the indices ``s * G .. (s + 1) * G - 1`` of a global batch of ``G`` rows, dealt to
micro-batches and ranks; so the rows of a step are the same for every world size that divides ``G``, and the whole
state of the order is the number of steps done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler


class EndlessOrder:
    """Row index of every position of the endless stream over ``num_rows`` rows.

    Args:
        num_rows: rows of an epoch.
        seed: below 2**32.
        part: which source of a mix this is, so that each has permutations of its own.
    """

    def __init__(self, num_rows: int, *, seed: int, part: int = 0) -> None:
        self.num_rows, self.key = num_rows, seed + (part << 32)
        self._permutation = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        # Philox is counter-based: its stream is fixed by (seed, epoch) alone, on every platform.
        return np.random.Generator(np.random.Philox(key=[self.key, epoch])).permutation(self.num_rows)

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.num_rows)
        return int(self._permutation(epoch)[place])


class MixedOrder:
    """Rows of several sources drawn by weight, over the rows of `packing.MixedRows`.

    The stream is cut into blocks of `BLOCK` places; in each, every source has the same number of places (its weight's
    share, one at least), spread evenly with some jitter, so that any stretch holds nearly the right shares. The
    n-th place of a source takes the n-th row of its own endless order: no source ever repeats a row before it
    has given all of them.

    Args:
        num_rows: rows of each source.
        weights: share of the rows drawn from each, summing to 1.
        seed: below 2**32.
    """

    BLOCK = 10_000

    def __init__(self, num_rows: Sequence[int], weights: Sequence[float], *, seed: int) -> None:
        self.seed, self.starts = seed, np.cumsum([0, *num_rows])[:-1]
        self.orders = [EndlessOrder(n, seed=seed, part=part) for part, n in enumerate(num_rows)]
        exact = np.asarray(weights) * self.BLOCK
        self.counts = np.maximum(1, np.floor(exact)).astype(np.int64)
        for part in np.argsort(np.floor(exact) - exact, kind="stable")[
            : max(0, self.BLOCK - self.counts.sum())
        ]:
            self.counts[part] += 1
        self.size = int(self.counts.sum())
        self._plan = lru_cache(maxsize=2)(self._planned)

    def _planned(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of the block: the source, and the how-manieth of that source in the block."""
        random = np.random.Generator(np.random.Philox(key=[self.seed + (1 << 63), block]))
        times = np.concatenate([(np.arange(n) + random.random(n)) / n for n in self.counts])
        places = np.argsort(times, kind="stable")
        parts = np.repeat(np.arange(len(self.counts)), self.counts)
        ordinals = np.concatenate([np.arange(n) for n in self.counts])
        return parts[places], ordinals[places]

    def __getitem__(self, index: int) -> int:
        block, place = divmod(index, self.size)
        parts, ordinals = self._plan(block)
        part = int(parts[place])
        return (
            int(self.starts[part]) + self.orders[part][block * int(self.counts[part]) + int(ordinals[place])]
        )


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
        order: EndlessOrder | MixedOrder,
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


def spread(num_rows: int, limit: int | None) -> Sequence[int]:
    """``limit`` of the rows at equal distances from the first on, of a mix's sources in proportion to their rows; None: all."""
    if limit is None or limit >= num_rows:
        return range(num_rows)
    return [i * num_rows // limit for i in range(limit)]


class ShareOfRows(Sampler[list[int]]):
    """Batches over each of ``rows`` once, in order: ``rank``, ``rank + world_size``, ... of them on this rank.

    Every rank yields the same number of batches: one whose share is used up (or empty, with fewer rows than
    ranks) yields a `BLANK` row, so that all of them make the same forward passes and reductions and none waits.
    """

    def __init__(self, rows: Sequence[int], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows = rows[rank::world_size]
        self.batch_size = batch_size
        self.num_batches = -(-len(rows[::world_size]) // batch_size)  # of rank 0, who has the most

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.num_batches):
            yield list(self.rows[batch * self.batch_size : (batch + 1) * self.batch_size]) or [BLANK]
