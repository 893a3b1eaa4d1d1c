"""What the formats share: refusing a record, reading a field of it, and making it shorter from its beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmlab.records import Record


class BadRecordError(Exception):
    """A record that this format cannot use; ``reason`` is the key it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def text_field(record: Record, name: str, columns: Mapping[str, str], *, required: bool = True) -> str:
    """The text of lmlab's field ``name`` in the record's own column; an optional one may be missing, null or empty.

    Raises:
        BadRecordError: missing, empty, not text or not Unicode.
    """
    column = columns.get(name, name)
    value = record.fields.get(column)
    if value is None:
        if required:
            raise BadRecordError(f"no {name}", f"field '{column}' is missing or null")
        return ""
    if not isinstance(value, str):
        raise BadRecordError(f"{name} is not text", f"field '{column}' is {type(value).__name__}")
    if required and not value.strip():
        raise BadRecordError(f"empty {name}", f"field '{column}'")
    return unicode_text(value, f"field '{column}'")


def unicode_text(value: str, place: str) -> str:
    """``value``, which JSON's escapes may have given half a character.

    Raises:
        BadRecordError: it has a lone surrogate; ``place`` says where.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            "not Unicode text", f"{place} has a lone surrogate at character {error.start}"
        ) from error
    return value


@dataclass(frozen=True)
class Shortening:
    """A record's own way to become shorter.

    Attributes:
        size: how many units (characters, exchanges) it has; 0 where there is nothing to cut.
        least: units that must stay where none at all leaves no usable record.
        keep: the record with its last ``n`` units.
    """

    size: int
    least: int
    keep: Callable[[int], Record]


Shorten = Callable[[Record, Mapping[str, str]], Shortening]
"""``(record, columns) -> Shortening``."""


def cut_beginning(name: str) -> Shorten:
    """Cut characters from the beginning of a text field."""

    def shorten(record: Record, columns: Mapping[str, str]) -> Shortening:
        column = columns.get(name, name)
        value: Any = record.fields.get(column)
        text = value if isinstance(value, str) else ""

        def keep(characters: int) -> Record:
            return replace(record, fields={**record.fields, column: text[len(text) - characters :]})

        return Shortening(len(text), least_of(text), keep)

    return shorten


def least_of(text: str) -> int:
    """Characters from the last one that is not white space to the end."""
    return 1 + len(text) - len(text.rstrip())
