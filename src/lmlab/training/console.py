"""What a person sees while a run goes: a bar with time left on a terminal, plain lines in a pipe and in console.log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from lmlab.tracking.transcript import Transcript, print_words
from lmlab.tracking.values import duration

LINE_SECONDS = ((120.0, 5.0), (3600.0, 30.0), (float("inf"), 60.0))
"""(until so many seconds of training, seconds between two plain lines): a night's log is to be readable too."""
RECENT = 50
"""Log points that the speed is taken from."""
BAR = (8, 40)
"""Columns of the bar, at least (else there is none) and at most."""


class Progress:
    """Progress of one run.

    Args:
        transcript: where to write; a bar is drawn only on a terminal.
        max_steps: where training ends.
        active: false on every rank but the first.
    """

    def __init__(self, transcript: Transcript, *, max_steps: int, active: bool) -> None:
        self.transcript, self.max_steps, self.active = transcript, max_steps, active
        self._bar: Bar | None = None
        self._live: ExitStack | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._began = self._last_line = float("-inf")
        self._said = -1
        self._newest: tuple[int, str] | None = None

    def start(self, step: int) -> None:
        """Training begins after ``step`` steps."""
        self._began = time.monotonic()
        self._recent.append((step, self._began))
        if self.active and self.transcript.is_live:
            self._bar = Bar(self.max_steps, step)
            self._live = ExitStack()
            self._live.enter_context(self.transcript.live())
            self._live.enter_context(
                Live(
                    self._bar,
                    console=self.transcript.screen,
                    refresh_per_second=4,
                    transient=True,
                    redirect_stderr=False,  # the transcript's own, which knows whether stderr is a terminal
                )
            )

    def advance(self, step: int) -> None:
        """Any optimizer step has ended."""
        if self._bar is not None:
            self._bar.step = step

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A logged step."""
        if not self.active:
            return
        now = time.monotonic()
        self._recent.append((step, now))
        loss, rate = f"loss {values['train/loss']:.4f}", f"lr {values['train/lr']:.2e}"
        speed = f"{values['perf/tokens_per_second']:,.0f} tokens/s"
        left = self._left(step)
        if self._bar is not None:
            self._bar.show(step, loss, speed, rate, left)
        line = "  ".join([f"step {step}/{self.max_steps}", loss, speed, rate, *([left] if left else [])])
        self._newest = (step, line)
        apart = next(apart for until, apart in LINE_SECONDS if now - self._began < until)
        if step == 1 or step >= self.max_steps or now - self._last_line > apart:
            self._last_line = now
            self._line(step, line)

    def _line(self, step: int, line: str) -> None:
        """A plain line, once: in the log always, on the screen where there is no bar."""
        if step == self._said:
            return
        self._said = step
        if self._bar is None:
            self.transcript.say(line, indent=2)
        else:
            self.transcript.log(line)

    def _left(self, step: int) -> str:
        """Time until the last step at the speed of late, validations and samples included; "" where there is none."""
        (first, then), (last, now) = self._recent[0], self._recent[-1]
        if step >= self.max_steps or last <= first:
            return ""
        return f"{duration((now - then) / (last - first) * (self.max_steps - step))} left"

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        """A validation, or the test at the end."""
        if not self.active:
            return
        self._settle()
        shown = [f"{k} {v:.4f}" for k, v in values.items() if k.startswith(("val/", "test/"))]
        self.transcript.say("  ".join([f"step {step}/{self.max_steps}", *shown]), style="bold", indent=2)

    def stop(self) -> None:
        """Remove the bar; the newest figures stay as a line."""
        if self._live is not None:
            self._live.close()
            self._live = None
        self._settle()
        self._bar = None

    def _settle(self) -> None:
        """The newest figures as a line that stays, on the screen above the bar too."""
        if self._newest is None:
            return
        (step, line), self._newest = self._newest, None
        if self._bar is not None:
            print_words(self.transcript.screen, line, indent=2)
        self._line(step, line)


class Bar:
    """One line: step, bar, loss, speed, learning rate, time left; what does not fit is left out whole, the least needed first."""

    def __init__(self, max_steps: int, step: int) -> None:
        self.max_steps, self.step = max_steps, step
        self._figures: tuple[str, str, str, str] = ("", "", "", "")

    def show(self, step: int, loss: str, speed: str, rate: str, left: str) -> None:
        """The figures of a log point."""
        self.step, self._figures = step, (loss, speed, rate, left)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Fit the line to the width there is now."""
        width = options.max_width - 1
        loss, speed, rate, left = self._figures
        parts = {"loss": loss, "speed": speed, "rate": rate, "left": left}
        parts = {name: text for name, text in parts.items() if text}
        head = f"step {self.step}/{self.max_steps}"

        def taken() -> int:
            return len(head) + sum(len(text) + 2 for text in parts.values())

        if taken() + 2 + BAR[0] > width:
            parts.pop("rate", None)  # a bar says more at a glance
        for name in ("speed", "left", "loss"):
            if taken() > width:
                parts.pop(name, None)
        line = Text(head)
        room = min(BAR[1], width - taken() - 2)
        if room >= BAR[0]:
            done, rest = ("#", "-") if options.ascii_only else ("━", "╌")
            full = round(room * min(1.0, self.step / max(1, self.max_steps)))
            line.append("  ")
            line.append(done * full, "green")
            line.append(rest * (room - full), "dim")
        for text in parts.values():
            line.append(f"  {text}")
        line.no_wrap = True
        yield line
