"""What every data source has: its keys under ``data:``, and the interface by which it is read.

A source yields `Record`s (raw fields and the place they were read from) and a key of its content for the cache.
It knows nothing of tokenizers or templates. Whatever cannot be read goes through `Intake`, which either stops
with the place (``on_bad_record=error``) or counts it (``skip``): nothing disappears uncounted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal

from pydantic import Field

from lmlab.data.intake import Intake
from lmlab.records import Record
from lmlab.registry import Config
from lmlab.remote import cache_root

__all__ = ["DataConfig", "cache_root", "counted", "guess_format"]


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
        """Every readable record in a fixed order, one after another; counts each in ``intake.read``."""
        raise NotImplementedError


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


def counted(intake: Intake, records: Iterable[Record]) -> Iterator[Record]:
    """The records of a source that has no bad ones, each counted as read."""
    for record in records:
        intake.read += 1
        yield record
