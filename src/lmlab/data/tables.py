"""Records out of tables: .csv and .tsv (RFC 4180, a header, all values text) and .parquet, in bounded memory.

Python's csv module does the quoting, in its strict mode; pyarrow reads Parquet batch by batch.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmlab.data.intake import Intake
from lmlab.data.readers import is_packed, opened
from lmlab.records import Record, UserError

FIELD_LIMIT = 2**27
"""Characters of one value. A quote that is never closed would otherwise take the rest of a file of any size into memory."""
BATCH_ROWS = 256

Fault = tuple[str, int, str]


class _Lines:
    """Decoded lines, as csv.reader wants them, and what was wrong with them since `take_fault`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offset = 0
        self._fault: Fault | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._stream)
        offset, self._offset = self._offset, self._offset + len(line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            self._found("not UTF-8", offset + error.start, f"byte 0x{line[error.start]:02x}")
            text = line.decode("utf-8", "replace")
        if "\0" in text:
            self._found("NUL byte", offset + line.index(b"\0"), "the file is binary, or UTF-16")
            text = text.replace("\0", "\ufffd")  # Python 3.10's csv stops at one
        return text if offset else text.removeprefix("\ufeff")

    def _found(self, reason: str, place: int, detail: str) -> None:
        self._fault = self._fault or (reason, place, detail)

    def take_fault(self) -> Fault | None:
        """(reason, byte in the file, detail) of the first bad line since the last call, or None."""
        fault, self._fault = self._fault, None
        return fault


def read_csv(file: Path, intake: Intake, *, delimiter: str = ",") -> Iterator[Record]:
    """One record a row, placed by the line on which it begins; blank lines are nothing.

    Raises:
        UserError: a header that cannot be read, or names no or one column twice.
    """
    csv.field_size_limit(FIELD_LIMIT)  # csv knows this limit for the whole process only
    with opened(file) as stream:
        lines = _Lines(stream)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(rows, lines, file)
        while True:
            first = rows.line_num + 1
            where = f"{file}:{first}"
            problem: tuple[str, str] | None = None
            row: list[str] = []
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if rows.line_num > first:  # an open quote took in lines that may have been good records
                    raise UserError(
                        f"broken CSV: {error}; a quote opened there took in {rows.line_num - first + 1} lines",
                        where=where,
                        fix="close or double the quote: how many records stand behind it cannot be told",
                    ) from error
                problem = ("broken CSV", str(error))
            if fault := lines.take_fault():
                where, problem = f"{where}, byte {fault[1]}", (fault[0], fault[2])
            if not row and not problem:
                continue
            if row and not problem and len(row) != len(header):
                problem = ("wrong number of fields", f"found {len(row)}, the header has {len(header)}")
            intake.read += 1
            if problem:
                intake.bad(problem[0], where=where, detail=problem[1])
            else:
                yield Record(dict(zip(header, row, strict=True)), where=where)


def _header(rows: Any, lines: _Lines, file: Path) -> list[str]:
    """The names in the first row that is not blank; [] for a file without one."""
    fix = "give the first line a name for each column, each once"
    try:
        header: list[str] = next((row for row in rows if row), [])
    except csv.Error as error:
        raise UserError(f"broken CSV: {error}", where=f"{file}:1", fix=fix) from error
    if fault := lines.take_fault():
        reason, place, detail = fault
        raise UserError(f"{reason}: {detail}", where=f"{file}, byte {place}", fix="save it as UTF-8")
    where = f"{file}:{rows.line_num}"
    if unnamed := [number for number, name in enumerate(header, start=1) if not name.strip()]:
        if len(unnamed) == 1 and unnamed[0] == 1:
            fix += " (a table of pandas: to_csv(index=False))"
        raise UserError(f"column {unnamed[0]} has no name", where=where, fix=fix)
    _refuse_twice(header, where, fix)
    return header


def _refuse_twice(names: list[str], where: str, fix: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two columns are called '{twice[0]}'", where=where, fix=fix)


def read_parquet(file: Path, intake: Intake) -> Iterator[Record]:
    """One record a row, numbered from 1; values as pyarrow gives them to Python.

    Raises:
        UserError: not a Parquet file, a damaged one, or one with a column twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with opened(file) as stream, tempfile.TemporaryFile() as unpacked:
        if is_packed(file):  # Parquet is read from its end
            shutil.copyfileobj(stream, unpacked, 2**20)
        try:
            table = pq.ParquetFile(unpacked if is_packed(file) else stream)
            _refuse_twice(table.schema_arrow.names, str(file), "give each column a name of its own")
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for row in _rows(batch):
                    number += 1
                    intake.read += 1
                    where = f"{file}[{number}]"
                    if isinstance(row, UnicodeDecodeError):
                        bad = row.object[row.start]
                        intake.bad("not UTF-8", where=where, detail=f"byte 0x{bad:02x}")
                    elif isinstance(row, Exception):
                        intake.bad("not a value of Python", where=where, detail=str(row))
                    else:
                        yield Record(row, where=where)
        except (pa.ArrowException, OSError) as error:
            what = f"damaged after row {number}" if number else "not a readable Parquet file"
            fix = "write or download it again"
            raise UserError(f"{what}: {error}", where=str(file), fix=fix) from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The batch's rows; where one cannot become Python values, what is wrong with it."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield error
    else:
        yield from rows
