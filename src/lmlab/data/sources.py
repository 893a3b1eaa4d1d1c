"""Where records come from: the embedded corpora, local files, and the hub; one config class each.

A source yields `Record`s (raw fields and the place they were read from) and a key of its content for the cache.
It knows nothing of tokenizers or templates. Whatever cannot be read goes through `Intake`, which either stops
with the place (``on_bad_record=error``) or counts it (``skip``): nothing disappears uncounted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lmlab.data.files import Intake, files_key, find_files, read_file
from lmlab.records import Record, UserError
from lmlab.registry import Config, data_sources


def cache_root() -> Path:
    """The folder of everything that can be made again: LMLAB_CACHE, or ``~/.cache/lmlab``."""
    return Path(os.environ.get("LMLAB_CACHE") or Path.home() / ".cache" / "lmlab").expanduser()


class DataConfig(Config):
    """Keys every data source has; values under ``data:`` in conf/train.yaml and in conf/data.

    Attributes:
        format: how a record becomes text: auto, triples, completion, messages, text, or a plugin's.
        template: name of a template or a Jinja text over ``instruction`` and ``input`` (triples only).
        chat_template: for conversations: null (the model's own), a name, a .jinja file or a Jinja text over ``messages``.
        columns: the source's own column names, e.g. ``{instruction: question, output: answer}``.
        max_length: tokens per example or row; the response's or prompt's surplus is cut as ``too_long`` says.
        packing: several documents in one row of at most max_length; they never see one another.
        cross_document_attention: of a text stream only: whether a window's documents see the ones before them.
        val_fraction: share held out for validation by a hash of the record (or of its group).
        test_fraction: share held out besides and evaluated once, after training; 0 for none.
    """

    kind: str
    format: str
    template: str
    chat_template: str | None
    columns: dict[str, str]
    max_length: int = Field(ge=8)
    packing: bool
    cross_document_attention: bool
    val_fraction: float = Field(gt=0, lt=1)
    test_fraction: float = Field(ge=0, lt=1)
    too_long: Literal["truncate_prompt", "truncate_response", "drop", "error"]
    on_bad_record: Literal["error", "skip"]

    def format_for(self, task: str) -> str:
        """The format in force under ``auto``."""
        return "triples" if self.format == "auto" else self.format

    def content_key(self) -> str:
        """A hash of what the source would deliver, without encoding it."""
        raise NotImplementedError

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        """Every readable record in a fixed order; counts each in ``intake.read``."""
        raise NotImplementedError


@data_sources.register
class PythonHelp(DataConfig):
    """Documentation of the running Python: text for pretraining, triples for fine-tuning."""

    kind: Literal["python_help"]

    def format_for(self, task: str) -> str:
        """Plain text when pretraining, triples when fine-tuning."""
        if self.format != "auto":
            return self.format
        return "text" if task == "pretrain" else "triples"

    def content_key(self) -> str:
        return embedded_corpus()["key"]

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        corpus = embedded_corpus()["text" if self.format_for(task) == "text" else "triples"]
        yield from _counted(intake, (Record(**record) for record in corpus))


@data_sources.register
class Skills(DataConfig):
    """Generated triples with one right answer each.

    Attributes:
        level: 1 (learnt in minutes on a CPU) to 3.
        num_records: how many are generated, before the validation split.
        data_seed: seed of the generator; apart from the run's seed, so that all runs see the same records.
    """

    kind: Literal["skills"]
    level: int = Field(ge=1, le=3)
    num_records: int = Field(ge=10)
    data_seed: int

    def content_key(self) -> str:
        from lmlab.data import skills

        generator = hashlib.sha256(Path(skills.__file__).read_bytes()).hexdigest()[:8]
        return f"{embedded_corpus()['key']}-{generator}-{self.level}-{self.num_records}-{self.data_seed}"

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        from lmlab.data import skills

        words = embedded_corpus()["words"]
        triples = skills.triples(
            level=self.level, num_records=self.num_records, seed=self.data_seed, words=words
        )
        yield from _counted(intake, triples)


class FileData(DataConfig):
    """Local files: one, a folder of them, or a glob.

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
    """Plain text: .txt and .md are one document a file; .jsonl has one in its ``text`` field a line."""

    kind: Literal["text"]

    def format_for(self, task: str) -> str:
        return "text" if self.format == "auto" else self.format


@data_sources.register
class JsonlData(FileData):
    """Structured records: triples, prompt/completion or messages; ``auto`` looks at the first record's fields."""

    kind: Literal["jsonl"]

    def format_for(self, task: str) -> str:
        if self.format != "auto":
            return self.format
        probe = Intake(on_bad_record="skip")
        record = next(iter(self.records(probe, task=task)), None)
        if record is None:
            return "triples"
        return guess_format(record.fields, self.columns)


@data_sources.register
class HubData(DataConfig):
    """A data set by the `datasets` library: a hub name or a local directory of the same layout.

    Attributes:
        name: hub id or local directory.
        config_name: the data set's configuration, or null.
        split: which of its splits to read; lmlab makes its own validation split by hash.
        revision: commit or tag on the hub, or null.
    """

    kind: Literal["hub"]
    name: str
    config_name: str | None
    split: str
    revision: str | None

    def content_key(self) -> str:
        return getattr(self._load(), "_fingerprint", self.name)

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.config_name, split=self.split, revision=self.revision
            )
        except Exception as error:  # the library raises many unrelated types for "not there"
            raise UserError(
                f"data set '{self.name}' cannot be loaded: {type(error).__name__}: {error}",
                where="data.name",
                fix="check name, split and network, or give a local directory",
            ) from error

    def format_for(self, task: str) -> str:
        if self.format != "auto":
            return self.format
        return guess_format(self._load().column_names, self.columns)

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        rows = self._load()
        yield from _counted(
            intake, (Record(dict(row), f"{self.name}:{self.split}:{i}") for i, row in enumerate(rows))
        )


