"""Records out of one text, .jsonl or .json file, and the bytes of any file, unpacked where its name ends in .gz.

A line is cut at its newline byte before it is decoded, so a bad byte or a broken record spoils one record and is
reported with file, line and byte. Damage after which nobody knows what followed (a truncated .gz, a .json that is no
list) is an error of the file under any policy: counted as one bad record it would hide an unknown number of others.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lmlab.data.intake import Intake
from lmlab.records import Record, UserError

BOM = b"\xef\xbb\xbf"
PIECE_BYTES = 2**20


def is_packed(file: Path) -> bool:
    """Whether it is a .gz by its name."""
    return file.suffix.lower() == ".gz"


def data_suffix(file: Path) -> str:
    """What the file holds by its name, in small letters: ``.jsonl`` of ``a.JSONL.gz``."""
    return (Path(file.stem) if is_packed(file) else file).suffix.lower()


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked.

    Raises:
        UserError: it cannot be read, or is no whole .gz.
    """
    try:
        with file.open("rb") as raw:
            if not is_packed(file):
                yield cast(BinaryIO, raw)
                return
            # GzipFile splits lines in Python; the buffer around it does so in C.
            yield cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), PIECE_BYTES))  # type: ignore[arg-type]
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        fix = "copy or download it again; it is cut or damaged, or no .gz at all"
        raise UserError(f"not a whole .gz: {error}", where=str(file), fix=fix) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def raw_pieces(file: Path) -> Iterator[bytes]:
    """The bytes as they lie on disk, a .gz packed as it is.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    fix = "check that it is a file and its permissions"
    return UserError(f"cannot be read: {error.strerror or error}", where=str(file), fix=fix)


def read_text(file: Path, intake: Intake) -> Iterator[Record]:
    """One record, the whole text under ``text``: the one kind of file that must fit into memory as a whole."""
    with opened(file) as stream:
        raw = stream.read()
    intake.read += 1
    text = decoded(raw, intake, where=str(file), offset=0)
    if text is None:
        return
    place = raw.find(b"\0")
    del raw
    if place >= 0:
        detail = "the file is binary, or UTF-16"
        intake.bad("NUL byte", where=f"{file}, byte {place}", detail=detail)
    elif not text or text.isspace():
        intake.bad("no text", where=str(file), detail="the file is empty")
    else:
        yield Record({"text": text}, where=str(file))


def read_jsonl(file: Path, intake: Intake) -> Iterator[Record]:
    """One object a line; blank lines are nothing."""
    offset = 0
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            start, offset = offset, offset + len(line)
            if not (line.removeprefix(BOM) if number == 1 else line).strip():
                continue
            intake.read += 1
            where = f"{file}:{number}"
            text = decoded(line, intake, where=where, offset=start)
            if text is not None:
                yield from _parsed(text.rstrip("\r\n"), intake, where=where)


def read_json(file: Path, intake: Intake) -> Iterator[Record]:
    """A list of objects, parsed as a whole, so a large one is better a .jsonl; or, as some name them, one object a line.

    Raises:
        UserError: no JSON, or no list.
    """
    if _has_lines(file):
        yield from read_jsonl(file, intake)
        return
    fix = "mend it, or use one JSON object a line (.jsonl)"
    with opened(file) as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        del raw
        rows = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        where = f"{file}, byte {error.start}"
        raise UserError(f"not UTF-8: byte 0x{bad:02x}", where=where, fix="save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=str(file), fix=fix) from error
    del text
    if not isinstance(rows, list):
        raise UserError("not a JSON list of records", where=str(file), fix="use [{...}, ...] or .jsonl")
    for number, row in enumerate(rows, start=1):
        intake.read += 1
        if isinstance(row, dict):
            yield Record(row, where=f"{file}[{number}]")
        else:
            intake.bad("not an object", where=f"{file}[{number}]", detail=f"found {type(row).__name__}")


def _has_lines(file: Path) -> bool:
    """Whether the first line is an object and others follow."""
    with opened(file) as stream:
        first = next((line for line in stream if line.removeprefix(BOM).strip()), b"")
        if not first.removeprefix(BOM).lstrip().startswith(b"{"):  # a list is not parsed twice
            return False
        try:
            is_object = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False
        return is_object and any(line.strip() for line in stream)


def decoded(raw: bytes, intake: Intake, *, where: str, offset: int) -> str | None:
    """``raw``, found ``offset`` bytes into its file, as text without a byte order mark; None for a bad record."""
    # The mark is cut after decoding, so that byte offsets are those of the file.
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{where}, byte {offset + error.start}"
        intake.bad("not UTF-8", where=place, detail=f"byte 0x{raw[error.start]:02x}")
        return None
    return text.removeprefix("\ufeff") if offset == 0 else text


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
