"""Rows of figures as a table, or where a terminal is too narrow for whole numbers as a list."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmlab.tracking.transcript import print_words
from lmlab.tracking.values import writable

NAME = 16
"""Columns that the first column has at least; a longer name is folded."""
GAP = 3
"""Columns between two, with a box."""


def print_figures(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    box: Box | None = None,
    words: int = 1,
    bold: int | None = None,
) -> None:
    """Print them; a figure is never cut, headings break between words, a first column between any two characters.

    Args:
        headings: of all columns.
        rows: as many texts each.
        words: how many columns at the left hold words.
        bold: the row that stands out.
    """
    title, *headings = (writable(text, console.encoding) for text in (title, *headings))
    rows = [[writable(cell, console.encoding) for cell in row] for row in rows]
    least = [max([cell_len(row[at]) for row in rows], default=0) for at in range(len(headings))]
    least[0] = min(least[0], NAME)
    parts = [max([0, *map(cell_len, heading.split())]) for heading in headings]
    least = [max(pair) for pair in zip(least, parts, strict=True)]
    gap = GAP if box is not None else 1
    if sum(least) + gap * len(headings) > console.width:
        _list(console, title, headings, rows)
        return
    about = Text(title, style="italic")
    table = Table(title=about, title_justify="left", box=box, pad_edge=box is not None)
    if box is None:
        table.padding = (0, 1, 0, 0)
    for at, heading in enumerate(headings):
        justify = "left" if at < words else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold", min_width=least[at])
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style="bold" if number == bold else None)
    console.print(table, highlight=False)


def _list(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row under its name, heading and figure together."""
    print_words(console, title, style="italic")
    for name, *cells in rows:
        print_words(console, name or title, style="bold", indent=2)
        figures = [f"{heading} {cell}" for heading, cell in zip(headings[1:], cells, strict=True) if cell]
        print_words(console, "  " + "  ".join(figures), indent=2)
