"""What a run prints, twice: for who is watching, and in its directory as console.log for who comes later.

On a terminal text is wrapped between words, so that no number is cut; in a pipe and in the file a line stays a line.
Colour follows NO_COLOR, FORCE_COLOR and TERM as in rich; the file never holds a control character. What the process
says on stderr (warnings, errors, tracebacks) is in the file too, in its order.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from lmlab.tracking.values import writable

WIDTH = 120
"""Columns of what is not a terminal: a pipe and a file have no narrow screen."""
NAMES = 12
"""Columns of the names at least, so that the tables of a run stand under one another."""
LEAST = 24
"""Columns below which a value gets lines of its own, under its name."""
LOG = "console.log"

Rows = Sequence[tuple[str, str]]


class Transcript:
    """The console of one process of a run.

    Args:
        folder: of the run, for console.log; None on every rank but the first, which draws nothing either. There is no
            second file where stdout is that file already, as it is for a job of a multirun.
        title: the first line of this start in the file, after the time.

    Attributes:
        screen: what a person sees.
    """

    def __init__(self, folder: Path | None, *, title: str = "") -> None:
        self._stream: TextIO | None = None
        self._log: Console | None = None
        self._stderr: _Copied | None = None
        self._is_first = folder is not None
        is_stdout = folder is not None and _is_stdout(folder / LOG)
        self.screen = screen(plain=is_stdout)
        if folder is None or is_stdout:
            return
        try:
            self._stream = (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self.say(f"warning: {LOG} cannot be written ({error.strerror})")
            return
        self._log = file_console(self._stream)
        self._stderr = _Copied(self)
        self._stderr.begin()
        self.log(f"# {time.strftime('%Y-%m-%d %H:%M:%S')}  {title}".rstrip())

    @property
    def is_live(self) -> bool:
        """Whether a bar can be drawn: stdout is a terminal that obeys it, whatever FORCE_COLOR says of colours."""
        return self._is_first and is_drawable(self.screen)

    def each(self, write: Callable[[Console], None]) -> None:
        """Call ``write`` with the screen and with the file's console; a file that takes no more costs one line."""
        write(self.screen)
        self.to_log(write)

    def to_log(self, write: Callable[[Console], None]) -> None:
        """Call ``write`` with the file's console, if there is one."""
        if self._log is None:
            return
        try:
            write(self._log)
        except OSError as error:  # a full disk is no reason to end a run
            self._log = None
            self.say(f"warning: {LOG} cannot be written ({error.strerror})")

    def print(self, what: RenderableType, **how: Any) -> None:
        """Print on both, each in its own width."""
        self.each(lambda console: console.print(what, **how))

    def say(self, text: str, *, style: str = "", indent: int = 0) -> None:
        """A line of prose or figures; on a terminal wrapped between words, further lines ``indent`` columns in.

        One with a command in backticks is left as it is, for copying.
        """
        if "`" in text:
            self.verbatim(text)
        else:
            self.each(lambda console: print_words(console, text, style=style, indent=indent))

    def verbatim(self, text: str) -> None:
        """A line for copying, a command or a path: never wrapped."""
        self.each(lambda console: _print(console, writable(text, console.encoding)))

    def rows(self, rows: Rows) -> None:
        """Names and values in two columns; see `print_rows`."""
        self.each(lambda console: print_rows(console, rows))

    def log(self, text: str) -> None:
        """A line in the file alone."""
        self.to_log(lambda console: _print(console, text))

    @contextmanager
    def live(self) -> Iterator[None]:
        """While something is drawn in place, lines on a terminal's stderr go above it."""
        if self._stderr is not None:
            self._stderr.above(self.screen)
        try:
            yield
        finally:
            if self._stderr is not None:
                self._stderr.above(None)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """On a terminal a spinner with what goes on, gone when it is done; elsewhere nothing."""
        if not self.is_live:
            yield
            return
        with self.live(), _spinner(text, self.screen, redirect_stderr=False):
            yield

    def close(self) -> None:
        """Give stderr back and close the file."""
        if self._stderr is not None:
            self._stderr.end()
            self._stderr = None
        if self._stream is not None:
            self._log = None
            with suppress(OSError):  # a full disk, said before
                self._stream.close()
            self._stream = None


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """`Transcript.waiting` of a process that has no run yet."""
    console = screen()
    if not is_drawable(console):
        yield
        return
    with _spinner(text, console, redirect_stderr=sys.stderr.isatty()):
        yield


def is_drawable(console: Console) -> bool:
    """Whether something can be drawn in place: a terminal that obeys it, whatever FORCE_COLOR says of colours."""
    return console.is_interactive and console.file.isatty()


