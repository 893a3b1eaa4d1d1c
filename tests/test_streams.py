"""What a run prints is not what it dies of: a reader that is gone, a full disk, a stream that is closed or not UTF-8."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lmlab.worker import patient_streams

LONG = "x" * 10_000
"""More than a stream's buffer holds."""


def a_pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def a_terminal_that_is_gone() -> int:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    leader, follower = pty.openpty()
    os.close(leader)
    return follower


@pytest.mark.parametrize("opened", [a_pipe_without_reader, a_terminal_that_is_gone])
def test_what_nobody_reads_is_dropped_without_a_word(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with os.fdopen(opened(), "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with patient_streams():
            for _ in range(3):
                print(LONG, flush=True)
                Console().print("of rich")
        assert sys.stdout is stream
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with patient_streams():
            for _ in range(3):
                print(LONG, flush=True)
                Console().print("of rich")
        stream.flush()  # what the process does at its end, with exit code 120 where that fails
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: what is printed cannot be written (No space left on device)")


def test_a_character_that_a_stream_does_not_have_is_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    with patient_streams():
        print("caf\u00e9 \u2603", flush=True)
    assert held.getvalue() == b"caf\\xe9 \\u2603\n"


def test_a_closed_stream_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with patient_streams():
        print("for nobody")
        Console().print("of rich")
        assert sys.stdout is None
