"""Every file type with its broken variants: what lmlab says of each, and what it counts when it may skip.

`python -m tests.data.broken_files` prints the table of docs/data.md, made by reading each file for real.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from lmlab.config.compose import CONF
from lmlab.data.formats import BadRecordError, FormatOptions, formats, template_source
from lmlab.data.intake import Intake
from lmlab.data.sources import JsonlData
from lmlab.records import UserError

MEND = "mend it, or count and skip such records by data.on_bad_record=skip"
SKIPPED = f": {MEND}"
NO_RECORD = "holds no record ({file}): give a file with data, or leave it out of data.path"
NOT_JSON = ": mend it, or use one JSON object a line (.jsonl)"
NAMES = ": give the first line a name for each column, each once"
REWRITE = ": write or download it again"
COPY = ": copy or download it again; it is cut or damaged, or no .gz at all"
GOOD = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}, é, now."} for i in range(6)]


@dataclass(frozen=True)
class Broken:
    """A file that is wrong in one way.

    Attributes:
        suffix: its type.
        what: what is wrong, for the table.
        content: the bytes (before packing, unless ``suffix`` ends in .gz).
        line: the error line under on_bad_record=error; ``{file}`` is the file, ``{detail}`` a library's own words.
        read: records read under skip; None where the file is refused all the same.
        dropped: reason -> count under skip.
    """

    suffix: str
    what: str
    content: bytes
    line: str
    read: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.suffix[1:]}-{self.what.replace(' ', '_')}"


def jsonl(*rows: Any) -> bytes:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    return b"".join(line + b"\n" for line in lines)


def csv_of(*rows: Any, delimiter: str = ",", header: str = "instruction,input,output") -> bytes:
    lines = [header.replace(",", delimiter).encode()]
    for row in rows:
        text = row if isinstance(row, bytes) else ",".join(f'"{v}"' for v in row.values()).encode()
        lines.append(text if delimiter == "," else text.replace(b'",', b'"' + delimiter.encode()))
    return b"".join(line + b"\n" for line in lines)


def parquet(table: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=4)
    return stream.getvalue()


def columns_of(output: list[Any], kind: Any = None) -> bytes:
    rows = len(output)
    return parquet(
        pa.table(
            {
                "instruction": [f"Say {i}." for i in range(rows)],
                "input": [""] * rows,
                "output": pa.array(output, kind) if kind else output,
            }
        )
    )


def with_bad_bytes() -> bytes:
    raw = pa.array([row["output"].encode() for row in GOOD] + [b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    inputs = {"instruction": ["Say it."] * 7, "input": [""] * 7}
    return parquet(pa.table({**inputs, "output": text}))


def damaged() -> bytes:
    """Whole in its first row group of four, spoiled in the second."""
    raw = bytearray(columns_of([row["output"] for row in GOOD]))
    group = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(1)
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        end = start + column.total_compressed_size
        raw[end - 8 : end] = b"\xff" * 8
    return bytes(raw)


def good_line(**changes: Any) -> dict[str, Any]:
    return {**GOOD[0], **changes}


def texts() -> Iterator[Broken]:
    for suffix in (".txt", ".md"):
        bad = {"read": 1}
        yield Broken(
            suffix,
            "bad byte",
            b"caf\xe9 au lait",
            "not UTF-8: byte 0xe9 ({file}, byte 3)" + SKIPPED,
            dropped={"not UTF-8": 1},
            **bad,
        )
        yield Broken(
            suffix,
            "cut in a character",
            "a é".encode()[:-1],
            "not UTF-8: byte 0xc3 ({file}, byte 2)" + SKIPPED,
            dropped={"not UTF-8": 1},
            **bad,
        )
        yield Broken(
            suffix,
            "lone surrogate",
            b"a \xed\xa0\xbd",
            "not UTF-8: byte 0xed ({file}, byte 2)" + SKIPPED,
            dropped={"not UTF-8": 1},
            **bad,
        )
        yield Broken(
            suffix,
            "UTF-16",
            "text".encode("utf-16"),
            "not UTF-8: byte 0xff ({file}, byte 0)" + SKIPPED,
            dropped={"not UTF-8": 1},
            **bad,
        )
        yield Broken(
            suffix,
            "NUL byte",
            b"ab\0c",
            "NUL byte: the file is binary, or UTF-16 ({file}, byte 2)" + SKIPPED,
            dropped={"NUL byte": 1},
            **bad,
        )
        yield Broken(suffix, "empty", b" \n", "no text: the file is empty ({file})" + SKIPPED,
                     dropped={"no text": 1}, **bad)  # fmt: skip


RECORD_FAULTS = [
    ("lone surrogate", good_line(output="\ud83d"), "not Unicode text: field 'output' has a lone surrogate at character 0", "not Unicode text"),
    ("wrong type", good_line(output=5), "output is not text: field 'output' is int", "output is not text"),
    ("missing field", {"instruction": "Say it."}, "no output: field 'output' is missing or null", "no output"),
    ("empty response", good_line(output=" \n"), "empty output: field 'output'", "empty output"),
    ("not an object", [1, 2], "not an object: found list", "not an object"),
]  # fmt: skip
"""What is wrong with one record of a .jsonl or .json."""


def lines() -> Iterator[Broken]:
    def variant(what: str, row: bytes, line: str, reason: str) -> Broken:
        content = jsonl(*GOOD[:3], row, *GOOD[3:])
        return Broken(".jsonl", what, content, line + SKIPPED, read=7, dropped={reason: 1})

    start = len(jsonl(*GOOD[:3]))
    yield variant(
        "bad byte",
        b'{"output": "caf\xe9"}',
        f"not UTF-8: byte 0xe9 ({{file}}:4, byte {start + 15})",
        "not UTF-8",
    )
    yield variant(
        "NUL byte",
        b'{"a": "x\0y"}',
        "broken JSON: Invalid control character at: line 1 column 9 (char 8) ({file}:4)",
        "broken JSON",
    )
    yield variant(
        "half a line",
        b'{"output": "It',
        "broken JSON: Unterminated string starting at: line 1 column 12 (char 11) ({file}:4)",
        "broken JSON",
    )
    for what, row, line, reason in RECORD_FAULTS:
        yield variant(what, json.dumps(row).encode(), f"{line} ({{file}}:4)", reason)
    yield Broken(
        ".jsonl",
        "cut last line",
        jsonl(*GOOD)[:-4],
        "broken JSON: Unterminated string starting at: line 1 column 50 (char 49) ({file}:6)" + SKIPPED,
        read=6,
        dropped={"broken JSON": 1},
    )
    yield Broken(
        ".jsonl",
        "UTF-16",
        jsonl({"instruction": "a", "output": "b"}).decode().encode("utf-16-le"),
        "broken JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1) ({file}:1)"
        + SKIPPED,
        read=2,
        dropped={"broken JSON": 2},
    )
    yield Broken(".jsonl", "empty", b"\n \r\n", NO_RECORD)  # fmt: skip


def lists() -> Iterator[Broken]:
    for what, row, line, reason in RECORD_FAULTS:
        content = json.dumps([*GOOD[:3], row, *GOOD[3:]]).encode()
        yield Broken(".json", what, content, f"{line} ({{file}}[4])" + SKIPPED, read=7, dropped={reason: 1})
    yield Broken(
        ".json", "bad byte", b'[{"a": "caf\xe9"}]', "not UTF-8: byte 0xe9 ({file}, byte 11): save it as UTF-8"
    )
    yield Broken(
        ".json",
        "NUL byte",
        b'[\n{"a": "\0"}]',
        "not JSON: Invalid control character at: line 2 column 8 (char 9) ({file})" + NOT_JSON,
    )
    yield Broken(
        ".json",
        "cut",
        b'[{"a": 1},',
        "not JSON: Expecting value: line 1 column 11 (char 10) ({file})" + NOT_JSON,
    )
    yield Broken(
        ".json",
        "two lists",
        b'[{"a": 1}]\n[{"a": 2}]',
        "not JSON: Extra data: line 2 column 1 (char 11) ({file})" + NOT_JSON,
    )
    yield Broken(
        ".json",
        "no list",
        b'{"data": []}',
        "not a JSON list of records ({file}): use [{{...}}, ...] or .jsonl",
    )
    yield Broken(".json", "empty list", b"[]", NO_RECORD)
    yield Broken(".json", "empty", b"", NO_RECORD)


def tables() -> Iterator[Broken]:
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):

        def made(*rows: Any, d: str = delimiter, **keys: Any) -> bytes:
            return csv_of(*rows, delimiter=d, **keys)

        start = len(made(*GOOD[:3]))
        middle: list[tuple[str, bytes, str, str]] = [
            ("bad byte", b'"Say","","caf\xe9"', f"not UTF-8: byte 0xe9 ({{file}}:5, byte {start + 13})", "not UTF-8"),
            ("lone surrogate", b'"Say","","\xed\xa0\xbd"', f"not UTF-8: byte 0xed ({{file}}:5, byte {start + 10})", "not UTF-8"),
            ("NUL byte", b'"Say","","\0"', f"NUL byte: the file is binary, or UTF-16 ({{file}}:5, byte {start + 10})", "NUL byte"),
            ("field missing", b'"Say",""', "wrong number of fields: found 2, the header has 3 ({file}:5)", "wrong number of fields"),
            ("field too many", b'"Say","","a","b"', "wrong number of fields: found 4, the header has 3 ({file}:5)", "wrong number of fields"),
            ("text behind a quote", b'"Say","","a" b', f"broken CSV: '{delimiter}' expected after '\"' ({{file}}:5)", "broken CSV"),
            ("empty response", b'"Say","",""', "empty output: field 'output' ({file}:5)", "empty output"),
        ]  # fmt: skip
        for what, row, line, reason in middle:
            content = made(*GOOD[:3], row, *GOOD[3:])
            yield Broken(suffix, what, content, line + SKIPPED, read=7, dropped={reason: 1})
        yield Broken(
            suffix,
            "cut last line",
            made(*GOOD)[:-4],
            "broken CSV: unexpected end of data ({file}:7)" + SKIPPED,
            read=6,
            dropped={"broken CSV": 1},
        )
        yield Broken(
            suffix,
            "open quote",
            made(GOOD[0], b'"Say', *GOOD[1:3]),
            f"broken CSV: '{delimiter}' expected after '\"'; a quote opened there took in 2 lines ({{file}}:3): "
            "close or double the quote: how many records stand behind it cannot be told",
        )
        yield Broken(
            suffix,
            "column without a name",
            made(*GOOD, header="instruction,,output"),
            "column 2 has no name ({file}:1)" + NAMES,
        )
        yield Broken(
            suffix,
            "column twice",
            made(*GOOD, header="instruction,output,output"),
            "two columns are called 'output' ({file}:1)" + NAMES,
        )
        yield Broken(
            suffix,
            "UTF-16",
            made(*GOOD).decode().encode("utf-16"),
            "not UTF-8: byte 0xff ({file}, byte 0): save it as UTF-8",
        )
        yield Broken(suffix, "header alone", made(), NO_RECORD)
        yield Broken(suffix, "empty", b"", NO_RECORD)  # fmt: skip


def columnar() -> Iterator[Broken]:
    outputs = [row["output"] for row in GOOD]
    kept = columns_of(outputs)
    twice = parquet(pa.table([outputs, outputs], ["output", "output"]))
    yield Broken(
        ".parquet",
        "bad byte",
        with_bad_bytes(),
        "not UTF-8: byte 0xe9 ({file}[7])" + SKIPPED,
        read=7,
        dropped={"not UTF-8": 1},
    )
    yield Broken(
        ".parquet",
        "null response",
        columns_of([*outputs, None]),
        "no output: field 'output' is missing or null ({file}[7])" + SKIPPED,
        read=7,
        dropped={"no output": 1},
    )
    yield Broken(
        ".parquet",
        "empty response",
        columns_of([*outputs, ""]),
        "empty output: field 'output' ({file}[7])" + SKIPPED,
        read=7,
        dropped={"empty output": 1},
    )
    yield Broken(
        ".parquet",
        "wrong type",
        columns_of([1, 2]),
        "output is not text: field 'output' is int ({file}[1])" + SKIPPED,
        read=2,
        dropped={"output is not text": 2},
    )
    yield Broken(
        ".parquet",
        "not Parquet",
        jsonl(*GOOD),
        "not a readable Parquet file: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file. ({file})"
        + REWRITE,
    )
    yield Broken(
        ".parquet",
        "cut",
        kept[:-9],
        "not a readable Parquet file: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file. ({file})"
        + REWRITE,
    )
    yield Broken(
        ".parquet",
        "empty",
        b"",
        "not a readable Parquet file: Parquet file size is 0 bytes ({file})" + REWRITE,
    )
    yield Broken(
        ".parquet",
        "column twice",
        twice,
        "two columns are called 'output' ({file}): give each column a name of its own",
    )
    yield Broken(
        ".parquet",
        "damaged",
        damaged(),
        "{detail} ({file})" + REWRITE,
    )
    yield Broken(".parquet", "no rows", columns_of([], pa.string()), NO_RECORD)  # fmt: skip


def packed() -> Iterator[Broken]:
    whole = gzip.compress(jsonl(*GOOD), mtime=0)
    long = gzip.compress(jsonl(*GOOD * 2000), mtime=0)
    yield Broken(
        ".jsonl.gz",
        "cut",
        long[: len(long) // 2],
        "not a whole .gz: Compressed file ended before the end-of-stream marker was reached ({file})" + COPY,
    )
    yield Broken(
        ".jsonl.gz",
        "not packed",
        jsonl(*GOOD),
        "not a whole .gz: Not a gzipped file (b'{\"') ({file})" + COPY,
    )
    yield Broken(
        ".jsonl.gz",
        "damaged",
        whole[:-8] + bytes(4) + whole[-4:],
        "not a whole .gz: CRC check failed {detail} ({file})" + COPY,
    )
    yield Broken(
        ".jsonl.gz",
        "more behind it",
        whole + b"x" * 9,
        "not a whole .gz: Not a gzipped file (b'xx') ({file})" + COPY,
    )
    yield Broken(".jsonl.gz", "empty", b"", NO_RECORD)
    yield Broken(".parquet.gz", "not Parquet", gzip.compress(jsonl(*GOOD)), "not a readable Parquet file: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file. ({file})" + REWRITE)  # fmt: skip


def all_broken() -> list[Broken]:
    return [*texts(), *lines(), *lists(), *tables(), *columnar(), *packed()]


def config_for(path: Path, on_bad_record: str = "error") -> JsonlData:
    """data=jsonl with conf/train.yaml's values."""
    common = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["data"]
    return JsonlData(**common | {"kind": "jsonl", "path": str(path), "on_bad_record": on_bad_record})


