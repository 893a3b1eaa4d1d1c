"""What a person sees while a run goes: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Progress of one run.

    Args:
        console: where to write; a bar is drawn only on a terminal.
        max_steps: where training ends.
        active: false on every rank but the first.
    """

    def __init__(self, console: Console, *, max_steps: int, active: bool) -> None:
        self.console, self.max_steps, self.active = console, max_steps, active
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._last_line = float("-inf")

    def start(self, step: int) -> None:
        """Training begins after ``step`` steps."""
        if self.active and self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = RichProgress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("training", total=self.max_steps, completed=step, figures="")
            self._bar.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A logged step."""
        if not self.active:
            return
        figures = f"loss {values['train/loss']:.4f}  {values['perf/tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step == 1 or step >= self.max_steps or time.monotonic() - self._last_line > 5:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.max_steps}  {figures}  lr {values['train/lr']:.2e}")

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        """A validation, or the test at the end."""
        if not self.active:
            return
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if k.startswith(("val/", "test/")))
        self.say(f"step {step}/{self.max_steps}  {shown}".rstrip())

    def say(self, text: str) -> None:
        """A plain line that does not disturb the bar."""
        if self.active:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
