"""Records out of local files, and the counting of what cannot be used.

A line is cut at its newline byte before it is decoded, so a bad byte or a broken record spoils one record and is
reported with file, line and byte. ``where`` is what a person would open: ``train.jsonl:17``, ``list.json[3]``.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lmlab.records import Record, UserError

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
BOM = b"\xef\xbb\xbf"


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


def find_files(pattern: str) -> list[Path]:
    """The file, the readable files of the folder (sorted) or the matches of the glob that ``pattern`` means.

    Raises:
        UserError: nothing there, or a suffix that is not read.
    """
    known = TEXT_SUFFIXES + JSON_SUFFIXES
    fix = f"a {'/'.join(known)} file, a folder or a glob of them"
    if not pattern.strip():
        raise UserError("no data file given", where="data.path", fix=fix)
    try:
        path = Path(pattern).expanduser()
        if path.is_dir():
            # A dangling link stays in, so that it is reported and not passed over.
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and not p.is_dir())
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a folder not ours
        raise UserError(
            f"cannot be looked up: {getattr(error, 'strerror', None) or error}",
            where=f"data.path={pattern[:80]}",
            fix=fix,
        ) from error
    if not found:
        raise UserError(f"no such data file: {pattern}", where="data.path", fix=fix)
    for file in found:
        if file.suffix.lower() not in known:
            raise UserError(
                f"cannot read '{file.suffix}' files: {file}", where="data.path", fix="use " + ", ".join(known)
            )
    return found


def files_key(files: list[Path]) -> str:
    """A hash of names and contents; where the files lie and when they were written do not matter."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0")
        content = hashlib.sha256()
        for piece in _pieces(file):
            content.update(piece)
        digest.update(content.digest())
    return digest.hexdigest()


def read_file(file: Path, intake: Intake) -> Iterator[Record]:
    """The file's records, counted in ``intake``: one for a text, one a line of .jsonl, one an item of .json.

    Raises:
        UserError: the file cannot be read, is no list (.json), or holds nothing at all.
    """
    before = intake.read
    suffix = file.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        yield from _text(file, intake)
    elif suffix == ".json":
        yield from _json_list(file, intake)
    else:
        yield from _json_lines(file, intake)
    if intake.read == before:
        raise UserError(
            "holds no record", where=str(file), fix="give a file with data, or leave it out of data.path"
        )


def _unreadable(file: Path, error: OSError) -> UserError:
    fix = "check that it is a file and its permissions"
    return UserError(f"cannot be read: {error.strerror or error}", where=str(file), fix=fix)


def _pieces(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                yield piece
    except OSError as error:
        raise _unreadable(file, error) from error


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            yield from stream
    except OSError as error:
        raise _unreadable(file, error) from error


def _text(file: Path, intake: Intake) -> Iterator[Record]:
    raw = b"".join(_pieces(file))
    if not raw.removeprefix(BOM).strip():
        return
    intake.read += 1
    text = _decode(raw, intake, where=str(file), offset=0)
    if text is None:
        return
    if "\0" in text:
        place = raw.index(b"\0")
        detail = "the file is binary, or UTF-16"
        intake.bad("NUL byte", where=f"{file}, byte {place}", detail=detail)
        return
    yield Record({"text": text}, where=str(file))


def _json_lines(file: Path, intake: Intake) -> Iterator[Record]:
    offset = 0
    for number, line in enumerate(_lines(file), start=1):
        start, offset = offset, offset + len(line)
        if not (line.removeprefix(BOM) if number == 1 else line).strip():
            continue
        intake.read += 1
        where = f"{file}:{number}"
        text = _decode(line, intake, where=where, offset=start)
        if text is not None:
            yield from _parsed(text, intake, where=where)


def _json_list(file: Path, intake: Intake) -> Iterator[Record]:
    fix = "mend it, or use one JSON object a line (.jsonl)"
    raw = b"".join(_pieces(file))
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        rows = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        where = f"{file}, byte {error.start}"
        raise UserError(
            f"not UTF-8: byte 0x{raw[error.start]:02x}", where=where, fix="save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=str(file), fix=fix) from error
    if not isinstance(rows, list):
        raise UserError("not a JSON list of records", where=str(file), fix="use [{...}, ...] or .jsonl")
    for number, row in enumerate(rows, start=1):
        intake.read += 1
        if isinstance(row, dict):
            yield Record(row, where=f"{file}[{number}]")
        else:
            intake.bad("not an object", where=f"{file}[{number}]", detail=f"found {type(row).__name__}")


def _decode(raw: bytes, intake: Intake, *, where: str, offset: int) -> str | None:
    # A byte order mark at the file's start is cut after decoding, so that byte offsets are those of the file.
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
