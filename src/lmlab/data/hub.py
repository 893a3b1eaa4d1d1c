"""Data sets of the Hugging Face hub, or local directories in their layout, by the `datasets` library.

Whole, the data set is downloaded and converted once, into the library's own cache; streaming, records are read over
the network (or out of the directory) as they are needed and nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lmlab.data.config import DataConfig, counted, guess_format
from lmlab.data.intake import Intake
from lmlab.data.readers import raw_pieces
from lmlab.records import Record, UserError
from lmlab.registry import data_sources

State = tuple[tuple[str, int, int], ...]


@data_sources.register
class HubData(DataConfig):
    """A data set by the `datasets` library: a hub name, or a local directory of the same layout or of data files.

    Attributes:
        name: hub id or local directory.
        config_name: the data set's configuration, or null.
        split: which of its splits to read; lmlab makes its own validation split by hash.
        revision: commit or tag on the hub, or null.
        streaming: read records as they are needed instead of downloading everything first.
        max_records: only the first so many; null for all.
    """

    kind: Literal["hub"]
    name: str = Field(pattern=r"\S")
    config_name: str | None
    split: str
    revision: str | None
    streaming: bool
    max_records: Annotated[int, Field(ge=1)] | None

    def content_key(self) -> str:
        """Of a directory the hash of its files; on the hub the commit, whole or streaming.

        Raises:
            UserError: not there, or the hub cannot be asked for the commit.
        """
        folder = self._folder()
        if folder is not None:
            content = _folder_key(folder, _state(folder))
        elif self.streaming:
            content = _commit(self.name, self.revision)
        else:
            content = str(self._rows()._fingerprint)  # made by `datasets` from the commit, network or not
        parts = [content, self.config_name, self.split, self.max_records]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def format_for(self, task: str) -> str:
        if self.format != "auto":
            return self.format
        record = next(self.records(Intake("skip"), task=task), None)
        return "triples" if record is None else guess_format(record.fields, self.columns)

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        rows = islice(self._rows(), self.max_records)
        yield from counted(intake, self._records(rows))

    def _records(self, rows: Iterator[Any]) -> Iterator[Record]:
        try:
            for number, row in enumerate(rows):
                yield Record(dict(row), f"{self.name}:{self.split}:{number}")
        except Exception as error:  # what the library or a file's reader raises in the middle of a stream
            raise _refused(self.name, error) from error

    def _folder(self) -> Path | None:
        """The local directory meant by ``name``, if it is one; it comes first, as in `datasets`.

        Raises:
            UserError: with a revision, which a directory does not have.
        """
        folder = Path(os.path.expanduser(self.name))
        if not folder.is_dir():
            return None
        if self.revision is not None:
            raise UserError(
                f"a local directory has no revision '{self.revision}'",
                where="data.revision",
                fix="data.revision=null",
            )
        return folder

    def _rows(self) -> Any:
        folder = self._folder()
        if folder is not None:
            return _loaded(
                str(folder), self.config_name, self.split, None, self.streaming, state=_state(folder)
            )
        # A stream is pinned to the commit that its key names.
        revision = _commit(self.name, self.revision) if self.streaming else self.revision
        return _loaded(self.name, self.config_name, self.split, revision, self.streaming)


@lru_cache(maxsize=8)
def _loaded(
    name: str,
    config_name: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    *,
    state: State | None = None,
) -> Any:
    """The `datasets` object, once per process: key, format and two readings of the records all want it.

    Args:
        state: of a local directory's files, so that another state is another data set.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the library raises many unrelated types for "not there"
        raise _refused(name, error) from error


@lru_cache(maxsize=64)
def _commit(name: str, revision: str | None) -> str:
    """The commit that ``revision`` (null: the main branch) of the data set is now.

    Raises:
        UserError: the hub has no such data set or revision, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=10).sha)
    except Exception as error:  # the hub's, the network's, and a name that is no hub id
        raise _refused(name, error) from error


def _refused(name: str, error: Exception) -> UserError:
    told = error
    while isinstance(
        told.__cause__, Exception
    ):  # "An error occurred while generating the dataset" says nothing
        told = told.__cause__
    text = " ".join(str(told).split())
    return UserError(
        f"data set '{name}' cannot be loaded: {type(told).__name__}: {text[:400]}",
        where="data.name",
        fix="check name, split and network, or give a local directory",
    )


def _state(folder: Path) -> State:
    """Name, size and time of every file that `datasets` may read; it passes over hidden ones."""
    files = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(base, name)
            if file.is_file():
                about = file.stat()
                files.append((file.relative_to(folder).as_posix(), about.st_size, about.st_mtime_ns))
    return tuple(files)


@lru_cache(maxsize=8)
def _folder_key(folder: Path, state: State) -> str:
    digest = hashlib.sha256()
    for name, _, _ in state:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        content = hashlib.sha256()
        for piece in raw_pieces(folder / name):
            content.update(piece)
        digest.update(content.digest())
    return digest.hexdigest()
