"""The jobs of a multirun: what one is, where they come from, and the table about them.

``results.csv`` is the sweep's memory: it is rewritten by rename whenever a job ends, and a second start of the same
sweep reads in it what need not be done again.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmlab.journal import RunDir
from lmlab.tracking.results import result_row

OUT_OF_MEMORY = "out of memory"
NOT_STARTED = ("waiting", "not started")


@dataclass
class Job:
    """One point of the sweep and what became of it.

    Attributes:
        overrides: what the command line was for this job alone.
        label: the overrides that vary.
        status: ``waiting``, ``running``, ``finished``, ``interrupted``, ``failed``, ``out of memory``, ``pruned``,
            ``not started``, ``refused: reason`` (cannot train) or ``error: reason`` (asked wrongly).
        exit_code: of its processes; 2 for a job that could not start.
        steps: of the whole run; 0 before it is known.
        run: its directory, None for a job that could not start.
    """

    number: int
    overrides: list[str]
    label: str
    folder: Path
    status: str = "waiting"
    exit_code: int = 0
    seconds: float = 0.0
    steps: int = 0
    run: RunDir | None = None
    started: float = 0.0

    @property
    def went_wrong(self) -> bool:
        """Whether the sweep's exit code says so; that a point cannot train, or does not fit, is a result."""
        return self.status in ("failed", "interrupted") or self.status.startswith("error")


class Points(Protocol):
    """Where the jobs of a multirun come from.

    Attributes:
        keys: the swept keys, which labels and the sweep's name are made of.
        total: how many jobs there will be at most.
    """

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def total(self) -> int: ...

    def keeps(self, status: str) -> bool:
        """Whether a job that ended so in an earlier start of the sweep is left as it is."""
        ...

    def next(self, number: int) -> list[str] | None:
        """Overrides of job ``number``; None: none now and, if nothing runs any more, none at all."""
        ...

    def hopeless(self, job: Job) -> bool:
        """Whether to end a running job now; asked about once a second."""
        ...

    def done(self, job: Job) -> None:
        """A job has ended, in whatever way."""
        ...


class GridPoints:
    """Every combination, in order, whatever comes of them."""

    def __init__(self, jobs: Sequence[list[str]]) -> None:
        self.jobs, self.total = jobs, len(jobs)
        varied = (i for i in range(len(jobs[0])) if len({job[i] for job in jobs}) > 1)
        self.keys = tuple(key_of(jobs[0][i]) for i in varied)

    def keeps(self, status: str) -> bool:
        """What finished; all else is tried again."""
        return status == "finished"

    def next(self, number: int) -> list[str] | None:
        """See `Points`."""
        return list(self.jobs[number]) if number < len(self.jobs) else None

    def hopeless(self, job: Job) -> bool:
        """Never: the grid is run as it was asked for."""
        return False

    def done(self, job: Job) -> None:
        """Nothing hangs on it."""


def key_of(override: str) -> str:
    """``optim.lr`` of ``++optim.lr=1e-3``."""
    return override.lstrip("+~").partition("=")[0]


def label_of(overrides: Sequence[str], keys: Sequence[str]) -> str:
    """The overrides that vary, as a person reads them."""
    return " ".join(override for override in overrides if key_of(override) in keys) or "run"


def row_of(job: Job) -> dict[str, Any]:
    """A job's line in results.csv."""
    return result_row(
        job=job.number,
        overrides=" ".join(job.overrides),
        status=job.status,
        exit_code=job.exit_code,
        seconds=job.seconds,
        folder=job.folder if job.run is not None else None,
    )


def read_results(file: Path) -> dict[int, dict[str, str]]:
    """Job number -> its line, of an earlier start; {} where there was none."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return {int(row["job"]): row for row in csv.DictReader(stream)}
    except (OSError, ValueError, KeyError):
        return {}
