"""Rows of training examples over a shard, and their collation into batches.

Fine-tuning (`DocumentRows`): a row is one document, or with packing as many as fit into ``max_length`` by
best-fit decreasing (at most 11/9 of the optimal number of rows, Johnson 1973); documents never see one another.
Pretraining (`StreamRows`): the split is one stream cut into windows that overlap by one token, so that every
token but the stream's first is predicted exactly once.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lmlab.data.order import BLANK
from lmlab.data.shards import Shards
from lmlab.records import IGNORE_INDEX, Example, PackedBatch


class DocumentRows(Dataset[Example]):
    """Rows of whole documents; index `BLANK` is a row without content.

    Args:
        shards: the split.
        max_length: capacity of a packed row in tokens.
        packing: several documents a row; else one.
    """

    def __init__(self, shards: Shards, *, max_length: int, packing: bool) -> None:
        self.shards = shards
        lengths = shards.lengths()
        self.rows: Sequence[Sequence[int]] = (
            best_fit(lengths.tolist(), max_length) if packing else [(i,) for i in range(len(lengths))]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if index == BLANK:
            return blank_row()
        pieces = [shifted(*self.shards.read(*self.shards.span(i))) for i in self.rows[index]]
        return Example(
            torch.cat([ids for ids, _ in pieces]),
            torch.cat([labels for _, labels in pieces]),
            tuple(len(ids) for ids, _ in pieces),
        )

    def places(self, indices: Sequence[int]) -> list[str]:
        """Where the documents in these rows came from."""
        return self.shards.places([i for index in indices if index != BLANK for i in self.rows[index]])


class StreamRows(Dataset[Example]):
    """Windows of ``max_length`` tokens over the whole split; the last one may be shorter; index `BLANK` is empty.

    Args:
        shards: the split; its documents end with EOS, and a single EOS stands before the first.
        max_length: width of a window in tokens.
        apart: a document does not see the ones before it. It begins at the EOS before its first token, which
            then predicts that token from nothing, so that still every token is predicted exactly once.
    """

    def __init__(self, shards: Shards, *, max_length: int, apart: bool = False) -> None:
        self.shards, self.max_length, self.apart = shards, max_length, apart

    def __len__(self) -> int:
        return -(-(self.shards.num_tokens - 1) // self.max_length)

    def __getitem__(self, index: int) -> Example:
        if index == BLANK:
            return blank_row()
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.max_length
        end = min(start + self.max_length + 1, self.shards.num_tokens)
        ids, labels = shifted(*self.shards.read(start, end))
        if not self.apart:
            return Example(ids, labels, (len(ids),))
        # Tokens 0..n of the split, documents at 1 and 5: segments begin at 0 and 4, the EOS before each.
        cuts = [place - 1 - start for place in self.shards.starts(start + 2, end)]
        edges = [0, *cuts, len(ids)]
        return Example(ids, labels, tuple(b - a for a, b in itertools.pairwise(edges) if b > a))

    def places(self, indices: Sequence[int]) -> list[str]:
        """Where the documents that these windows show a part of came from."""
        found: list[int] = []
        for index in indices:
            if index != BLANK:
                start = index * self.max_length
                end = min(start + self.max_length + 1, self.shards.num_tokens)
                found += self.shards.documents(start, end)
        return self.shards.places(found)


class MixedRows(Dataset[Example]):
    """The rows of several sources, one source after another; which are drawn how often is the order's business."""

    def __init__(self, parts: Sequence[DocumentRows | StreamRows]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example:
        if index == BLANK:
            return blank_row()
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, within = self._place(index)
        return self.parts[part][within]

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def places(self, indices: Sequence[int]) -> list[str]:
        """Where the documents in these rows came from."""
        of_parts: list[list[int]] = [[] for _ in self.parts]
        for index in indices:
            if index != BLANK:
                part, within = self._place(index)
                of_parts[part].append(within)
        return [
            place for part, within in zip(self.parts, of_parts, strict=True) for place in part.places(within)
        ]


def blank_row() -> Example:
    """One token with nothing to predict, for a rank without rows: no loss, no supervised token, one of ``num_tokens``."""
    return Example(torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE_INDEX), (1,))


def shifted(tokens: np.ndarray, trained: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels of one run of tokens; the only place where labels are shifted.

    Tokens ``a b c`` with ``b`` and ``c`` trained give input ``a b`` and labels ``b c``. int64 ``[length - 1]`` each.
    """
    # numpy's calls cost a fraction of torch's on arrays as short as a row.
    labels = np.where(trained[1:], tokens[1:], IGNORE_INDEX)
    return torch.from_numpy(tokens[:-1]), torch.from_numpy(labels)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` grouped into rows of at most ``capacity``, longest first, each into the fullest row it fits.

    Deterministic; a length above the capacity gets a row of its own.
    """
    rows: list[list[int]] = []
    free: list[
        tuple[int, int]
    ] = []  # (free tokens, -row), sorted; -row makes the oldest row win among equals
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect_left(free, (length, -len(rows)))
        if place == len(free):
            rows.append([index])
            insort(free, (max(0, capacity - length), 1 - len(rows)))
        else:
            space, row = free.pop(place)
            rows[-row].append(index)
            insort(free, (space - length, row))
    return rows


def collate_flat(examples: Sequence[Example]) -> PackedBatch:
    """All documents of all examples in one row without padding; see `PackedBatch`."""
    lengths = [n for example in examples for n in example.lengths]
    ids = torch.cat([example.input_ids for example in examples])
    labels = torch.cat([example.labels for example in examples])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    index = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    return PackedBatch(ids[None], labels[None], positions[None], cu_seqlens, index, len(ids))


def collate_padded(examples: Sequence[Example]) -> PackedBatch:
    """Rows of equal width, padded at the right with id 0 and ignored labels; one document a row.

    Raises:
        ValueError: a row of several documents: they would see one another.
    """
    if any(len(example.lengths) > 1 for example in examples):
        raise ValueError("packed rows need the flat layout")
    rows = [example.input_ids for example in examples], [example.labels for example in examples]
    if len({len(row) for row in rows[0]}) == 1:
        ids, labels = (torch.stack(each) for each in rows)
    else:
        ids, labels = (
            pad_sequence(each, batch_first=True, padding_value=fill)
            for each, fill in zip(rows, (0, IGNORE_INDEX), strict=True)
        )
    index = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    return PackedBatch(ids, labels, None, None, index, sum(len(example.input_ids) for example in examples))
