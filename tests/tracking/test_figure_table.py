"""Rows of figures: a table where it fits, else a list, and never a number in two parts."""

from __future__ import annotations

import io

import pytest
from rich.box import SIMPLE
from rich.console import Console

from lmlab.tracking.figure_table import print_figures

HEADINGS = ("job", "status", "val/loss", "trained", "peak GB", "tok/s")
ROWS = [
    ["adapter=none seed=1", "finished", "0.1365", "3,221,952", "0.71", "7,601"],
    ["adapter=lora seed=1 and a name that is long", "refused", "", "", "", ""],
]


@pytest.mark.parametrize("box", [None, SIMPLE])
@pytest.mark.parametrize("width", [20, 40, 60, 70, 80, 120])
def test_every_figure_stays_whole(width: int, box: object) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    print_figures(console, "jobs", HEADINGS, ROWS, box=box, words=2)  # type: ignore[arg-type]
    shown = stream.getvalue()
    words = shown.split()
    for figure in ("0.1365", "3,221,952", "0.71", "7,601", "finished", "refused"):
        assert figure in words, shown
    assert all(heading.split()[0] in words for heading in HEADINGS[2:]), shown
    is_table = "job" in words
    assert is_table == (width >= 80) or width in (60, 70)
    if width >= 30:
        assert all(len(line.rstrip()) <= width for line in shown.splitlines()), shown


def test_a_list_has_each_figure_beside_its_heading() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=40, force_terminal=True, color_system=None)
    print_figures(console, "jobs", HEADINGS, ROWS, words=2)
    assert stream.getvalue().splitlines() == [
        "jobs",
        "adapter=none seed=1",
        "  status finished  val/loss 0.1365",
        "  trained 3,221,952  peak GB 0.71",
        "  tok/s 7,601",
        "adapter=lora seed=1 and a name that is",
        "  long",
        "  status refused",
    ]


def test_a_stream_that_is_not_utf_8_gets_escapes() -> None:
    held = io.BytesIO()
    console = Console(file=io.TextIOWrapper(held, encoding="ascii"), width=80)
    print_figures(console, "caf\u00e9", ("text", "rate"), [["fr\u0119", "\u2013"]], box=SIMPLE)
    console.file.flush()
    words = held.getvalue().decode("ascii").split()
    assert {"caf\\xe9", "fr\\u0119", "\\u2013"} <= set(words)
