"""Encoded documents on disk: token ids in memory-mapped files, one folder per split.

A shard ``NAME`` is ``NAME.tokens`` (uint16 or uint32, documents one after another), ``NAME.offsets`` (int64, where
each document starts, with the end) and, unless every token is trained, ``NAME.trained`` (one byte per token);
``index.json`` lists the shards in order, with their sizes and hashes. Writers append, so a split of any size is
written in constant memory; readers map, so ranks and loader workers share the same pages and memory grows with the
batch, not with the corpus.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmlab.records import UserError

INDEX = "index.json"
PLACES = "places.gz"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id below ``vocab_size``."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardWriter:
    """Appends documents to one shard of a split; nothing stands under its final names before `close`.

    Args:
        folder: of the split; made here.
        name: of the shard.
        vocab_size: one more than the largest id that may come; fixes the type.
        flags: write a trained/untrained flag per token; without, every token counts as trained.
    """

    def __init__(self, folder: Path, name: str = "00000", *, vocab_size: int, flags: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.dtype = folder, name, token_dtype(vocab_size)
        self._own = secrets.token_hex(4)  # two machines of a cluster may have the same process id
        kinds = ("tokens", "offsets", "trained") if flags else ("tokens", "offsets")
        self._files: dict[str, BinaryIO] = {kind: self._temporary(kind).open("wb") for kind in kinds}
        self._hashes = {kind: hashlib.sha256() for kind in kinds}
        self.num_tokens = self.num_documents = self.num_trained = 0
        self._write("offsets", np.zeros(1, np.int64))

    def _temporary(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}.{self._own}.tmp"

    def _write(self, kind: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        self._hashes[kind].update(raw)
        self._files[kind].write(raw)

    def append(self, ids: np.ndarray, trained: np.ndarray | None = None) -> None:
        """A piece of the current document: ``ids`` ``[n]`` and, with flags, ``trained`` bool ``[n]``."""
        if len(ids) and int(ids.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {int(ids.max())} does not fit into {self.dtype}")
        self._write("tokens", ids.astype(self.dtype))
        if "trained" in self._files:
            assert trained is not None
            self._write("trained", trained.astype(np.uint8))
            self.num_trained += int(trained.sum())
        else:
            self.num_trained += len(ids)
        self.num_tokens += len(ids)

    def end_document(self) -> None:
        """The current document is complete."""
        self._write("offsets", np.asarray([self.num_tokens], np.int64))
        self.num_documents += 1

    def add(self, ids: np.ndarray, trained: np.ndarray | None = None) -> None:
        """One whole document."""
        self.append(ids, trained)
        self.end_document()

    def add_many(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Whole documents of ``lengths`` tokens one after another in ``ids``, all trained; for many short ones."""
        offsets = self.num_tokens + np.cumsum(lengths, dtype=np.int64)
        self.append(ids)
        self._write("offsets", offsets)
        self.num_documents += len(lengths)

    def close(self) -> dict[str, Any]:
        """Make the shard durable under its names; its entry for `write_index`."""
        entry: dict[str, Any] = {
            "name": self.name,
            "dtype": self.dtype.name,
            "tokens": self.num_tokens,
            "trained": self.num_trained,
            "documents": self.num_documents,
            "sha256": {kind: digest.hexdigest() for kind, digest in self._hashes.items()},
        }
        for kind, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._temporary(kind).replace(self.folder / f"{self.name}.{kind}")
        return entry

    def discard(self) -> None:
        """Give up: leave no file behind."""
        for kind, file in self._files.items():
            with contextlib.suppress(OSError):  # what is buffered may not find room on a full disk
                file.close()
            self._temporary(kind).unlink(missing_ok=True)


def write_index(folder: Path, entries: Sequence[dict[str, Any]], *, bos_token_id: int | None = None) -> None:
    """List the split's shards in order; a folder without this file is no split.

    Args:
        bos_token_id: of shards without flags: a document's first token is not trained if it is this one.
    """
    temporary = folder / f"{INDEX}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"bos_token_id": bos_token_id, "shards": list(entries)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / INDEX)


@contextlib.contextmanager
def written_places(folder: Path) -> Iterator[Callable[[str], None]]:
    """Notes where each document of a split came from, one line each in their order; see `Shards.places`."""
    with gzip.open(
        folder / PLACES, "wt", compresslevel=1, encoding="utf-8", errors="backslashreplace", newline="\n"
    ) as stream:

        def note(place: str) -> None:
            stream.write(place.replace("\n", " ") + "\n")

        yield note


