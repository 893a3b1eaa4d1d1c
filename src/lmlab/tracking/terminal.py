"""The data report and the mask preview on the terminal, before the first step: short, and safe whatever the data holds.

Nothing of the data is taken for markup or obeyed by the terminal. Without colour (NO_COLOR, a pipe, a file) trained text
stands between marks; where the stream cannot carry them (not UTF-8), marks, histogram and texts are plain ASCII.
"""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from lmlab.tracking.data_view import CLOSE, OPEN, DataView, Lengths, Shown
from lmlab.tracking.plots import short
from lmlab.tracking.transcript import print_rows, print_words
from lmlab.tracking.values import counted, shown, writable

EXAMPLES = 2
"""Examples on the terminal; the files have all."""
MAX_LINES = 6
"""Lines of one example; a long span gives up its middle, so that where training begins and ends stays in view."""
MAX_DETAIL = 80
"""Characters of what is said about a dropped record."""
MAX_WIDTH = 110
"""Columns beyond which running text is hard to read."""
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
TRAINED, UNTRAINED = "bold green", "dim"


def print_data(
    console: Console, report: dict[str, Any], examples: Any, *, masked: bool, preview: str
) -> None:
    """Print the data block.

    Args:
        report: data_report.json's object.
        examples: mask_preview.json's list.
        masked: whether a part of the records is not to be trained (task=sft).
        preview: where all examples are, for the reader.
    """
    page = _Page(console)
    view = DataView.of(report, examples)
    print_rows(console, [(name, page.plain(value)) for name, value in _rows(view, page)])
    for warning in view.warnings(masked=masked):
        print_words(console, f"warning: {warning}", style="yellow")
    if view.examples:
        page.examples(view.examples, preview)


