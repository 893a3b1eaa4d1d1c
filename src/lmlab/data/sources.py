"""Where records come from, one config class each: local files and shards here, the others beside.

Importing this module registers them all: embedded.py (python_help, skills), hub.py, mix.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from lmlab.data.config import DataConfig, cache_root, guess_format
from lmlab.data.corpus_copy import corpus_folder, corpus_key
from lmlab.data.embedded import PythonHelp, Skills
from lmlab.data.files import files_key, find_files, read_file
from lmlab.data.hub import HubData
from lmlab.data.intake import Intake
from lmlab.data.mix import MixData
from lmlab.records import Record, UserError
from lmlab.registry import data_sources
from lmlab.remote import is_url, refuse_credentials

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


def _without_credentials(path: str) -> str:
    if is_url(path):
        refuse_credentials(path)
    return path


class FileData(DataConfig):
    """Files: one, a folder of them, or a glob; .txt .md .jsonl .json .csv .tsv .parquet, and .gz of each.

    Attributes:
        path: file, folder (all its readable files, sorted) or glob pattern, here or at a URL (``s3://bucket/folder``).
    """

    path: str

    _check_path = field_validator("path")(_without_credentials)

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
    """Token ids made before by scripts/tokenize_corpus.py, used where they lie; of a URL, from a copy on this machine.

    Attributes:
        path: the directory or URL (``s3://bucket/prefix``), with its index.json.
    """

    kind: Literal["shards"]
    path: str

    _check_path = field_validator("path")(_without_credentials)

    def format_for(self, task: str) -> str:
        return "text"

    def content_key(self) -> str:
        """Hash of the place and the index.

        Raises:
            UserError: nothing there, or no index.
        """
        return corpus_key(self.path)

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        """Refused: only a tokenizer in training would ask for texts."""
        raise UserError(
            "shards hold token ids, not texts",
            where=f"data.path={self.path}",
            fix=f"tokenizer=file tokenizer.path={corpus_folder(self.path) / 'tokenizer'}",
        )
