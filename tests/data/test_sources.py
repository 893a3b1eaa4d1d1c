"""Reading files and hub directories: every bad input's one-line error, exact counts, order, and the content key."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.data.files import Intake
from lmlab.data.sources import guess_format
from lmlab.records import Record, UserError

MEND = "mend it, or count and skip such records by data.on_bad_record=skip"
GIVE = "a .txt/.md/.jsonl/.json/.csv/.tsv/.parquet file or a .gz of one, a folder or a glob of them"
HOLDS = "give a file with data, or leave it out of data.path"
GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
Make = Callable[..., Any]


def read(config: Any, on_bad_record: str = "error") -> tuple[list[Record], Intake]:
    intake = Intake(on_bad_record)
    return list(config.records(intake, task="sft")), intake


def error_of(config: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent", "*.jsonl", "**/*.txt"])
def test_nothing_there(tmp_path: Path, make_config: Make, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(f"no such data file: {path} (data.path): {GIVE}")):
        make_config("jsonl", path=path).content_key()


def test_an_empty_folder_is_nothing(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "notes.png").write_text("a,b")  # a folder's other files are not its data
    message = error_of(make_config("jsonl", path=str(tmp_path)))
    assert message == f"no data file in the folder {tmp_path}, which holds 1 .png (data.path): {GIVE}"


@pytest.mark.parametrize("path", ["", "  "])
def test_no_path_is_not_the_current_folder(make_config: Make, path: str) -> None:
    assert error_of(make_config("text", path=path)) == f"no data file given (data.path): {GIVE}"


def test_a_path_the_system_refuses(make_config: Make) -> None:
    message = error_of(make_config("text", path="x" * 5000))
    assert message.startswith("cannot be looked up: File name too long (data.path=xxx")
    message = error_of(make_config("text", path="~no-such-user-here/x.txt"))
    assert message.startswith("cannot be looked up: ")


def test_unknown_suffix(tmp_path: Path, make_config: Make) -> None:
    for name in ("data.jsonn", "data.xlsx"):
        file = tmp_path / name
        file.write_text("a,b")
        message = error_of(make_config("jsonl", path=str(file)))
        assert message.startswith(f"cannot read '{file.suffix}' files: {file} (data.path): ")
        assert message.endswith("one of .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, or .gz of one")
        assert ("did you mean '.json" in message) == (name == "data.jsonn")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \r\n\n"),
        ("a.jsonl", b"\xef\xbb\xbf\n"),
        ("a.json", b""),
        ("a.json", b"[]"),
    ],
)
@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_an_empty_file_is_an_error(
    tmp_path: Path, make_config: Make, name: str, content: bytes, on_bad_record: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"holds no record ({file}): {HOLDS}")):
        read(make_config("jsonl", path=str(file)), on_bad_record)


BAD_LINES = [
    (b'{"a": }', "broken JSON", "broken JSON: Expecting value: line 1 column 7 (char 6) ({file}:3)"),
    (b'{"a": 1} {"b": 2}', "broken JSON", "broken JSON: Extra data: line 1 column 10 (char 9) ({file}:3)"),
    (b"\0\0\0\0", "broken JSON", "broken JSON: Expecting value: line 1 column 1 (char 0) ({file}:3)"),
    (b'{"a": "x\0y"}', "broken JSON", "broken JSON: Invalid control character at: line 1 column 9 (char 8) ({file}:3)"),
    (b"[" * 100_000, "broken JSON", "broken JSON: maximum recursion depth exceeded"),
    (b"[1, 2]", "not an object", "not an object: found list ({file}:3)"),
    (b"null", "not an object", "not an object: found NoneType ({file}:3)"),
    (b'{"a": "caf\xe9"}', "not UTF-8", "not UTF-8: byte 0xe9 ({file}:3, byte {byte})"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason", "expected"), BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_bad_line_is_named_or_counted(
    tmp_path: Path, make_config: Make, line: bytes, reason: str, expected: str, newline: bytes
) -> None:
    file = tmp_path / "a.jsonl"
    first = json.dumps(GOOD | {"input": "é"}, ensure_ascii=False).encode()
    file.write_bytes(newline.join([first, b"", line, json.dumps(GOOD).encode(), b""]))
    place = len(first) + 2 * len(newline) + line.find(b"\xe9")
    config = make_config("jsonl", path=str(file))
    message = error_of(config)
    assert message.startswith(expected.format(file=file, byte=place))
    assert message.endswith(f": {MEND}")
    records, intake = read(config, "skip")
    assert [record.where for record in records] == [f"{file}:1", f"{file}:4"]
    assert (intake.read, intake.kept, dict(intake.dropped)) == (3, 2, {reason: 1})


def test_a_cut_last_line(tmp_path: Path, make_config: Make) -> None:
    file = tmp_path / "a.jsonl"
    line = json.dumps(GOOD)
    file.write_text(f"{line}\n{line[:-2]}", encoding="utf-8")
    assert error_of(make_config("jsonl", path=str(file))).startswith(
        f"broken JSON: Unterminated string starting at: line 1 column 51 (char 50) ({file}:2): "
    )
    file.write_text(f"{line}\n{line}", encoding="utf-8")  # only the line end is missing: a whole record
    assert len(read(make_config("jsonl", path=str(file)))[0]) == 2


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_the_byte_offset_is_the_files_own(tmp_path: Path, make_config: Make, bom: bytes, name: str) -> None:
    file = tmp_path / name
    content = bom + b'{"text": "\xc3\xa9 \xff"}'
    file.write_bytes(content)
    message = error_of(make_config("text", path=str(file)))
    line = ":1" if name == "a.jsonl" else ""
    assert message.startswith(f"not UTF-8: byte 0xff ({file}{line}, byte {content.index(0xFF)}): ")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "text é"), ("a.jsonl", '{"text": "text é"}\n'), ("a.json", '[{"text": "text é"}]')],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, make_config: Make, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [r.fields for r in read(make_config("text", path=str(file)))[0]] == [{"text": "text é"}]


def test_a_text_with_nul_bytes_is_no_text(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "a.txt").write_bytes("plain".encode("utf-16-le"))
    (tmp_path / "b.txt").write_bytes(b"plain")
    config = make_config("text", path=str(tmp_path))
    expected = f"NUL byte: the file is binary, or UTF-16 ({tmp_path / 'a.txt'}, byte 1): {MEND}"
    assert error_of(config) == expected
    records, intake = read(config, "skip")
    assert [r.fields for r in records] == [{"text": "plain"}]
    assert (intake.read, dict(intake.dropped)) == (2, {"NUL byte": 1})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}', "not a JSON list of records ({file}): use [{{...}}, ...] or .jsonl"),
        (b"7", "not a JSON list of records ({file}): use [{{...}}, ...] or .jsonl"),
        (b'[{"a": 1},', "not JSON: "),
        (b'[{"a": 1}]\n{"a": 2}\n', "not JSON: Extra data: line 2 column 1 (char 11) ({file}): mend it, or use one"),
        (b'{\n"a": 1}\n{"a": 2}\n', "not JSON: Extra data: line 3 column 1 (char 10) ({file}): mend it, or use one"),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ],
    ids=["object", "number", "cut", "lists", "several", "deep"],
)  # fmt: skip
def test_a_json_file_is_a_list(tmp_path: Path, make_config: Make, content: bytes, expected: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert error_of(make_config("jsonl", path=str(file))).startswith(expected.format(file=file))


@pytest.mark.parametrize("name", ["a.json", "c4-train.00000-of-01024.json.gz"])
@pytest.mark.parametrize("before", [b"", b"\n \r\n", "\ufeff".encode()], ids=["", "blank", "mark"])
def test_a_json_file_with_an_object_a_line(
    tmp_path: Path, make_config: Make, name: str, before: bytes
) -> None:
    file = tmp_path / name
    content = before + b'{"text": "one"}\n\n{"text": "two"}\nbroken\n'
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records, intake = read(make_config("text", path=str(file)), "skip")
    assert [record.fields["text"] for record in records] == ["one", "two"]
    assert (intake.read, dict(intake.dropped)) == (3, {"broken JSON": 1})


def test_items_of_a_json_list_are_counted_apart(tmp_path: Path, make_config: Make) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([GOOD, 3, GOOD, None]), encoding="utf-8")
    config = make_config("jsonl", path=str(file))
    assert error_of(config) == f"not an object: found int ({file}[2]): {MEND}"
    records, intake = read(config, "skip")
    assert [record.where for record in records] == [f"{file}[1]", f"{file}[3]"]
    assert (intake.read, intake.kept, dict(intake.dropped)) == (4, 2, {"not an object": 2})


def test_line_separators_inside_a_string_do_not_cut_it(tmp_path: Path, make_config: Make) -> None:
    rows = [{"text": "a\u2028b\u0085c\x0bd\re"}, {"text": "x" * 3_000_000}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    assert [r.fields for r in read(make_config("text", path=str(file)))[0]] == rows


def test_a_folder_that_looks_like_a_file(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "old.txt").mkdir()
    (tmp_path / "old.txt" / "b.txt").write_text("b")
    (tmp_path / "a.md").write_text("a")
    config = make_config("text", path=str(tmp_path))
    assert [r.fields["text"] for r in read(config)[0]] == ["a", "b"]
    assert len(config.content_key()) == 64


@pytest.mark.parametrize("use", ["content_key", "records"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, make_config: Make, use: str) -> None:
    link = tmp_path / "lost.jsonl"
    link.symlink_to(tmp_path / "nowhere")
    config = make_config("jsonl", path=str(tmp_path))
    expected = (
        f"cannot be read: No such file or directory ({link}): check that it is a file and its permissions"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        config.content_key() if use == "content_key" else read(config)


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_a_file_without_permission(
    tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / name
    file.write_text("x")
    config = make_config("jsonl", path=str(file))
    denied = PermissionError(13, "Permission denied")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:  # root may read everything, so it is feigned
        raise denied

    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(config).startswith(f"cannot be read: Permission denied ({file})")


def test_hidden_files_and_folders_are_no_data(tmp_path: Path, make_config: Make) -> None:
    for name in ("a.txt", ".b.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [r.fields["text"] for r in read(make_config("text", path=str(tmp_path)))[0]] == ["a.txt"]


def test_folders_and_globs_come_in_order(tmp_path: Path, make_config: Make) -> None:
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/A.TXT", "10.txt", "9.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def texts(path: str) -> list[str]:
        return [r.fields["text"] for r in read(make_config("text", path=path))[0]]

    assert texts(str(tmp_path)) == ["10.txt", "9.txt", "a.txt", "b.txt", "sub/A.TXT", "sub/c.md"]
    assert texts(f"{tmp_path}/*.txt") == ["10.txt", "9.txt", "a.txt", "b.txt"]
    assert texts(f"{tmp_path}/**/*.md") == ["sub/c.md"]
    (tmp_path / "x[1].txt").write_text("a name, not a pattern")
    assert texts(f"{tmp_path}/x[1].txt") == ["a name, not a pattern"]


def test_the_content_key_follows_the_content_alone(tmp_path: Path, make_config: Make) -> None:
    def key(folder: str) -> str:
        return make_config("jsonl", path=str(tmp_path / folder)).content_key()

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("abc")
        (tmp_path / folder / "b.txt").write_text("def")
    os.utime(tmp_path / "two" / "a.txt", (1, 1))
    first = key("one")
    assert key("two") == first
    (tmp_path / "two" / "b.txt").write_text("deg")
    assert key("two") != first
    (tmp_path / "two" / "b.txt").write_text("def")
    assert key("two") == first
    (tmp_path / "two" / "a.txt").write_text("abcd")
    (tmp_path / "two" / "b.txt").write_text("ef")  # the same bytes, parted elsewhere
    assert key("two") != first


@pytest.mark.parametrize(
    ("found", "columns", "expected"),
    [
        (["instruction", "input", "output", "text"], {}, "triples"),
        (["q", "a"], {"instruction": "q", "output": "a"}, "triples"),
        (["messages", "text"], {}, "messages"),
        (["id", "conversations"], {}, "messages"),
        (["chat"], {"messages": "chat"}, "messages"),
        (["prompt", "completion"], {}, "completion"),
        (["text", "label"], {"prompt": "text", "completion": "label"}, "completion"),
        (["id", "text"], {}, "text"),
        (["body"], {"text": "body"}, "text"),
        (["prompt"], {}, "triples"),
    ],
)
def test_format_auto(
    tmp_path: Path, make_config: Make, found: list[str], columns: dict[str, str], expected: str
) -> None:
    config = make_config("jsonl", path=str(tmp_path / "a.jsonl"), columns=columns)
    assert guess_format(found, config.columns) == expected
    (tmp_path / "a.jsonl").write_text("not JSON\n" + json.dumps(dict.fromkeys(found, "x")))
    assert config.format_for("sft") == expected


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_a_hub_data_set_from_a_local_directory(tmp_path: Path, make_config: Make, layout: str) -> None:
    rows = [{"q": f"q{i} é", "a": f"a{i}"} for i in range(4)]
    folder = tmp_path / "set"
    folder.mkdir()
    if layout == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    columns = {"instruction": "q", "output": "a"}
    keys = {"name": str(folder), "config_name": None, "split": "train", "revision": None, "columns": columns}
    keys |= {"streaming": False, "max_records": None}
    config = make_config("hub", **keys)
    records, intake = read(config)
    assert [record.fields for record in records] == rows
    assert records[2].where == f"{folder}:train:2"
    assert read(make_config("hub", **keys | {"streaming": True}))[0] == records
    assert read(make_config("hub", **keys | {"streaming": True, "max_records": 3}))[0] == records[:3]
    assert read(make_config("hub", **keys | {"max_records": 3}))[0] == records[:3]
    assert intake.read == 4
    assert config.format_for("sft") == "triples"
    key = config.content_key()
    assert config.content_key() == key
    if layout == "jsonl":
        (folder / "train.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
        assert make_config("hub", **keys).content_key() != key


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_data_set_that_is_not_there(tmp_path: Path, make_config: Make) -> None:
    name = str(tmp_path / "none")
    keys = {"config_name": None, "split": "train", "revision": None, "max_records": None}
    for given, streaming in (
        (name, False),
        (name, True),
        ("lmlab-tests/none", False),
        ("lmlab-tests/none", True),
    ):
        message = error_of(make_config("hub", name=given, streaming=streaming, **keys))
        assert message.startswith(f"data set '{given}' cannot be loaded: ")
        assert message.endswith("(data.name): check name, split and network, or give a local directory")


def test_the_embedded_corpora_count_what_they_give(make_config: Make) -> None:
    records, intake = read(make_config("skills", level=1, num_records=50, data_seed=0))
    assert len(records) == intake.read == intake.kept == 50
    keys = {
        make_config("skills", level=level, num_records=n, data_seed=seed).content_key()
        for level, n, seed in [(1, 50, 0), (2, 50, 0), (1, 51, 0), (1, 50, 1)]
    }
    assert len(keys) == 4