class _Page:
    """What this console can show, and the examples in that form."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.coloured = console.is_terminal and not console.no_color and console.color_system is not None
        self.unicode = _carries(console.encoding, OPEN + CLOSE + BLOCKS + "…│↵")
        self.ellipsis, self.bar, self.newline = ("…", "│ ", "↵") if self.unicode else ("...", "| ", "\\n")
        self.opening, self.closing = (OPEN, CLOSE) if self.unicode else ("[[", "]]")
        self.width = max(20, min(console.width, MAX_WIDTH) - len(self.bar) - 2)

    def plain(self, text: str) -> str:
        """The text as this console can carry it."""
        return writable(text.expandtabs(4), self.console.encoding)

    def blocks(self, lengths: Lengths) -> str:
        """A histogram in one line; a bin that holds anything shows."""
        levels = BLOCKS if self.unicode else ASCII_BLOCKS
        most = max(lengths.counts)
        return "".join(levels[math.ceil(count / most * (len(levels) - 1))] for count in lengths.counts)

    def examples(self, shown: tuple[Shown, ...], preview: str) -> None:
        """The first examples, and where all of them are."""
        title = Text.assemble(("what is trained: ", "bold"))
        if self.coloured:
            title.append_text(Text.assemble(("this text", TRAINED), (", not this", UNTRAINED)))
        else:
            title.append(f"the text between {self.opening} and {self.closing}")
        rest = len(shown) - EXAMPLES
        title.append(
            self.plain(f" ({counted(rest, 'more example')} in {preview})" if rest > 0 else f" ({preview})")
        )
        self.console.print(title, soft_wrap=True)  # a path is for copying: never broken
        for example in shown[:EXAMPLES]:
            self.console.print(Text(self.plain(f"  {example.where}: {example.about}"), overflow="fold"))
            for line in self.lines(example):
                line = Text.assemble("  ", (self.bar, UNTRAINED), line)
                self.console.print(line, no_wrap=True, overflow="ignore", crop=False)

    def lines(self, example: Shown) -> list[Text]:
        """The example's text, wrapped and at most `MAX_LINES` long."""
        spans = [(self.plain(text), trained) for text, trained in example.merged]
        lines = self._wrapped(spans)
        if len(lines) > MAX_LINES:
            # A line end at a span's end takes no line of its own: what follows begins there.
            bodies = [text.rstrip("\n") for text, _ in spans]
            needs = [len(self._wrapped([(body, False)])) for body in bodies]
            shares = zip(spans, bodies, needs, _shares(needs, MAX_LINES), strict=True)
            spans = [
                (self._clipped(body, given, len(spans)) + text[len(body) :][:1], trained)
                if need > given
                else (text, trained)
                for (text, trained), body, need, given in shares
            ]
            lines = self._wrapped(spans)
        if len(lines) > MAX_LINES:
            left = counted(len(lines) - MAX_LINES + 1, "more line")
            lines = [*lines[: MAX_LINES - 1], Text(f"{self.ellipsis} {left}", UNTRAINED)]
        return lines

    def _wrapped(self, spans: list[tuple[str, bool]]) -> list[Text]:
        whole = Text()
        for text, trained in spans:
            if self.coloured:
                whole.append(text, TRAINED if trained else UNTRAINED)
            else:
                whole.append(f"{self.opening}{text}{self.closing}" if trained else text)
        return list(whole.wrap(self.console, self.width, overflow="fold"))

    def _clipped(self, text: str, given: int, num_spans: int) -> str:
        """The beginning and the end of a span that gets fewer lines than it needs."""
        if given < 2:  # no line of its own: it shares a line, or the lines, with the others
            room = max(16, min(self.width - 6, self.width * MAX_LINES // num_spans - 4))
            flat = text.replace("\n", self.newline)
            half = (room - len(self.ellipsis)) // 2
            return flat if len(flat) <= room else f"{flat[:half]}{self.ellipsis}{flat[-half:]}"
        lines = [line.plain for line in self._wrapped([(text, False)])]
        head = math.ceil(given / 2)
        cut = lines[head - 1][: self.width - len(self.ellipsis)] + self.ellipsis
        return "\n".join([*lines[: head - 1], cut, *lines[len(lines) - (given - head) :]])


def _carries(encoding: str, characters: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _shares(needs: list[int], total: int) -> list[int]:
    """Lines for each span: one at least, and what is left goes to the one that has the least of what it needs."""
    given = [1] * len(needs)
    while sum(given) < total and (wanting := [i for i, need in enumerate(needs) if given[i] < need]):
        given[min(wanting, key=lambda i: given[i])] += 1
    return given


def _rows(view: DataView, page: _Page) -> list[tuple[str, str]]:
    """The counts as (name, text)."""
    rows = []
    read, kept, truncated = (view.count(f"records_{name}") for name in ("read", "kept", "truncated"))
    if read is not None:
        parts = [f"{read:,} read", f"{kept or 0:,} kept", f"{view.total_dropped:,} dropped"]
        share = view.share("records_truncated", "records_kept")
        cut = f" ({share:.1%})" if truncated and share else ""
        rows.append(("records", ", ".join([*parts, f"{truncated or 0:,} truncated{cut}"])))
    for each in view.dropped:
        detail = f": {each.detail[:MAX_DETAIL]}" if each.detail else ""
        first = f" (first: {each.where}{detail})" if each.where else ""
        rows.append(("dropped", f"{each.count:,} {each.reason}{first}"))
    if (share := view.share("supervised_tokens", "tokens")) is not None:
        tokens = (
            f"{view.count('tokens'):,}, {view.count('supervised_tokens'):,} of them trained ({share:.1%})"
        )
        rows.append(("tokens", tokens))
    for source in view.sources:
        weight, kept, tokens = (source.get(name) for name in ("weight", "records_kept", "tokens"))
        rows.append(
            (
                "source",
                f"{source.get('name', '')}: weight {shown(weight)}, {shown(kept)} records, {shown(tokens)} tokens",
            )
        )
    fill = view.figures.get("fill")
    if fill is not None:
        rows.append(("packed", f"{view.count('rows/train') or 0:,} rows, {fill:.1%} full"))
    return rows + _length_rows(view, page)


def _length_rows(view: DataView, page: _Page) -> list[tuple[str, str]]:
    rows, name = [], "tokens_per_record"
    low, middle, high = (view.figures.get(f"{name}/{each}") for each in ("shortest", "median", "longest"))
    if low is not None and middle is not None and high is not None:
        spread = f"{short(low)} to {short(high)} tokens, median {short(middle)}"
        rows.append(("lengths", spread if low < high else f"{short(low)} tokens each"))
        if view.lengths and low < high:
            rows.append(("", f"{short(low)} {page.blocks(view.lengths)} {short(high)}"))
    for each in view.extremes if low != high else ():
        rows.append((each.name, f"{each.tokens:,} tokens: {each.where}"))
    return rows
