"""The text documents of large files, one after another, in bounded memory.

A corpus is cut into *units* of some megabytes, the work of one process at a time and the content of one shard. How it
is cut depends on the files alone, never on the number of processes. A .jsonl is cut at line ends; every other file stays
whole, as a document is encoded from its beginning. A .txt or .md is one document and is read in pieces.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmlab.data.files import BOM, TEXT_SUFFIXES, Intake, read_file
from lmlab.data.formats import BadRecordError, FormatOptions, formats
from lmlab.records import Record, UserError

PIECE_BYTES = 2**20
SMALLEST_UNIT = 4 * 10**6
UNITS = 64
"""How many units a small corpus is cut into, so that some processes share it evenly."""


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``end`` of a file: all of it, or some lines of a .jsonl."""

    file: str
    start: int
    end: int


class Facts(NamedTuple):
    """What a split needs to know of a document.

    Attributes:
        draw: in [0, 1), fixed by the content.
        num_chars: characters.
        num_visible: the same without white space at the end.
        num_bytes: as UTF-8.
    """

    draw: float
    num_chars: int
    num_visible: int
    num_bytes: int


class TextDocument(NamedTuple):
    """A document's text, in memory (``text``) or in a file.

    Attributes:
        facts: of the whole text.
    """

    facts: Facts
    text: str | None = None
    file: Path | None = None

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about a megabyte."""
        if self.file is not None:
            yield from _decoded(self.file)
        elif self.text:
            for start in range(0, len(self.text), PIECE_BYTES):
                yield self.text[start : start + PIECE_BYTES]


def plan_units(files: Sequence[Path], *, shard_bytes: int) -> list[tuple[Part, ...]]:
    """The files in order, cut and gathered into units of ``shard_bytes`` or less if the corpus is small.

    Raises:
        UserError: a file cannot be read.
    """
    sizes = [_size(file) for file in files]
    unit_bytes = min(shard_bytes, max(SMALLEST_UNIT, sum(sizes) // UNITS))
    units: list[tuple[Part, ...]] = []
    open_unit: list[Part] = []
    for file, size in zip(files, sizes, strict=True):
        for part in _parts(file, size, unit_bytes):
            if open_unit and sum(p.end - p.start for p in open_unit) + (part.end - part.start) > unit_bytes:
                units.append(tuple(open_unit))
                open_unit = []
            open_unit.append(part)
    return [*units, tuple(open_unit)] if open_unit else units


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _parts(file: Path, size: int, unit_bytes: int) -> Iterator[Part]:
    if file.suffix.lower() != ".jsonl" or size <= unit_bytes:
        yield Part(str(file), 0, size)
        return
    count = -(-size // unit_bytes)
    with _opened(file) as stream:
        start = 0
        for number in range(1, count + 1):
            stream.seek(max(0, size * number // count - 1))
            stream.readline()
            end = min(stream.tell(), size)
            if end > start:
                yield Part(str(file), start, end)
            start = end


def part_hash(part: Part) -> str:
    """sha256 of the part's bytes."""
    digest = hashlib.sha256()
    with _opened(Path(part.file)) as stream:
        stream.seek(part.start)
        left = part.end - part.start
        while left and (piece := stream.read(min(PIECE_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def read_documents(part: Part, intake: Intake, *, column: str) -> Iterator[TextDocument]:
    """The part's documents; each record is counted in ``intake.read``, one without a usable text in ``dropped``.

    Args:
        column: the field of a record that holds its text.

    Raises:
        UserError: a bad record under ``on_bad_record=error``, or a file that cannot be read.
    """
    file = Path(part.file)
    if file.suffix.lower() in TEXT_SUFFIXES:
        yield from _text_file(file, intake)
        return
    options = FormatOptions("", {"text": column})
    if file.suffix.lower() == ".jsonl":
        records = _lines(part, intake)
    else:
        records = ((record.fields, lambda record=record: record.where) for record in read_file(file, intake))
    for fields, where in records:
        text = fields.get(column)
        try:
            if not isinstance(text, str) or not text.strip():
                text = formats.get("text")(Record(fields, ""), options).segments[0].text  # says what is wrong
            facts = _facts([text])
        except BadRecordError as error:
            intake.bad(error.reason, where=where(), detail=error.detail)
        except UnicodeEncodeError as error:
            detail = f"field '{column}' has a lone surrogate at character {error.start}"
            intake.bad("not Unicode text", where=where(), detail=detail)
        else:
            yield TextDocument(facts, text=text)


def _text_file(file: Path, intake: Intake) -> Iterator[TextDocument]:
    intake.read += 1
    try:
        facts = _facts(_decoded(file))
    except UnicodeDecodeError as error:
        place = f"{file}, byte {error.start}"
        intake.bad("not UTF-8", where=place, detail=f"byte 0x{error.object[0]:02x}")
        return
    except BadRecordError as error:
        intake.bad(error.reason, where=str(file), detail=error.detail)
        return
    if not facts.num_visible:
        intake.bad("no text", where=str(file), detail="the file is empty")
    elif facts.num_bytes <= PIECE_BYTES:
        yield TextDocument(facts, text="".join(_decoded(file)))
    else:
        yield TextDocument(facts, file=file)


def _decoded(file: Path) -> Iterator[str]:
    """The text in pieces, without a byte order mark.

    Raises:
        UnicodeDecodeError: ``start`` counts from the file's beginning, ``object`` is the bad byte.
        BadRecordError: a NUL.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with _opened(file) as stream:
        while True:
            raw = stream.read(PIECE_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                place = done + len(raw) - len(error.object) + error.start
                bad = bytes(error.object[error.start : error.start + 1])
                raise UnicodeDecodeError("utf-8", bad, place, place + 1, error.reason) from error
            if "\0" in text:
                raise BadRecordError("NUL byte", "the file is binary, or UTF-16")
            if text:
                yield text.removeprefix("\ufeff") if not done else text
            done += len(raw)
            if not raw:
                return


def _facts(pieces: Iterator[str] | list[str]) -> Facts:
    digest = hashlib.sha256()
    num_chars = num_visible = num_bytes = 0
    for piece in pieces:
        raw = piece.encode("utf-8")
        digest.update(raw)
        num_bytes += len(raw)
        if visible := len(piece.rstrip()):
            num_visible = num_chars + visible
        num_chars += len(piece)
    draw = int.from_bytes(digest.digest()[:8], "big") / 2**64
    return Facts(draw, num_chars, num_visible, num_bytes)


def _lines(part: Part, intake: Intake) -> Iterator[tuple[dict[str, Any], Callable[[], str]]]:
    """Each line's fields, and where it is found: counted from the file's beginning only when somebody asks."""
    file, decode = Path(part.file), json.JSONDecoder().decode
    with _opened(file) as stream:
        stream.seek(part.start)
        offset, number = part.start, 0
        lines_before = functools.cache(lambda: _line_ends(file, part.start))
        while offset < part.end:
            line = stream.readline()
            begin, offset, number = offset, offset + len(line), number + 1
            if not line:
                return
            raw = line.removeprefix(BOM) if begin == 0 else line
            if not raw.strip():
                continue
            intake.read += 1

            def where(number: int = number) -> str:
                return f"{file}:{number + lines_before()}" if intake.wants_places else str(file)

            try:
                fields = decode(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                place = begin + len(line) - len(raw) + error.start
                detail = f"byte 0x{raw[error.start]:02x}"
                intake.bad("not UTF-8", where=f"{where()}, byte {place}", detail=detail)
            except (ValueError, RecursionError) as error:
                intake.bad("broken JSON", where=where(), detail=str(error))
            else:
                if isinstance(fields, dict):
                    yield fields, where
                else:
                    intake.bad("not an object", where=where(), detail=f"found {type(fields).__name__}")


def _line_ends(file: Path, before: int) -> int:
    count = 0
    with _opened(file) as stream:
        while before and (piece := stream.read(min(PIECE_BYTES, before))):
            count, before = count + piece.count(b"\n"), before - len(piece)
    return count


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    fix = "check that it is a file and its permissions"
    return UserError(f"cannot be read: {error.strerror or error}", where=str(file), fix=fix)
