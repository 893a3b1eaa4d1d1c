"""What a person sees of a multirun: a live table of its jobs on a terminal, a line for each start and end elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lmlab.sweeps.jobs import Job, row_of
from lmlab.tracking.figure_table import print_figures
from lmlab.tracking.results import FIGURES
from lmlab.tracking.transcript import is_drawable

TAIL_BYTES = 1 << 14
SHOWN = 30
"""Rows of the live table; of more jobs those that run and the last to end are shown."""


class Board:
    """Shows the jobs while they run.

    Args:
        console: where to.
        jobs: the list that the launcher keeps up to date.
        total: how many there will be at most.
    """

    def __init__(self, console: Console, jobs: Sequence[Job], *, total: int) -> None:
        self.console, self.jobs, self.total = console, jobs, total
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Board:
        if is_drawable(self.console):
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *about: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tell(self, job: Job) -> None:
        """A job has started or ended."""
        took = f" after {job.seconds:.0f} s" if job.status != "running" and job.run is not None else ""
        self.say(f"[{job.number + 1}/{self.total}] {job.label}: {job.status}{took}")
        self.refresh(now=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self, *, now: bool = False) -> None:
        """Draw the running jobs' newest figures, at most twice a second."""
        if self._live is not None and (now or time.monotonic() - self._drawn > 0.5):
            self._drawn = time.monotonic()
            self._live.update(self._running(), refresh=True)

    def _running(self) -> Table:
        table = Table(box=SIMPLE)
        for column in ("job", "status", "step", "train/loss", "val/loss", "tok/s", "seconds"):
            table.add_column(column, justify="left" if column in ("job", "status") else "right")
        for job in [job for job in self.jobs if job.status == "running"][:SHOWN]:
            newest = newest_figures(job)
            step = f"{newest.get('step', 0)}/{job.steps}" if job.steps else str(newest.get("step", ""))
            figures = (("train/loss", ".4f"), ("val/loss", ".4f"), ("perf/tokens_per_second", ",.0f"))
            shown = [_number(newest.get(name), form) for name, form in figures]
            table.add_row(Text(job.label), job.status, step, *shown, f"{time.monotonic() - job.started:.0f}")
        ended = [job for job in self.jobs if job.status not in ("running", "waiting")]
        went_wrong = sum(job.went_wrong for job in ended)
        table.caption = f"{len(ended)} of {self.total} ended" + (
            f", {went_wrong} of them failed" if went_wrong else ""
        )
        return table


def newest_figures(job: Job) -> dict[str, Any]:
    """The newest value of each metric near the end of a running job's metrics.jsonl."""
    found: dict[str, Any] = {}
    if job.run is None:
        return found
    try:
        with open(job.run.metrics, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except OSError:
        return found
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut by the tail's beginning, or being written
            continue
        if isinstance(row, dict):
            found.update(row)
    return found


def print_outcome(console: Console, jobs: Sequence[Job]) -> None:
    """All jobs with what came of them, for the end."""
    columns = ("job", "status", "val/loss", "best", "exact", "trained", "bits", "peak GB", "tok/s", "seconds")
    forms = (".4f", ".4f", ".3f", ",", ".2f", ".2f", ",.0f")
    rows = []
    for job in jobs:
        row = row_of(job)
        figures = [_number(row[name], form) for name, form in zip(FIGURES, forms, strict=True)]
        rows.append([job.label, job.status.split(":")[0], *figures, f"{job.seconds:.0f}"])
    print_figures(console, "jobs", columns, rows, box=SIMPLE, words=2)


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
