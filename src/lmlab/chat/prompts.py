"""Prompts from the command line, a file or standard input, each with the place it came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmlab.records import UserError

FIX = "one prompt a line, or .jsonl with a text field prompt on every line"


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        where: its file and line, or the option it was given by.
        system: its own system message, None for the command line's.
        carried: the other fields of its line (an id, a reference answer), which go into the output line.
    """

    text: str
    where: str
    system: str | None = None
    carried: dict[str, Any] = field(default_factory=dict)


def read_prompts(prompts: Sequence[str], file: str | None) -> list[Asked]:
    """Those given one by one, then those of ``file`` (``-``: standard input, one a line).

    Raises:
        UserError: there are none, a file that cannot be read, or a broken line, which is named.
    """
    asked = [Asked(text, "--prompt") for text in prompts]
    if file is not None:
        name = "standard input" if file == "-" else file
        asked += _of_lines(name, _read(file), is_json=file.endswith(".jsonl"))
        if not asked:
            raise UserError("no prompt in it", where=name, fix=FIX)
    if not asked:
        raise UserError(
            "no prompt",
            where="--prompt",
            fix="give --prompt '...', --prompts-file FILE or - for standard input",
        )
    return asked


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"prompts cannot be read: {error.strerror}", where=file, fix=FIX) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError("not UTF-8", where=f"{file}:{line}", fix="save the file as UTF-8") from error


def _of_lines(name: str, text: str, *, is_json: bool) -> Iterator[Asked]:
    # Split at \n only: str.splitlines would also cut at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            where = f"{name}:{number}"
            yield _of_json(line, where) if is_json else Asked(line, where)


def _of_json(line: str, where: str) -> Asked:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("not JSON", where=where, fix=FIX) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError("no text field prompt", where=where, fix=FIX)
    system = row.pop("system", None)
    if not isinstance(system, str | None):
        raise UserError("system is no text", where=where, fix="write it as a text, or leave it out")
    return Asked(row.pop("prompt"), where, system, row)
