"""Prompts from files and standard input; whatever is wrong is named by its line."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from lmlab.chat.prompts import read_prompts
from lmlab.records import UserError


def test_one_a_line_blank_lines_apart(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufefffirst\r\n\n  second  \nthird\u2028still third".encode())
    asked = read_prompts(["given"], str(file))
    assert [one.text for one in asked] == ["given", "first", "  second  ", "third\u2028still third"]
    assert [one.where for one in asked] == ["--prompt", f"{file}:1", f"{file}:3", f"{file}:4"]


def test_json_lines_keep_their_other_fields(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\nb", "id": 7, "system": "be brief"}\n{"prompt": "{"}\n', encoding="utf-8")
    first, second = read_prompts([], str(file))
    assert (first.text, first.system, first.carried) == ("a\nb", "be brief", {"id": 7})
    assert (second.text, second.system, second.carried) == ("{", None, {})


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("één\ntwee\n".encode())))
    assert [(one.text, one.where) for one in read_prompts([], "-")] == [
        ("één", "standard input:1"),
        ("twee", "standard input:2"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ":2", "not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', ":3", "no text field prompt"),
        ("p.jsonl", b'{"prompt": 3}\n', ":1", "no text field prompt"),
        ("p.jsonl", b"[1]\n", ":1", "no text field prompt"),
        ("p.jsonl", b"[" * 100_000, ":1", "not JSON"),
        ("p.jsonl", b'{"prompt": "a", "system": 1}\n', ":1", "system is no text"),
        ("p.txt", b"good\nb\xff\n", ":2", "not UTF-8"),
        ("p.txt", b"\n  \n", "", "no prompt in it"),
        ("p.txt", None, "", "prompts cannot be read: No such file"),
    ],
)
def test_a_broken_file_names_its_line(
    tmp_path: Path, name: str, content: bytes | None, line: str, what: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts([], str(file))
    assert caught.value.where == f"{file}{line}"
    assert what in caught.value.what


def test_no_prompt_at_all() -> None:
    with pytest.raises(UserError, match="no prompt"):
        read_prompts([], None)
