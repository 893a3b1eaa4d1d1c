"""Rows and their order: labels shifted once, packing, collation, stream windows, and the endless order over ranks."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lmlab.data.order import BLANK, EndlessOrder, MixedOrder, ShareOfRows, StepBatches
from lmlab.data.packing import (
    DocumentRows,
    MixedRows,
    StreamRows,
    best_fit,
    collate_flat,
    collate_padded,
    shifted,
)
from lmlab.data.shards import Shards, ShardWriter, write_index
from lmlab.records import IGNORE_INDEX, Example, UserError


def shard(folder: Path, *documents: tuple[list[int], list[int]], vocab_size: int = 100) -> Shards:
    """A split of (ids, trained flags) documents."""
    writer = ShardWriter(folder, vocab_size=vocab_size, flags=True)
    for ids, flags in documents:
        writer.add(np.asarray(ids), np.asarray(flags, dtype=bool))
    write_index(folder, [writer.close()])
    return Shards(folder)


THREE = [([10, 11, 12, 13], [0, 0, 1, 1]), ([20, 21], [0, 1]), ([30, 31, 32], [0, 1, 0])]
_ = IGNORE_INDEX


def test_labels_are_shifted_once() -> None:
    ids, labels = shifted(np.asarray([5, 6, 7, 8]), np.asarray([True, False, True, True]))
    assert ids.tolist() == [5, 6, 7]
    assert labels.tolist() == [_, 7, 8]
    assert ids.dtype == labels.dtype == torch.int64


def test_document_rows(tmp_path: Path) -> None:
    rows = DocumentRows(shard(tmp_path / "s", *THREE), max_length=6, packing=False)
    assert [rows[i].input_ids.tolist() for i in range(len(rows))] == [[10, 11, 12], [20], [30, 31]]
    assert [rows[i].labels.tolist() for i in range(len(rows))] == [[_, 12, 13], [21], [31, _]]
    assert [rows[i].lengths for i in range(len(rows))] == [(3,), (1,), (2,)]


def test_a_packed_row_never_predicts_over_a_seam(tmp_path: Path) -> None:
    rows = DocumentRows(shard(tmp_path / "s", *THREE), max_length=6, packing=True)
    assert rows.rows == [[0, 1], [2]]
    assert rows[0].input_ids.tolist() == [10, 11, 12, 20]
    assert rows[0].labels.tolist() == [_, 12, 13, 21]  # behind 12 comes 13, never 20
    assert rows[0].lengths == (3, 1)


def test_best_fit_keeps_every_document_once_within_the_capacity() -> None:
    draw = random.Random(0)
    for _case in range(300):
        capacity = draw.randint(1, 60)
        longest = draw.choice([capacity, capacity, 2 * capacity])
        lengths = [draw.randint(1, longest) for _ in range(draw.randint(0, 40))]
        rows = best_fit(lengths, capacity)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        sums = [sum(lengths[i] for i in row) for row in rows]
        assert all(total <= capacity or len(row) == 1 for total, row in zip(sums, rows, strict=True))
        assert best_fit(lengths, capacity) == rows
        # No row could have gone into one opened before it: first members of two rows never fit together.
        light = sorted(total for total in sums if total <= capacity)
        assert len(light) < 2 or light[0] + light[1] > capacity


def test_best_fit_takes_the_fullest_row() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 8, 2], 10) == [[1, 2], [0]]
    assert best_fit([], 10) == []
    assert best_fit([12, 1], 10) == [[0], [1]]


def example(ids: list[int], labels: list[int], *lengths: int) -> Example:
    return Example(torch.tensor(ids), torch.tensor(labels), lengths)


def test_collate_flat() -> None:
    batch = collate_flat([example([1, 2, 3], [_, 3, 9], 2, 1), example([4, 5], [5, _], 2)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[_, 3, 9, 5, _]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0, 0, 1]]
    assert batch.cu_seqlens is not None
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype) == ([0, 2, 3, 5], torch.int32)
    assert batch.supervised_index.tolist() == [1, 2, 3]
    assert batch.num_tokens == 5


def test_collate_padded() -> None:
    # Id 0 is a real token in the first row and padding in the second: what is padding never follows from the id.
    batch = collate_padded([example([1, 0, 0], [0, _, 7], 3), example([4], [0], 1)])
    assert batch.input_ids.tolist() == [[1, 0, 0], [4, 0, 0]]
    assert batch.labels.tolist() == [[0, _, 7], [0, _, _]]
    assert (batch.position_ids, batch.cu_seqlens) == (None, None)
    assert batch.supervised_index.tolist() == [0, 2, 3]
    assert batch.num_tokens == 4


@pytest.mark.parametrize("total", [1, 2, 4, 5, 6, 8, 9, 13])
def test_stream_windows_predict_every_token_but_the_first_once(tmp_path: Path, total: int) -> None:
    ids = list(range(total))
    rows = StreamRows(
        shard(tmp_path / "s", (ids[:3], [1] * len(ids[:3])), (ids[3:], [1] * len(ids[3:]))), max_length=4
    )
    examples = [rows[i] for i in range(len(rows))]
    assert [i for e in examples for i in e.labels.tolist()] == ids[1:]
    assert [i for e in examples for i in e.input_ids.tolist()] == ids[:-1]
    assert [len(e.input_ids) for e in examples] == [4] * ((total - 1) // 4) + [(total - 1) % 4] * (
        (total - 1) % 4 > 0
    )
    assert all(e.lengths == (len(e.input_ids),) for e in examples)
    for outside in (len(rows), -2):
        with pytest.raises(IndexError):
            rows[outside]


def test_stream_keeps_untrained_tokens_untrained(tmp_path: Path) -> None:
    rows = StreamRows(shard(tmp_path / "s", ([0], [0]), ([7, 8, 9], [1, 0, 1])), max_length=2)
    assert [rows[i].labels.tolist() for i in range(2)] == [[7, _], [9]]


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65536, 2), (65537, 4)])
def test_ids_survive_the_disk(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    written = shard(tmp_path / "s", ([1, vocab_size - 1], [0, 1]), vocab_size=vocab_size)
    ids, flags = written.read(0, 2)
    assert (ids.tolist(), flags.tolist()) == ([1, vocab_size - 1], [False, True])
    assert (tmp_path / "s" / "00000.tokens").stat().st_size == 2 * itemsize
    assert written.lengths().tolist() == [2]


def test_an_id_beyond_the_type_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", vocab_size=100, flags=False)
    with pytest.raises(ValueError, match="token id 65536 does not fit into uint16"):
        writer.add(np.asarray([65536]))
    writer.discard()
    assert list((tmp_path / "s").iterdir()) == []


def test_a_split_of_several_shards_reads_as_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    for case in range(20):
        documents = [
            [draw.randint(0, 99) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 12))
        ]
        flags = [[draw.random() < 0.5 for _ in ids] for ids in documents]
        folder, entries, made = tmp_path / str(case), [], 0
        while made < len(documents):
            writer = ShardWriter(folder, f"{len(entries):05d}", vocab_size=100, flags=True)
            upto = made + draw.randint(0, 4)  # a shard may be empty
            for ids, trained in zip(documents[made:upto], flags[made:upto], strict=True):
                writer.append(np.asarray(ids[:3]), np.asarray(trained[:3], dtype=bool))
                writer.append(np.asarray(ids[3:], dtype=int), np.asarray(trained[3:], dtype=bool))
                writer.end_document()
            entries.append(writer.close())
            made = min(len(documents), upto)
        write_index(folder, entries)
        split, joined = Shards(folder), list(itertools.chain(*documents))
        starts = np.cumsum([0, *map(len, documents)]).tolist()
        assert (split.num_tokens, split.num_documents) == (len(joined), len(documents))
        assert split.lengths().tolist() == [len(ids) for ids in documents]
        assert [split.span(i) for i in range(len(documents))] == list(itertools.pairwise(starts))
        for _ in range(30):
            low = draw.randint(0, len(joined))
            high = draw.randint(low, len(joined))
            ids, trained = split.read(low, high)
            assert ids.tolist() == joined[low:high]
            assert trained.tolist() == list(itertools.chain(*flags))[low:high]
            assert split.starts(low, high) == [place for place in starts[:-1] if low <= place < high]


def test_a_shard_of_another_size_than_its_index_says_is_refused(tmp_path: Path) -> None:
    folder = shard(tmp_path / "s", *THREE).folder
    with (folder / "00000.tokens").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"00000.tokens is missing or not 18 bytes, as its index says"):
        Shards(folder)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 50])
def test_documents_of_a_stream_may_be_kept_apart(tmp_path: Path, width: int) -> None:
    # 9 is EOS: one before the first document, one at the end of each.
    texts = [[1, 2, 9], [3, 9], [4, 5, 6, 7, 9], [8, 9]]
    split = shard(tmp_path / "s", ([9], [0]), *((ids, [1] * len(ids)) for ids in texts))
    rows = StreamRows(split, max_length=width, apart=True)
    plain = StreamRows(split, max_length=width)
    segments: list[list[int]] = []
    for index in range(len(rows)):
        row = rows[index]
        assert row.input_ids.equal(plain[index].input_ids)
        assert row.labels.equal(plain[index].labels)  # every token is still predicted exactly once
        assert sum(row.lengths) == len(row.input_ids)
        place = 0
        for number, length in enumerate(row.lengths):
            piece = row.input_ids[place : place + length].tolist()
            if number == 0 and segments and piece[0] != 9:
                segments[-1] += piece  # a document cut by the window's end goes on
            else:
                segments.append(piece)
            place += length
    # Each document's segment begins at the EOS before it and ends before its own.
    assert segments == [[9, 1, 2], [9, 3], [9, 4, 5, 6, 7], [9, 8]]


def test_a_mix_draws_by_weight_and_repeats_no_row_too_early(tmp_path: Path) -> None:
    sizes, weights = [7, 300, 40], [0.5, 0.2, 0.3]
    order = MixedOrder(sizes, weights, seed=3)
    drawn = [order[i] for i in range(30_000)]
    part_of = [0] * 7 + [1] * 300 + [2] * 40
    for count in (100, 1000, 10_000, 30_000):
        shares = Counter(part_of[row] for row in drawn[:count])
        assert all(
            abs(shares[p] - w * count) <= 3 for p, w in enumerate(weights)
        )  # at any point, not only at the end
    for part, size in enumerate(sizes):
        own = [row for row in drawn if part_of[row] == part]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs[:20]}) > 1
    places = random.Random(0).sample(range(30_000), 200)
    again = MixedOrder(sizes, weights, seed=3)
    assert [again[i] for i in places] == [drawn[i] for i in places]
    assert [MixedOrder(sizes, weights, seed=4)[i] for i in range(50)] != drawn[:50]
    assert {part_of[MixedOrder([7, 300, 40], [0.999999, 5e-7, 5e-7], seed=0)[i]] for i in range(10_000)} == {
        0,
        1,
        2,
    }


def test_rows_of_a_mix_are_those_of_its_sources(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a", *THREE), shard(tmp_path / "b", *THREE[:2])
    parts = [DocumentRows(split, max_length=6, packing=False) for split in (one, two)]
    rows = MixedRows(parts)
    assert [rows[i].input_ids.tolist() for i in range(5)] == [
        [10, 11, 12],
        [20],
        [30, 31],
        [10, 11, 12],
        [20],
    ]
    assert rows[BLANK].lengths == (1,)
    with pytest.raises(IndexError):
        rows[5]


def test_packed_rows_are_never_laid_out_as_if_they_were_one_document() -> None:
    with pytest.raises(ValueError, match="packed rows need the flat layout"):
        collate_padded([example([1, 2, 3], [_, 3, 9], 2, 1)])


def test_the_order_is_a_permutation_per_epoch_fixed_by_seed_and_index() -> None:
    order = EndlessOrder(17, seed=3)
    forwards = [order[i] for i in range(17 * 4)]
    epochs = [forwards[i : i + 17] for i in range(0, len(forwards), 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = EndlessOrder(17, seed=3)
    places = list(range(17 * 4))
    random.Random(0).shuffle(places)
    assert {i: again[i] for i in places} == dict(enumerate(forwards))
    assert [EndlessOrder(17, seed=4)[i] for i in range(17)] != epochs[0]
    assert [EndlessOrder(1, seed=0)[i] for i in range(3)] == [0, 0, 0]


def test_the_order_itself_never_changes() -> None:
    # Runs are resumed and replayed by later versions, so these numbers may not change.
    order = EndlessOrder(8, seed=0)
    assert [order[i] for i in range(16)] == [5, 0, 6, 1, 7, 2, 4, 3, 2, 0, 4, 1, 7, 5, 3, 6]


def step_rows(
    *, batch_size: int, accumulate: int, world_size: int, steps: int, start: int = 0
) -> list[list[int]]:
    """Rows of each optimizer step, in the order (micro-batch, rank)."""
    ranks = [
        iter(
            StepBatches(
                EndlessOrder(13, seed=5),
                batch_size=batch_size,
                accumulate=accumulate,
                rank=rank,
                world_size=world_size,
                start_step=start,
            )
        )
        for rank in range(world_size)
    ]
    return [[row for _m in range(accumulate) for rank in ranks for row in next(rank)] for _s in range(steps)]


SPLITS = [(b, a, w) for b, a, w in itertools.product([1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4]) if b * a * w == 8]


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), SPLITS)
def test_a_steps_rows_do_not_depend_on_who_computes_them(
    batch_size: int, accumulate: int, world_size: int
) -> None:
    order = EndlessOrder(13, seed=5)
    expected = [[order[i] for i in range(8 * step, 8 * step + 8)] for step in range(7)]
    found = step_rows(batch_size=batch_size, accumulate=accumulate, world_size=world_size, steps=7)
    assert found == expected
    resumed = step_rows(batch_size=batch_size, accumulate=accumulate, world_size=world_size, steps=4, start=3)
    assert resumed == expected[3:]


def test_there_were_splits_to_compare() -> None:
    assert {w for *_rest, w in SPLITS} == {1, 2, 4}
    assert len(SPLITS) == 9


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 12, 13])
def test_shares_cover_each_row_once_in_equally_many_batches(num_rows: int, world_size: int) -> None:
    for batch_size in (1, 2, 3, 5, 100):
        shares = [
            ShareOfRows(range(num_rows), batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        batches = [list(share) for share in shares]
        assert [len(share) for share in shares] == [len(mine) for mine in batches]
        assert len({len(mine) for mine in batches}) == 1  # so that no rank waits for another
        assert len(batches[0]) >= 1
        assert all(0 < len(batch) <= batch_size for mine in batches for batch in mine)
        rows = Counter(row for mine in batches for batch in mine for row in batch)
        blanks = rows.pop(BLANK, 0)
        assert rows == Counter(range(num_rows))
        assert blanks < world_size
        assert BLANK not in itertools.chain(*batches[0])
    alone = list(ShareOfRows(range(num_rows), batch_size=100))
    assert alone == [list(range(num_rows))]


def test_a_blank_row_trains_and_measures_nothing(tmp_path: Path) -> None:
    split = shard(tmp_path / "s", *THREE)
    documents = DocumentRows(split, max_length=6, packing=False)
    stream = StreamRows(split, max_length=4)
    for rows, collate in itertools.product([documents, stream], [collate_flat, collate_padded]):
        batch = collate([rows[BLANK]])
        assert batch.input_ids.shape == (1, 1)
        assert batch.labels.tolist() == [[_]]
        assert batch.supervised_index.tolist() == []
        assert batch.num_tokens == 1
        loss = torch.nn.functional.cross_entropy(
            torch.zeros(0, 9), batch.labels.flatten()[batch.supervised_index], reduction="sum"
        )
        assert float(loss) == 0.0
    flat = collate_flat([documents[BLANK]])
    assert flat.cu_seqlens is not None
    assert flat.cu_seqlens.tolist() == [0, 1]
