"""Where records come from: the embedded corpora, local files, and the hub; one config class each.

A source yields `Record`s (raw fields and the place they were read from) and a key of its content for the cache.
It knows nothing of tokenizers or templates. Whatever cannot be read goes through `Intake`, which either stops
with the place (``on_bad_record=error``) or counts it (``skip``): nothing disappears uncounted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lmlab.records import Record, UserError
from lmlab.registry import Config, data_sources

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")


def cache_root() -> Path:
    """The folder of everything that can be made again: LMLAB_CACHE, or ``~/.cache/lmlab``."""
    return Path(os.environ.get("LMLAB_CACHE") or Path.home() / ".cache" / "lmlab").expanduser()


@dataclass
class Intake:
    """Counts what a source delivered; ``read == kept + sum(dropped.values())`` holds at the end.

    Args:
        on_bad_record: ``error`` stops at the first bad record, ``skip`` counts it and goes on.
    """

    on_bad_record: str
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0

    @property
    def kept(self) -> int:
        """Records that were not dropped."""
        return self.read - self.dropped.total()

    def bad(self, reason: str, *, where: str, detail: str = "") -> None:
        """A record that cannot be used, for ``reason`` (a short phrase, the key in the report).

        Raises:
            UserError: under ``on_bad_record=error``.
        """
        if self.on_bad_record == "error":
            what = f"{reason}: {detail}" if detail else reason
            raise UserError(
                what, where=where, fix="mend it, or count and skip such records by data.on_bad_record=skip"
            )
        self.dropped[reason] += 1


class DataConfig(Config):
    """Keys every data source has; values in conf/data/_common.yaml.

    Attributes:
        format: how a record becomes text: auto, triples, completion, messages, text, or a plugin's.
        template: name of a template or a Jinja text over ``instruction`` and ``input`` (triples only).
        columns: the source's own column names, e.g. ``{instruction: question, output: answer}``.
        max_length: tokens per example or row; the response's or prompt's surplus is cut as ``too_long`` says.
        packing: several documents in one row of at most max_length; they never see one another.
        val_fraction: share held out for validation by a hash of the record (or of its group).
    """

    kind: str
    format: str
    template: str
    columns: dict[str, str]
    max_length: int = Field(ge=8)
    packing: bool
    val_fraction: float = Field(gt=0, lt=1)
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
        """The files meant by ``path``.

        Raises:
            UserError: nothing there, or a suffix that is not read.
        """
        path = Path(self.path).expanduser()
        known = TEXT_SUFFIXES + JSON_SUFFIXES
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(
                f"no such data file: {self.path}",
                where="data.path",
                fix=f"a {'/'.join(known)} file, a folder or a glob of them",
            )
        for file in found:
            if file.suffix.lower() not in known:
                raise UserError(
                    f"cannot read '{file.suffix}' files: {file}",
                    where="data.path",
                    fix="use " + ", ".join(known),
                )
        return found

    def content_key(self) -> str:
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(file.name.encode() + b"\0")
            try:
                with file.open("rb") as stream:
                    digest.update(
                        hashlib.file_digest(stream, "sha256").digest()
                        if hasattr(hashlib, "file_digest")
                        else stream.read()
                    )
            except OSError as error:
                raise UserError(
                    f"cannot be read: {error.strerror}", where=str(file), fix="check its permissions"
                ) from error
        return digest.hexdigest()

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        for file in self.files():
            before = intake.read
            if file.suffix.lower() in TEXT_SUFFIXES:
                yield from _text_file(file, intake)
            else:
                yield from _json_records(file, intake)
            if intake.read == before:
                raise UserError(
                    "holds no record",
                    where=str(file),
                    fix="give a file with data, or leave it out of data.path",
                )


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
        return guess_format({self.columns_reversed().get(k, k) for k in record.fields})

    def columns_reversed(self) -> dict[str, str]:
        """The source's column name -> lmlab's."""
        return {theirs: ours for ours, theirs in self.columns.items()}


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
        return guess_format(set(self._load().column_names)) if self.format == "auto" else self.format

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        rows = self._load()
        yield from _counted(
            intake, (Record(dict(row), f"{self.name}:{self.split}:{i}") for i, row in enumerate(rows))
        )


def guess_format(columns: set[str]) -> str:
    """The format whose fields are among ``columns``; ``triples`` (whose error then names what is missing) if none."""
    if "instruction" in columns:
        return "triples"
    if "messages" in columns or "conversations" in columns:
        return "messages"
    if {"prompt", "completion"} <= columns:
        return "completion"
    return "text" if "text" in columns else "triples"


def _counted(intake: Intake, records: Iterator[Record] | list[Record]) -> Iterator[Record]:
    for record in records:
        intake.read += 1
        yield record


def _text_file(file: Path, intake: Intake) -> Iterator[Record]:
    raw = file.read_bytes()
    if not raw.strip():
        return
    intake.read += 1
    text = _decode(raw.removeprefix(b"\xef\xbb\xbf"), intake, where=str(file), offset=0)
    if text is not None:
        yield Record({"text": text}, where=str(file))


def _json_records(file: Path, intake: Intake) -> Iterator[Record]:
    if file.suffix.lower() == ".json":
        yield from _json_array(file, intake)
        return
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            start, offset = offset, offset + len(line)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            intake.read += 1
            where = f"{file}:{number}"
            text = _decode(line, intake, where=where, offset=start)
            if text is not None:
                yield from _parsed(text, intake, where=where)


def _json_array(file: Path, intake: Intake) -> Iterator[Record]:
    text = (
        _decode(file.read_bytes().removeprefix(b"\xef\xbb\xbf"), Intake("error"), where=str(file), offset=0)
        or ""
    )
    try:
        rows = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise UserError(
            f"not JSON: {error}", where=str(file), fix="mend it, or use one JSON object a line (.jsonl)"
        ) from error
    if not isinstance(rows, list):
        raise UserError("not a JSON list of records", where=str(file), fix="use [{...}, ...] or .jsonl")
    for number, row in enumerate(rows, start=1):
        intake.read += 1
        if isinstance(row, dict):
            yield Record(row, where=f"{file}[{number}]")
        else:
            intake.bad("not an object", where=f"{file}[{number}]", detail=f"found {type(row).__name__}")


def _decode(raw: bytes, intake: Intake, *, where: str, offset: int) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        intake.bad(
            "not UTF-8",
            where=f"{where}, byte {offset + error.start}",
            detail=f"byte 0x{raw[error.start]:02x}",
        )
        return None


def _parsed(text: str, intake: Intake, *, where: str) -> Iterator[Record]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        intake.bad("broken JSON", where=where, detail=str(error))
        return
    if not isinstance(row, dict):
        intake.bad("not an object", where=where, detail=f"found {type(row).__name__}")
        return
    yield Record(row, where=where)


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