def guess_format(found: Collection[str], columns: Mapping[str, str]) -> str:
    """The format whose fields are among the columns ``found``; ``triples`` (whose error then names what is missing) if none.

    ``columns`` maps lmlab's field names to the source's own, as in `DataConfig`.
    """

    def has(field: str) -> bool:
        return columns.get(field, field) in found

    if has("instruction"):
        return "triples"
    if has("messages") or "conversations" in found:
        return "messages"
    if has("prompt") and has("completion"):
        return "completion"
    return "text" if has("text") else "triples"


def _counted(intake: Intake, records: Iterator[Record] | list[Record]) -> Iterator[Record]:
    for record in records:
        intake.read += 1
        yield record


_EMBEDDED: dict[str, Any] = {}


def embedded_corpus() -> dict[str, Any]:
    """The documentation of the running Python as ``{key, text, triples, words}``, read once per Python version.

    Reading all docstrings takes seconds, so the result lies in the cache, named by version and library folder.
    """
    import sys
    import sysconfig

    from lmlab.data import python_help

    if _EMBEDDED:
        return _EMBEDDED
    identity = f"{sys.version}|{sysconfig.get_paths()['stdlib']}|{python_help.FORMAT_VERSION}"
    file = cache_root() / "python_help" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        _EMBEDDED.update(json.loads(file.read_text(encoding="utf-8")))
        return _EMBEDDED
    except (OSError, ValueError):
        pass  # not there yet, or cut by a kill: read the documentation again

    def plain(records: list[Record]) -> list[dict[str, Any]]:
        return [{"fields": r.fields, "where": r.where, "group": r.group} for r in records]

    corpus = {
        "key": python_help.version_key(),
        "text": plain(python_help.texts()),
        "triples": plain(python_help.triples()),
        "words": python_help.words(),
    }
    _EMBEDDED.update(corpus)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(corpus), encoding="utf-8")
    temporary.replace(file)
    return _EMBEDDED
