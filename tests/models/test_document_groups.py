"""Documents of a flat row go into rectangles: each position exactly once, little padding."""

from __future__ import annotations

import random

import pytest
import torch

from lmlab.models.attention import MAX_WASTE, Documents


def random_lengths(seed: int) -> list[int]:
    rng = random.Random(seed)
    longest = rng.choice([1, 2, 10, 100, 1000])
    return [rng.randint(1, longest) for _ in range(rng.randint(1, 60))]


@pytest.mark.parametrize("seed", range(40))
def test_each_position_once_and_waste_is_bounded(seed: int) -> None:
    lengths = random_lengths(seed)
    ends = torch.tensor(lengths).cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    groups = Documents(cu_seqlens).rectangles
    tokens = int(ends[-1])
    cells = torch.cat([index.flatten() for index in groups.gather])
    scatter = torch.arange(tokens) if groups.scatter is None else groups.scatter
    assert len(scatter.unique()) == tokens, "two positions share a cell"
    assert torch.equal(cells[scatter], torch.arange(tokens)), "gathering and scattering is not identity"
    assert len(cells) <= MAX_WASTE * tokens

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = []
    for index in groups.gather:
        rows = document[index]
        assert (rows == rows[:, :1]).all(), "a rectangle's row mixes documents"
        first = index[:, :1]
        real = lengths_of(rows[:, 0], lengths)
        columns = torch.arange(index.shape[1])[None]
        expected = torch.where(columns < real[:, None], first + columns, first)
        assert torch.equal(index, expected), "padding is not at the right"
        assert index.numel() <= MAX_WASTE * int(real.sum())
        seen += rows[:, 0].tolist()
    assert sorted(seen) == list(range(len(lengths)))


def lengths_of(which: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.tensor(lengths)[which]


def test_equal_documents_are_one_rectangle() -> None:
    groups = Documents(torch.arange(0, 33, 8, dtype=torch.int32)).rectangles
    assert groups.scatter is None, "a row of equal documents needs no reordering"
    assert [tuple(index.shape) for index in groups.gather] == [(4, 8)]