class Shards:
    """One split, mapped from disk.

    Attributes:
        num_tokens: of all documents.
        num_documents: how many there are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"no prepared data: {error.strerror or error}",
                where=str(folder),
                fix="start again to make it anew",
            ) from error
        entries, self._bos = index["shards"], index.get("bos_token_id")
        self._tokens = [self._map(entry, "tokens", np.dtype(entry["dtype"])) for entry in entries]
        self._trained = [
            self._map(entry, "trained", np.dtype(bool)) if "trained" in entry["sha256"] else None
            for entry in entries
        ]
        self._offsets = [self._map(entry, "offsets", np.dtype(np.int64)) for entry in entries]
        # First token and first document of each shard, and the ends.
        self._token_base = np.cumsum([0, *(entry["tokens"] for entry in entries)], dtype=np.int64)
        self._document_base = np.cumsum([0, *(entry["documents"] for entry in entries)], dtype=np.int64)
        self.num_tokens, self.num_documents = int(self._token_base[-1]), int(self._document_base[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (
            self.folder,
        )  # a loader worker that is spawned maps again instead of receiving copies

    def _map(self, entry: dict[str, Any], kind: str, dtype: np.dtype[Any]) -> np.ndarray:
        path = self.folder / f"{entry['name']}.{kind}"
        count = entry["documents"] + 1 if kind == "offsets" else entry["tokens"]
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise UserError(
                f"{path.name} is missing or not {count * dtype.itemsize:,} bytes, as its index says",
                where=str(self.folder),
                fix="make it again: clear the cache folder, or run tokenize_corpus.py on it",
            )
        # A plain view: numpy's own class costs a multiple of the read at each slice.
        return np.asarray(np.memmap(path, dtype, mode="r")) if count else np.zeros(0, dtype)

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 ``[end - start]`` and trained flags bool ``[end - start]`` of that stretch of the split's tokens."""
        ids, flags, first = [], [], start
        shard = int(np.searchsorted(self._token_base, start, side="right")) - 1
        while start < end:
            base = int(self._token_base[shard])
            piece = slice(start - base, min(end, int(self._token_base[shard + 1])) - base)
            ids.append(self._tokens[shard][piece].astype(np.int64))
            trained = self._trained[shard]
            flags.append(np.ones(len(ids[-1]), bool) if trained is None else np.array(trained[piece]))
            start, shard = base + piece.stop, shard + 1
        if not ids:
            return np.zeros(0, np.int64), np.zeros(0, bool)
        joined, trained = (each[0] if len(each) == 1 else np.concatenate(each) for each in (ids, flags))
        if self._bos is not None:
            begins = np.asarray(self.starts(first, first + len(joined)), np.int64) - first
            trained[begins[joined[begins] == self._bos]] = False
        return joined, trained

    def span(self, document: int) -> tuple[int, int]:
        """First token and end of one document."""
        shard = int(np.searchsorted(self._document_base, document, side="right")) - 1
        place = document - int(self._document_base[shard])
        base = int(self._token_base[shard])
        return base + int(self._offsets[shard][place]), base + int(self._offsets[shard][place + 1])

    def places(self, documents: Sequence[int]) -> list[str]:
        """Where these documents came from (file and line), each once and in the split's order; their numbers where nobody noted it."""
        wanted = sorted(set(documents))
        try:
            with gzip.open(self.folder / PLACES, "rt", encoding="utf-8", newline="\n") as stream:
                lines = itertools.islice(stream, wanted[-1] + 1) if wanted else ()
                chosen = set(wanted)
                return [
                    line.rstrip("\n")
                    for number, line in enumerate(lines)
                    if number in chosen and line != "\n"
                ]
        except (OSError, EOFError):
            return [f"document {number} of {self.folder}" for number in wanted]

    def starts(self, start: int, end: int) -> list[int]:
        """Where documents begin within tokens ``start .. end - 1``."""
        found: list[int] = []
        first = int(np.searchsorted(self._token_base, start, side="right")) - 1
        for shard in range(max(0, first), len(self._offsets)):
            base = int(self._token_base[shard])
            if base >= end:
                break
            offsets = self._offsets[shard][:-1]
            low, high = np.searchsorted(offsets, [start - base, end - base])
            found += (base + offsets[low:high]).tolist()
        return found

    def documents(self, start: int, end: int) -> list[int]:
        """Numbers of the documents that tokens ``start .. end - 1`` belong to."""
        edges = self.starts(0, self.num_tokens)
        return list(range(bisect_right(edges, start) - 1, bisect_left(edges, end)))

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 ``[documents]``."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets in self._offsets)])
