"""Encoded documents on disk, memory-mapped: one folder of four arrays per split.

``tokens.npy`` (uint16 or uint32, all documents one after another), ``trained.npy`` (bool per token),
``offsets.npy`` (int64, where each document starts, with the end), ``trained_bytes.npy`` (int64 per document).
Ranks and loader workers map the same pages; memory grows with the batch, not with the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmlab.data.encoding import EncodedDocument


def write_split(folder: Path, documents: Sequence[EncodedDocument], *, vocab_size: int) -> None:
    """Write the documents of one split to ``folder`` (made here)."""
    folder.mkdir(parents=True)
    # A vocabulary with gaps has ids at or above its size.
    largest = max((int(document.ids.max(initial=0)) for document in documents), default=0)
    dtype = np.uint16 if max(vocab_size - 1, largest) < 2**16 else np.uint32
    ids, trained, lengths, text_bytes = [], [], [0], []
    for document in documents:
        ids.append(document.ids.astype(dtype))
        trained.append(document.trained)
        lengths.append(len(document.ids))
        text_bytes.append(document.trained_bytes)
    np.save(folder / "tokens.npy", np.concatenate(ids) if ids else np.zeros(0, np.uint16))
    np.save(folder / "trained.npy", np.concatenate(trained) if trained else np.zeros(0, bool))
    np.save(folder / "offsets.npy", np.cumsum(np.asarray(lengths, dtype=np.int64)))
    np.save(folder / "trained_bytes.npy", np.asarray(text_bytes, dtype=np.int64))


class Shard:
    """One split, mapped from disk.

    Attributes:
        tokens: all ids, ``[total]``.
        trained: bool per token, ``[total]``.
        offsets: start of each document and the end, ``[documents + 1]``.
        trained_bytes: UTF-8 bytes of each document's trained text, ``[documents]``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens: np.ndarray = np.load(folder / "tokens.npy", mmap_mode="r")
        self.trained: np.ndarray = np.load(folder / "trained.npy", mmap_mode="r")
        self.offsets: np.ndarray = np.load(folder / "offsets.npy")
        self.trained_bytes: np.ndarray = np.load(folder / "trained_bytes.npy")

    @property
    def num_documents(self) -> int:
        """How many documents the split holds."""
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 ``[documents]``."""
        return np.diff(self.offsets)
