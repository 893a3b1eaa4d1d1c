"""What a worker does with one unit of a corpus: look at its documents, or encode them into a shard per split."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lmlab.data.crew import Tick
from lmlab.data.documents import Part, TextDocument, part_hash, read_documents
from lmlab.data.files import Intake
from lmlab.data.shards import ShardWriter
from lmlab.data.store import Store

UNITS = "units"
BATCH_CHARS = 2**17
"""Characters of short documents that are encoded together."""


class CorpusEncoder(Protocol):
    """A tokenizer as a worker needs it (tokenizers/fast.py has one); sent to other processes by pickle."""

    vocab_size: int
    eos_token_id: int | None
    bos_token_id: int | None

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of whole documents, BOS and EOS included."""
        ...

    def document_stream(self, pieces: Iterator[str]) -> Iterator[np.ndarray]:
        """Ids of one document of any size, in parts."""
        ...


@dataclass(frozen=True)
class ScanJob:
    """Look at a unit; ``limit``: at its first so many documents."""

    parts: tuple[Part, ...]
    on_bad_record: str
    column: str
    limit: int | None = None


@dataclass
class UnitFacts:
    """What the plan needs to know of a unit.

    Attributes:
        hashes: sha256 of each part.
        smallest: draw of its documents, and ``largest``.
        num_chars: of the last document, and ``num_visible`` (without white space at the end).
        is_cut: whether a limit on documents ends within the unit.
    """

    hashes: list[str]
    documents: int = 0
    read: int = 0
    smallest: float = 1.0
    largest: float = 0.0
    num_chars: int = 0
    num_visible: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    is_cut: bool = False


@dataclass(frozen=True)
class UnitJob:
    """Encode a unit.

    Attributes:
        val_up_to: documents whose draw is at most this are validation.
        cut: of a corpus that is one document: the character where its validation part begins.
    """

    number: int
    parts: tuple[Part, ...]
    store: Store
    on_bad_record: str
    column: str
    limit: int | None
    val_up_to: float
    cut: int | None

    @property
    def num_bytes(self) -> int:
        """Of input."""
        return sum(part.end - part.start for part in self.parts)

    @property
    def note(self) -> str:
        """The name of the file that stands in the store once the unit is done."""
        return f"{UNITS}/{self.number:05d}.json"


def scan_unit(job: ScanJob, encoder: object, tick: Tick) -> UnitFacts:
    """Hash the unit's parts and documents."""
    intake = Intake(job.on_bad_record)
    facts = UnitFacts([part_hash(part) for part in job.parts])
    for document in _documents(job.parts, intake, job.column, job.limit, tick):
        about = document.facts
        facts.documents += 1
        facts.smallest, facts.largest = min(facts.smallest, about.draw), max(facts.largest, about.draw)
        facts.num_chars, facts.num_visible = about.num_chars, about.num_visible
    facts.read, facts.dropped = intake.read, intake.dropped
    return facts


def _documents(
    parts: Sequence[Part], intake: Intake, column: str, limit: int | None, tick: Tick
) -> Iterator[TextDocument]:
    """The documents in order; ticks add up to the parts' bytes, unless they are cut off by ``limit``."""
    count = 0
    for part in parts:
        if count == limit:
            return
        told = 0
        for document in read_documents(part, intake, column=column):
            yield document
            count += 1
            if document.file is None and told + document.facts.num_bytes <= part.end - part.start:
                tick(document.facts.num_bytes)
                told += document.facts.num_bytes
            elif document.file is not None:
                told = part.end - part.start  # its reader ticks
            if count == limit:
                return
        tick(part.end - part.start - told)


def encode_unit(job: UnitJob, encoder: CorpusEncoder, tick: Tick) -> None:
    """Write the unit's shards, then its note."""
    intake = Intake(job.on_bad_record)
    with job.store.staged() as folder, contextlib.ExitStack() as stack:
        sides = {split: _Side(folder / split, f"{job.number:05d}", encoder) for split in ("train", "val")}
        for side in sides.values():
            stack.callback(side.discard)
        for document in _documents(job.parts, intake, job.column, job.limit, tick):
            if job.cut is not None:
                sides["train"].add_long(_first(document.pieces(), job.cut), tick)
                sides["val"].add_long(_after(document.pieces(), job.cut), tick)
            else:
                side = sides["val" if document.facts.draw <= job.val_up_to else "train"]
                if document.text is not None and len(document.text) <= BATCH_CHARS:
                    side.add(document.text, document.facts.num_bytes)
                else:
                    side.add_long(document.pieces(), tick if document.file else lambda count: None)
        entries = {split: entry for split, side in sides.items() if (entry := side.close()) is not None}
    note = {
        "entries": entries,
        "bytes": {split: side.num_bytes for split, side in sides.items()},
        "read": intake.read,
        "dropped": dict(sorted(intake.dropped.items())),
        "dropped_examples": list(intake.dropped_examples),
    }
    job.store.write(job.note, note)


class _Side:
    """One split's shard of a unit; nothing is written for a split that gets no document."""

    def __init__(self, folder: Path, name: str, encoder: CorpusEncoder) -> None:
        self.folder, self.name, self.encoder = folder, name, encoder
        self.num_bytes = 0
        self._writer: ShardWriter | None = None
        self._batch: list[str] = []
        self._chars = 0

    @property
    def writer(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(
                self.folder, self.name, vocab_size=self.encoder.vocab_size, flags=False
            )
        return self._writer

    def add(self, text: str, num_bytes: int) -> None:
        """A short document."""
        self._batch.append(text)
        self.num_bytes += num_bytes
        self._chars += len(text)
        if self._chars >= BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        if not self._batch:
            return
        made = self.encoder.documents(self._batch)
        self.writer.add_many(np.concatenate(made), np.asarray([len(ids) for ids in made]))
        self._batch, self._chars = [], 0

    def add_long(self, pieces: Iterator[str], tick: Tick) -> None:
        """A document of any size."""
        self._flush()
        for ids in self.encoder.document_stream(self._counted(pieces, tick)):
            self.writer.append(ids)
        self.writer.end_document()

    def _counted(self, pieces: Iterator[str], tick: Tick) -> Iterator[str]:
        for piece in pieces:
            size = len(piece.encode("utf-8"))
            self.num_bytes += size
            yield piece
            tick(size)

    def close(self) -> dict[str, Any] | None:
        self._flush()
        entry = None if self._writer is None else self._writer.close()
        self._writer = None
        return entry

    def discard(self) -> None:
        """After a failure: leave no file behind."""
        if self._writer is not None:
            self._writer.discard()


def _first(pieces: Iterator[str], cut: int) -> Iterator[str]:
    for piece in pieces:
        yield piece[:cut]
        cut -= len(piece)
        if cut <= 0:
            return


def _after(pieces: Iterator[str], cut: int) -> Iterator[str]:
    for piece in pieces:
        if len(piece) > cut:
            yield piece[max(0, cut) :]
        cut -= len(piece)
