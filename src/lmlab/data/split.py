"""Train, validation and test by a hash of each record: adding records moves no old one.

The hash is a number in [0, 1). The lowest ``val_fraction`` of that range is validation, the highest ``test_fraction``
is the test set, so changing one moves nothing in the other. At least one group is held out for each that is wanted, and
one is left where there are enough; that needs one look at all records before, so a source is read twice. Nothing but
a few numbers is kept, so a source of any size can be split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lmlab.records import Record, UserError

SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class SplitPlan:
    """How a source is split.

    Attributes:
        val_up_to: a record whose draw is at most this is validation.
        test_from: one whose draw is at least this is test; None without a test set.
        fractions: (validation, test) as asked for.
        cut_column: the text column of a source that is one single text, whose last parts are held out.
        columns: every column that some record has.
        num_records: how many could be read.
    """

    val_up_to: float
    test_from: float | None
    fractions: tuple[float, float]
    cut_column: str | None
    columns: frozenset[str]
    num_records: int

    def sides(self, records: Iterable[Record]) -> Iterator[tuple[str, Record]]:
        """Each record with its side (train, val, test); the parts of a single text one after another.

        Raises:
            UserError: a single text too short to be cut.
        """
        for record in records:
            if self.cut_column is not None:
                yield from cut_text(record, self.cut_column, *self.fractions)
                continue
            place = draw(record)
            if place <= self.val_up_to:
                yield "val", record
            elif self.test_from is not None and place >= self.test_from:
                yield "test", record
            else:
                yield "train", record


def plan_split(
    records: Iterable[Record],
    val_fraction: float,
    test_fraction: float = 0.0,
    *,
    text_column: str | None = None,
) -> SplitPlan:
    """Look once at all records.

    Args:
        text_column: where a text stands, if records are texts; a single one is cut instead of hashed.
    """
    smallest, largest, count = 1.0, 0.0, 0
    columns: set[str] = set()
    first: Record | None = None
    for record in records:
        first = first or record
        place = draw(record)
        smallest, largest, count = min(smallest, place), max(largest, place), count + 1
        columns.update(record.fields)
    val_up_to = max(val_fraction, smallest)
    if largest <= val_up_to:  # a handful of records that all fell below: hold out the smallest only
        val_up_to = smallest
    single = first is not None and count == 1 and isinstance(first.fields.get(text_column or ""), str)
    return SplitPlan(
        val_up_to,
        min(1 - test_fraction, largest) if test_fraction else None,
        (val_fraction, test_fraction),
        text_column if single else None,
        frozenset(columns),
        count,
    )


def draw(record: Record) -> float:
    """A number in [0, 1) fixed by the record's group or content."""
    key = record.group if record.group is not None else json.dumps(record.fields, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def cut_text(
    record: Record, column: str, val_fraction: float, test_fraction: float = 0.0
) -> Iterator[tuple[str, Record]]:
    """A single text as its beginning (train), the part after it (val) and its end (test, if wanted).

    Raises:
        UserError: nothing but white space would be left to train on.
    """
    text = record.fields[column]
    # Each side gets something that can be seen: white space at the end alone is nothing to measure on.
    seen = len(text.rstrip())
    ends = [len(text)]
    for fraction in (test_fraction, val_fraction):
        if fraction:
            cut = ends[0] - max(1, round(len(text) * fraction))
            ends.insert(0, max(0, min(cut, seen - 1)))
            seen = len(text[: ends[0]].rstrip())
    if ends[0] < 1 or not text[: ends[0]].strip():
        raise UserError(
            f"a text of {len(text)} characters is too short to hold out its last part",
            where=record.where,
            fix="give more text",
        )
    for side, start, end in zip(SIDES, [0, *ends], ends, strict=False):
        if end > start:
            yield side, replace(record, fields={**record.fields, column: text[start:end]})
