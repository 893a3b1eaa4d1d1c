"""10,000 damaged JSONL files through the reader: one error line, or counted skips; no traceback, no record lost unseen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.records import UserError

from .broken_files import config_for, delivered

FILES = 10_000
ROWS = [
    {"instruction": f"Name {i}.", "input": "", "output": f"It is {i}, é, \U0001f600, \u2028 now."}
    for i in range(8)
]


def whole() -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def doubled(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    piece = content[start : start + draw.randint(1, 80)]
    return content[:start] + piece + content[start:]


def without(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randint(1, 80) :]


def with_bytes(content: bytes, draw: random.Random) -> bytes:
    odd = (
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\r",
        b"\x1a",
        b"\xef\xbb\xbf",
        b"NaN",
        b'"',
        b"}{",
        b"\n",
    )
    place = draw.randrange(len(content))
    return content[:place] + draw.choice(odd) + content[place:]


def retyped(content: bytes, draw: random.Random) -> bytes:
    rows: list[object] = [dict(row) for row in ROWS]
    for _ in range(draw.randint(1, 3)):
        value = draw.choice(
            [None, 3, 2.5, True, [], {}, [1], {"a": 1}, "", "\ud800", "x" * 5000, float("nan")]
        )
        place = draw.randrange(len(rows))
        row = rows[place]
        if isinstance(row, dict) and draw.random() < 0.7:
            row[draw.choice(["instruction", "input", "output", "other"])] = value
        else:
            rows[place] = value
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    cut,
    flipped,
    doubled,
    without,
    with_bytes,
    retyped,
]


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))])
def test_no_file_gets_through_unseen(tmp_path: Path, part: int) -> None:
    file = tmp_path / "rows.jsonl"
    strict, lenient = config_for(file), config_for(file, "skip")
    outcomes = {"good": 0, "refused": 0, "skipped": 0}
    for index in range(FILES // 10):
        draw = random.Random(part * FILES + index)
        content = draw.choice(MUTATIONS)(whole(), draw)
        if draw.random() < 0.2:
            content = draw.choice(MUTATIONS)(content or b"\n", draw)
        file.write_bytes(content)
        line, strict_count = "", -1
        try:
            strict_count, strict_intake = delivered(strict)
        except UserError as error:
            line = str(error)
        else:
            assert strict_intake.dropped.total() == 0
        outcomes["refused" if line else "good"] += 1
        assert not line or (str(file) in line and "\n" not in line)
        try:
            count, intake = delivered(lenient)
        except UserError:
            assert strict_count == -1, "refused when skipping is asked for, but not without"
            continue
        assert intake.read == count + intake.dropped.total()
        assert strict_count in (-1, count)
        if strict_count == -1:
            assert intake.dropped.total() > 0, f"a bad record was neither told nor counted: {content!r}"
            outcomes["skipped"] += 1
    assert min(outcomes.values()) > FILES // 200, outcomes