def note(folder: Path, text: str) -> None:
    """A line to a run's console.log from a process that has no transcript of it, if it can be written.

    Not where stdout is that file: there it has been said.
    """
    if _is_stdout(folder / LOG):
        return
    with suppress(OSError), (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{text}\n")


def _spinner(text: str, console: Console, *, redirect_stderr: bool) -> Live:
    drawn = Spinner("dots", text)
    return Live(drawn, console=console, refresh_per_second=8, transient=True, redirect_stderr=redirect_stderr)


def screen(*, plain: bool = False) -> Console:
    """A console on stdout; ``plain``: without colour whatever the environment says, as stdout is a log.

    Never rich's own for Jupyter, which writes to no stream: what is redirected would be shown, and no file be written.
    """
    colours: dict[str, Any] = {"force_terminal": False, "no_color": True, "color_system": None}
    console = Console(force_jupyter=False, **(colours if plain else {}))
    if not console.file.isatty() and "COLUMNS" not in os.environ:
        console.width = max(console.width, WIDTH)
    return console


def file_console(stream: TextIO) -> Console:
    """A console on a file: no colour, no control characters, a fixed width."""
    return Console(
        file=stream,
        force_terminal=False,
        force_jupyter=False,
        no_color=True,
        color_system=None,
        width=WIDTH,
        legacy_windows=False,
    )


def print_words(console: Console, text: str, *, style: str = "", indent: int = 0) -> None:
    """A line; on a terminal wrapped between words, so that a number, a name or a path is never cut."""
    text = writable(text, console.encoding)
    for line in _lines(console, text, console.width, indent):
        _print(console, Text(line, style=style))


def print_rows(console: Console, rows: Rows) -> None:
    """``name  value`` with the values under one another, wrapped between words.

    Where a terminal leaves a value less than `LEAST` columns, it stands under its name.
    """
    if not rows:
        return
    column = max(NAMES, *(len(name) + 2 for name, _ in rows))
    stacked = console.is_terminal and console.width - column < LEAST
    for name, value in rows:
        value = writable(value, console.encoding)
        if stacked:
            _print(console, Text(name, style="bold"))
            lines = [f"  {line}" for line in _lines(console, value, console.width - 2, 0)]
            _print(console, "\n".join(lines))
            continue
        first, *others = _lines(console, value, console.width - column, 0)
        line = Text.assemble((name.ljust(column), "bold"), first)
        line.rstrip()  # a value may be empty
        _print(console, line)
        for other in others:
            _print(console, " " * column + other)


def _print(console: Console, text: str | Text) -> None:
    """A line as it is: nothing in it is markup, and nothing is wrapped."""
    console.print(Text(text) if isinstance(text, str) else text, soft_wrap=True, highlight=False)


def _lines(console: Console, text: str, width: int, indent: int) -> list[str]:
    """The text's lines of at most ``width`` columns on a terminal; a word that is longer is left whole.

    Two blanks part a line into figures, which are kept together where they can be.
    """
    if not console.is_terminal or (len(text) <= width and "\n" not in text):
        return text.split("\n")
    lines: list[str] = []
    for given in text.split("\n"):
        fresh = len(lines)
        for piece in given.split("  "):
            room = max(1, width - (indent if lines else 0))
            if len(lines) > fresh and len(lines[-1]) + 2 + len(piece) <= width:
                lines[-1] += f"  {piece}"
                continue
            parts = textwrap.wrap(piece, room, break_long_words=False, break_on_hyphens=False)
            lines += [(" " * indent if lines or at else "") + part for at, part in enumerate(parts or [""])]
    return lines


class _Copied:
    """stderr, whose text goes into the transcript's file as well."""

    def __init__(self, transcript: Transcript) -> None:
        self._transcript, self._before = transcript, sys.stderr
        self._target: Any = sys.stderr

    def begin(self) -> None:
        sys.stderr = self  # type: ignore[assignment]

    def end(self) -> None:
        if sys.stderr is self:
            sys.stderr = self._before

    def above(self, console: Console | None) -> None:
        """Lines go above what is drawn in place on ``console``, if stderr is a terminal at all."""
        self._target = (
            FileProxy(console, self._before)
            if console is not None and self._before.isatty()
            else self._before
        )

    def write(self, text: str) -> int:
        self._transcript.to_log(lambda log: _raw(log, text))
        return self._target.write(text)

    def flush(self) -> None:
        self._target.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)


def _raw(log: Console, text: str) -> None:
    log.file.write(writable(text, "utf-8"))
    log.file.flush()


def _is_stdout(file: Path) -> bool:
    """Whether this process's stdout is that file."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), file.stat())
    except (OSError, ValueError, AttributeError):
        return False
