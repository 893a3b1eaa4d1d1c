"""Validation's figures are those of each record once, whatever the batch size, the layout and the number of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import bring_up, on_two_ranks, options, prepared_data, tiny_model, write_records

from lmlab.data.prepared import PreparedData
from lmlab.training.modules import Validation

pytestmark = pytest.mark.parity
RELATIVE = 1e-6  # fp32 within a batch, fp64 between them; 1e-7 measured
# Validation records -> records read. Two ranks cannot share 7 or 1 evenly; with 1, one of them has none.
SPLITS = {7: 30, 1: 3, 16: 67}
MEASURED: dict[tuple[int, int | None], Sequence[int]] = {
    (7, None): range(7),
    (1, None): range(1),
    (16, None): range(16),
    (16, 5): [0, 3, 6, 9, 12],
    (7, 9): range(7),
}
"""Validation records, trainer.max_val_rows -> the records that are measured."""
CASES: list[tuple[tuple[int, int | None], int, str]] = list(
    itertools.product(MEASURED, (1, 3, 8), ("flat", "padded"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for count, records in SPLITS.items():
        write_records(folder / f"{count}.jsonl", records)
    return folder


def data(folder: Path, case: tuple[int, int | None]) -> PreparedData:
    return prepared_data(folder / f"{case[0]}.jsonl")


def validated(
    prepared: PreparedData, limit: int | None, batch_size: int, layout: str, root: Path, *, ranks: int = 1
) -> Any:
    """(metrics, tokens this rank counted) of one validation through Lightning."""
    chosen = options(1, 1, val_batch_size=batch_size, max_val_rows=limit, devices=ranks)
    report = prepared.meta["report"]["val"]
    of = None if limit is None else report["supervised_tokens"]
    about = Validation(supervised_bytes=report["supervised_bytes"], supervised_tokens=of)
    flat = layout == "flat"
    module, trainer, rows = bring_up(tiny_model(), prepared, chosen, root, flat=flat, validation=about)
    seen: dict[str, float] = {}
    module.on_metrics = seen.update
    counted: list[int] = []
    update = module._val_tokens.update
    module._val_tokens.update = lambda value: (counted.append(int(value)), update(value))  # type: ignore[method-assign]
    trainer.validate(module, rows, verbose=False)
    return seen, counted


def plain(prepared: PreparedData, records: Sequence[int]) -> tuple[float, int]:
    """(nll in nats, supervised tokens) by a loop over the records."""
    model, rows = tiny_model().double(), prepared.rows("val")
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for index in records:
            logits = model(input_ids=rows[index].input_ids[None]).logits[0]
            nll += float(torch.nn.functional.cross_entropy(logits, rows[index].labels, reduction="sum"))
            tokens += int((rows[index].labels != -100).sum())
    return nll, tokens


def check(seen: dict[str, float], prepared: PreparedData, case: tuple[int, int | None]) -> int:
    records = MEASURED[case]
    nll, tokens = plain(prepared, records)
    assert len(prepared.rows("val")) == case[0]
    assert seen["val/loss"] == pytest.approx(nll / tokens, rel=RELATIVE)
    assert seen["val/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    side = prepared.meta["report"]["val"]
    measured_bytes = side["supervised_bytes"] * tokens / side["supervised_tokens"]
    if len(records) == case[0]:
        assert measured_bytes == side["supervised_bytes"]
    assert seen["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / measured_bytes, rel=RELATIVE)
    return tokens


@pytest.mark.parametrize(("case", "batch_size", "layout"), CASES)
def test_against_torch_loop_one_rank(
    folder: Path, tmp_path: Path, case: tuple[int, int | None], batch_size: int, layout: str
) -> None:
    prepared = data(folder, case)
    seen, counted = validated(prepared, case[1], batch_size, layout, tmp_path)
    assert sum(counted) == check(seen, prepared, case), "a record twice, or not at all"


def rank_validations(folder: str, root: str) -> list[Any]:
    """Runs on each of two ranks."""
    return [
        validated(data(Path(folder), case), case[1], batch_size, layout, Path(root), ranks=2)
        for case, batch_size, layout in CASES
    ]


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    return on_two_ranks(rank_validations, str(folder), str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "batch_size", "layout"), CASES)
def test_against_torch_loop_two_ranks(
    folder: Path, two_ranks: list[list[Any]], case: tuple[int, int | None], batch_size: int, layout: str
) -> None:
    prepared = data(folder, case)
    results = [rank[CASES.index((case, batch_size, layout))] for rank in two_ranks]
    for seen, _ in results:
        tokens = check(seen, prepared, case)
        assert sum(sum(counted) for _, counted in results) == tokens, "a record twice, or not at all"
    batches = [len(counted) for _, counted in results]
    assert batches[0] == batches[1], "one rank would wait for the other"
