"""Where records come from, one config class each: local files and shards here, the others beside.

Importing this module registers them all: embedded.py (python_help, skills), hub.py, mix.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lmlab.data.config import DataConfig, cache_root, guess_format
from lmlab.data.embedded import PythonHelp, Skills
from lmlab.data.files import files_key, find_files, read_file
from lmlab.data.hub import HubData
from lmlab.data.intake import Intake
from lmlab.data.mix import MixData
from lmlab.records import Record, UserError
from lmlab.registry import data_sources

__all__ = [
    "DataConfig",
    "FileData",
    "HubData",
    "Intake",
    "JsonlData",
    "MixData",
    "PythonHelp",
    "ShardsData",
    "Skills",
    "TextData",
    "cache_root",
]


class FileData(DataConfig):
    """Local files: one, a folder of them, or a glob; .txt .md .jsonl .json .csv .tsv .parquet, and .gz of each.

    Attributes:
        path: file, folder (all its readable files, sorted) or glob pattern.
    """

    path: str

    def files(self) -> list[Path]:
        """The files meant by ``path``, in order.

        Raises:
            UserError: nothing there, or a suffix that is not read.
        """
        return find_files(self.path)

    def content_key(self) -> str:
        return files_key(self.files())

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        for file in self.files():
            yield from read_file(file, intake)


@data_sources.register
class TextData(FileData):
    """Plain text: .txt and .md are one document a file; every record of the others has one in its ``text`` field."""

    kind: Literal["text"]

    def format_for(self, task: str) -> str:
        return "text" if self.format == "auto" else self.format


@data_sources.register
class JsonlData(FileData):
    """Structured records: triples, prompt/completion or messages; ``auto`` looks at the first good record's fields."""

    kind: Literal["jsonl"]

    def format_for(self, task: str) -> str:
        if self.format != "auto":
            return self.format
        record = next(self.records(Intake("skip"), task=task), None)
        return "triples" if record is None else guess_format(record.fields, self.columns)


@data_sources.register
class ShardsData(DataConfig):
    """Token ids made before by scripts/tokenize_corpus.py, used where they lie.

    Attributes:
        path: the directory, with its index.json.
    """

    kind: Literal["shards"]
    path: str

    def format_for(self, task: str) -> str:
        return "text"

    def content_key(self) -> str:
        """Hash of the index, which has the hashes of all shards.

        Raises:
            UserError: no such directory, or one without an index.
        """
        index = Path(self.path).expanduser().absolute() / "index.json"
        try:
            # With the place, as nothing of it is copied.
            return hashlib.sha256(str(index.parent).encode() + index.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"no shards: {error.strerror or error}",
                where=str(index),
                fix="give the directory that scripts/tokenize_corpus.py --to has written",
            ) from error

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        """Refused: only a tokenizer in training would ask for texts."""
        raise UserError(
            "shards hold token ids, not texts",
            where=f"data.path={self.path}",
            fix=f"tokenizer=file tokenizer.path={Path(self.path) / 'tokenizer'}",
        )
