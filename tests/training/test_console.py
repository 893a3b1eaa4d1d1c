"""The progress of a run: a bar that fits its terminal, plain lines in a pipe and in console.log."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
from rich.console import Console

from lmlab.tracking.transcript import LOG, Transcript
from lmlab.training.console import BAR, Bar, Progress

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FIGURES = ("loss 3.1416", "12,345 tokens/s", "lr 1.00e-03", "3 min 05 s left")


def values(loss: float) -> dict[str, float]:
    return {"train/loss": loss, "perf/tokens_per_second": 1234.5, "train/lr": 1e-3}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize("width", [15, 25, 40, 60, 80, 120, 200])
def test_the_bar_leaves_out_whole_figures(width: int) -> None:
    stream = io.StringIO()
    bar = Bar(200, 0)
    bar.show(50, *FIGURES)
    Console(file=stream, width=width, force_terminal=True).print(bar)
    (line,) = ESCAPE.sub("", stream.getvalue()).splitlines()
    assert len(line) < width
    head, *parts = re.split(r"  +", line)
    assert head == "step 50/200"
    drawn = [part for part in parts if set(part) <= set("━╌")]
    assert [part for part in parts if part not in drawn] == [f for f in FIGURES if f in parts]
    assert all(BAR[0] <= len(part) <= BAR[1] and part.count("━") == round(len(part) / 4) for part in drawn)
    if width >= 40:
        assert FIGURES[0] in parts
        assert FIGURES[3] in parts or width < 60
    if width >= 80:
        assert drawn
        assert {*FIGURES[:2], FIGURES[3]} <= set(parts)
    if width >= 120:
        assert FIGURES[2] in parts


def test_plain_lines_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    transcript = Transcript(tmp_path)
    progress = Progress(transcript, max_steps=4, active=True)
    progress.validated(0, {"val/loss": 9.0, "memory/rss_gb": 1.0})
    progress.start(0)
    for step in range(1, 5):
        progress.advance(step)
        progress.step(step, values(9.0 - step))
    progress.validated(4, {"val/loss": 4.5, "val/perplexity": 90.0})
    progress.stop()
    transcript.close()
    shown = pipe.getvalue().splitlines()
    assert shown[0] == "step 0/4  val/loss 9.0000"
    assert re.fullmatch(r"step 1/4  loss 8\.0000  1,234 tokens/s  lr 1\.00e-03  \d+ s left", shown[1])
    assert shown[2:] == [
        "step 4/4  loss 5.0000  1,234 tokens/s  lr 1.00e-03",
        "step 4/4  val/loss 4.5000  val/perplexity 90.0000",
    ], "steps within five seconds make no line"
    assert (tmp_path / LOG).read_text(encoding="utf-8").splitlines()[1:] == shown
    assert not set(pipe.getvalue()) & {"\r", "\x1b"}


def test_what_a_run_that_ends_early_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    progress = Progress(Transcript(None), max_steps=100, active=True)
    progress.start(10)
    progress.step(11, values(3.0))
    progress.step(12, values(2.0))
    progress.stop()
    progress.stop()
    assert [line.split("  ")[0] for line in pipe.getvalue().splitlines()] == ["step 11/100", "step 12/100"]


def test_only_the_first_rank_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    progress = Progress(Transcript(None), max_steps=4, active=False)
    progress.start(0)
    progress.step(1, values(3.0))
    progress.validated(4, {"val/loss": 1.0})
    progress.stop()
    assert pipe.getvalue() == ""


@pytest.mark.parametrize("width", [40, 100])
def test_on_a_terminal_of_that_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    got = bytearray()

    def read() -> None:
        try:
            while data := os.read(leader, 4096):
                got.extend(data)
        except OSError:  # the terminal is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        transcript = Transcript(tmp_path)
        transcript.screen.size = (width, 40)  # type: ignore[assignment]
        progress = Progress(transcript, max_steps=4, active=True)
        progress.start(0)
        for step in (1, 2):
            progress.advance(step)
            progress.step(step, values(9.0 - step))
        progress.validated(2, {"val/loss": 5.0, "val/perplexity": 148.4132, "val/bits_per_byte": 3.7978})
        progress.stop()
        transcript.close()
    reader.join(timeout=10)
    os.close(leader)
    shown = got.decode("utf-8")
    lines = [line.rstrip("\r") for line in ESCAPE.sub("", shown).split("\n")]
    assert "step 2/4" in shown
    assert "loss 7.0000" in shown
    assert "val/perplexity 148.4132" in shown
    assert all(len(piece) <= width for line in lines for piece in line.split("\r"))
    log = (tmp_path / LOG).read_text(encoding="utf-8").splitlines()
    assert [line.split("  ")[:2] for line in log[1:]] == [
        ["step 1/4", "loss 8.0000"],
        ["step 2/4", "loss 7.0000"],
        ["step 2/4", "val/loss 5.0000"],
    ]
    assert not set("".join(log)) & {"\r", "\x1b"}