def delivered(config: JsonlData) -> tuple[int, Intake]:
    """Records that come out as documents, read and formatted as `prepare` does, and what was counted on the way."""
    intake, format_name = Intake(config.on_bad_record), config.format_for("sft")
    options = FormatOptions(template_source(config.template), config.columns)
    count = 0
    for record in config.records(intake, task="sft"):
        try:
            formats.get(format_name)(record, options)
            count += 1
        except BadRecordError as error:
            intake.bad(error.reason, where=record.where, detail=error.detail)
    return count, intake


def write(broken: Broken, folder: Path, *, pack: bool) -> Path:
    file = folder / f"rows{broken.suffix}{'.gz' if pack else ''}"
    file.write_bytes(gzip.compress(broken.content) if pack else broken.content)
    return file


def markdown_table() -> str:
    """Type, variant, error line and what is counted under skip, each from reading the file for real."""
    rows = ["| file | what is wrong | `error:` | under `on_bad_record=skip` |", "| --- | --- | --- | --- |"]
    for broken in all_broken():
        with tempfile.TemporaryDirectory() as folder:
            file = write(broken, Path(folder), pack=False)
            line = error_line(lambda file=file: delivered(config_for(file)))
            try:
                count, intake = delivered(config_for(file, "skip"))
                dropped = ", ".join(f"{reason}: {n}" for reason, n in intake.dropped.items())
                skipped = f"read {intake.read}, kept {count}, dropped {dropped}"
            except UserError:
                skipped = "the same error"
            shown = line.replace(f"{folder}/", "").removesuffix(SKIPPED).replace("|", "\\|")
        rows.append(f"| {broken.suffix} | {broken.what} | `{shown}` | {skipped} |")
    return "\n".join(rows) + "\n"


def error_line(read: Callable[[], Any]) -> str:
    try:
        read()
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


if __name__ == "__main__":
    print(markdown_table(), end="")
