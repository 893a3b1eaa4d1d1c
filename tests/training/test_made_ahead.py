"""Batches made ahead in a thread: the same ones, errors where they belong, and no thread left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exact import SEED, options, prepared_data, trainer_for, write_records

from lmlab.records import PackedBatch, UserError
from lmlab.training.datamodule import LMDataModule, MadeAhead


def threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_all_items_in_order() -> None:
    assert list(MadeAhead(range(50), depth=3)) == list(range(50))
    assert threads() == 0


def test_items_are_made_before_they_are_asked_for() -> None:
    made = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        made.set()
        yield 1

    items = iter(MadeAhead(source()))
    assert next(items) == 0
    assert made.wait(timeout=30), "the second item was not begun while the first was in use"


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise UserError("broken", where="there", fix="mend it")

    items = iter(MadeAhead(source()))
    assert next(items) == 1
    with pytest.raises(UserError, match="broken"):
        next(items)
    assert threads() == 0


def test_no_thread_outlives_an_endless_source_that_is_left() -> None:
    items = iter(MadeAhead(itertools.count()))
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert threads() == 1
    items.close()  # type: ignore[attr-defined]  # a generator
    assert threads() == 0


@pytest.mark.parametrize("start_step", [0, 7])
def test_against_the_bare_loader(tmp_path: Path, start_step: int) -> None:
    """A resumed run too sees the batches of the order, from its step on."""
    prepared = prepared_data(write_records(tmp_path / "records.jsonl"))
    datamodule = LMDataModule(prepared, options(3, 2), seed=SEED, flat=True)
    datamodule.trainer = trainer_for(options(3, 2), tmp_path)
    datamodule.load_state_dict({"step": start_step})
    loader = datamodule.train_dataloader()
    assert not isinstance(loader, MadeAhead), "on a CPU a thread would only take from the products"
    whole = LMDataModule(prepared, options(3, 2), seed=SEED, flat=True)
    whole.trainer = datamodule.trainer
    first = start_step * 2  # micro-batches
    pairs = zip(
        itertools.islice(MadeAhead(loader), 9),
        itertools.islice(whole.train_dataloader(), first, first + 9),
        strict=True,
    )
    seen: list[PackedBatch] = []
    for batch, expected in pairs:
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.labels, expected.labels)
        seen.append(batch)
    assert len({batch.input_ids.shape[1] for batch in seen}) > 1, (
        "batches that are all alike would prove nothing"
    )
