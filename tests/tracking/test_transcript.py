"""What a run prints, on terminals of several widths, in a pipe and in console.log: readable, whole, and without control characters where they do not belong."""

from __future__ import annotations

import builtins
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lmlab.tracking.transcript import LEAST, LOG, NAMES, Transcript, note, print_rows, print_words

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ROWS = [
    ("model", "tiny: 3,553,728 parameters, 331,776 trained (9.34%)"),
    ("data", "skills as triples: 5,704 + 296 validation records, 215,834 tokens, 11% trained"),
    ("output", "outputs/sft/a-name-that-is-rather-long-because-it-tells-all-overrides-of-the-run"),
]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing about colours or widths."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def transcript(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Transcript, io.StringIO]]]:
    """``transcript(title)`` in `tmp_path`, its screen a pipe; and what the pipe got."""
    made: list[Transcript] = []

    def make(title: str = "") -> tuple[Transcript, io.StringIO]:
        pipe = io.StringIO()
        monkeypatch.setattr(sys, "stdout", pipe)
        made.append(Transcript(tmp_path, title=title))
        return made[-1], pipe

    yield make
    for each in made:
        each.close()


def logged(folder: Path) -> list[str]:
    return (folder / LOG).read_text(encoding="utf-8").splitlines()


def on_terminal(width: int, draw: Callable[[Console], None]) -> list[str]:
    stream = io.StringIO()
    draw(Console(file=stream, width=width, force_terminal=True))
    return ESCAPE.sub("", stream.getvalue()).splitlines()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_no_width_cuts_a_word_or_a_number(width: int) -> None:
    lines = on_terminal(width, lambda console: print_rows(console, ROWS))
    words = [word for line in lines for word in line.split()]
    assert words == [word for name, value in ROWS for word in (name, *value.split())]
    assert all(len(line) <= width or len(line.split()) <= 2 for line in lines)
    assert all(line == line.rstrip() for line in lines)
    stacked = width - NAMES < LEAST
    assert (lines[0] == "model") == stacked


@pytest.mark.parametrize("width", [40, 60])
def test_figures_stay_beside_their_names(width: int) -> None:
    text = "step 20/20  val/loss 4.6445  val/perplexity 104.0101  val/bits_per_byte 3.7978  val/exact_match 0.0200"
    lines = on_terminal(width, lambda console: print_words(console, text, indent=2))
    assert len(lines) > 1
    assert all(len(line) <= width for line in lines)
    assert [piece.strip() for line in lines for piece in line.strip().split("  ")] == text.split("  ")
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_pipe_gets_whole_lines_and_no_control_characters(
    transcript: Callable[..., tuple[Transcript, io.StringIO]], tmp_path: Path
) -> None:
    made, pipe = transcript("train.py seed=1")
    made.rows(ROWS)
    made.say("a line " + "of many words " * 30, style="bold red")
    made.say("[bold]no markup[/] \x1b[31m\r\x07")
    with made.waiting("waiting"), made.live():
        assert not made.is_live
    shown = pipe.getvalue().splitlines()
    assert shown[:3] == [f"{name.ljust(NAMES)}{value}" for name, value in ROWS]
    assert len(shown) == 5
    assert shown[4] == "[bold]no markup[/] ␛[31m␍␇"
    first, *rest = logged(tmp_path)
    assert re.fullmatch(r"# \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  train.py seed=1", first)
    assert rest == shown


@pytest.mark.parametrize("colour", ["FORCE_COLOR", "NO_COLOR"])
def test_colours_as_rich_has_them_and_never_in_the_file(
    transcript: Callable[..., tuple[Transcript, io.StringIO]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    colour: str,
) -> None:
    monkeypatch.setenv(colour, "1")
    made, pipe = transcript()
    made.say("finished", style="green")
    assert ("\x1b[32m" in pipe.getvalue()) == (colour == "FORCE_COLOR")
    assert not made.is_live, "a forced colour makes no terminal of a pipe"
    assert logged(tmp_path)[1:] == ["finished"]


def test_in_jupyter_it_goes_to_stdout_and_to_the_file(
    transcript: Callable[..., tuple[Transcript, io.StringIO]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich would send both to the notebook, past a redirected stdout and past the file."""
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    assert Console().is_jupyter
    made, pipe = transcript()
    made.say("one")
    made.close()
    assert pipe.getvalue() == "one\n"
    assert logged(tmp_path)[1:] == ["one"]


def test_stderr_is_in_the_file_too_and_given_back(
    transcript: Callable[..., tuple[Transcript, io.StringIO]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sys.stderr
    made, pipe = transcript()
    made.say("one")
    print("warning: \x1b[31mtwo", file=sys.stderr)
    made.say("three")
    made.close()
    assert sys.stderr is before
    print("four", file=sys.stderr)
    assert logged(tmp_path)[1:] == ["one", "warning: ␛[31mtwo", "three"]
    assert capsys.readouterr().err == "warning: \x1b[31mtwo\nfour\n"
    assert pipe.getvalue() == "one\nthree\n"


def test_a_second_start_goes_on_in_the_file(
    transcript: Callable[..., tuple[Transcript, io.StringIO]], tmp_path: Path
) -> None:
    for title in ("train.py", "train.py resume=auto"):
        made, _ = transcript(title)
        made.say(f"this is {title}")
        made.close()
    note(tmp_path, "error: rank 1 ended with exit code 1")
    assert [line.partition("  ")[2] or line for line in logged(tmp_path)] == [
        "train.py", "this is train.py", "train.py resume=auto", "this is train.py resume=auto",
        "error: rank 1 ended with exit code 1",
    ]  # fmt: skip


def test_where_stdout_is_that_file_nothing_is_written_twice(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a multirun; FORCE_COLOR of the one who started it must not colour its log."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / LOG).open("a", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        made = Transcript(tmp_path, title="train.py")
        made.say("once", style="red")
        note(tmp_path, "said before")
        made.close()
    assert logged(tmp_path) == ["once"]


def test_other_ranks_have_no_file(tmp_path: Path, plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    made = Transcript(None)
    print("of rank 1", file=sys.stderr)
    made.close()
    assert capsys.readouterr().err == "of rank 1\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_one_line_and_no_run(
    transcript: Callable[..., tuple[Transcript, io.StringIO]], tmp_path: Path
) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    made, pipe = transcript()
    made.say("one")
    made.say("two")
    made.close()
    assert pipe.getvalue().splitlines() == [
        f"warning: {LOG} cannot be written (No space left on device)",
        "one",
        "two",
    ]


def test_on_a_real_terminal_it_is_live_unless_that_is_dumb(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal, os.fdopen(leader, "rb"):
        monkeypatch.setattr(sys, "stdout", terminal)
        for term, is_live in (("xterm-256color", True), ("dumb", False)):
            monkeypatch.setenv("TERM", term)
            made = Transcript(tmp_path)
            assert made.is_live == is_live
            made.close()
        other = Transcript(None)
        assert not other.is_live, "one rank draws"
