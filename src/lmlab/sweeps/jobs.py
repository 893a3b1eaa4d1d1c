"""The jobs of a multirun: what one is, where they come from, and the table about them.

``results.csv`` is the sweep's memory: it is rewritten by rename whenever a job ends, and a second start of the same
sweep reads in it what need not be done again.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmlab.journal import RunDir, read_json

FIGURES = (
    "final/val/loss",
    "best/val_loss",
    "final/val/exact_match",
    "model/params_trainable",
    "model/base_bits_per_param",
    "memory/peak_gb",
    "perf/tokens_per_second_median",
)
"""What results.csv shows of a run's summary.json."""
OUT_OF_MEMORY = "out of memory"
DONE = ("finished", "pruned")
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
    def is_done(self) -> bool:
        """Whether another start of the sweep leaves it alone: it has an outcome that would come again, or was given up."""
        return self.status in DONE

    @property
    def went_wrong(self) -> bool:
        """Whether the sweep's exit code says so; that a point cannot train, or does not fit, is a result."""
        return self.status in ("failed", "interrupted") or self.status.startswith("error")


class Points(Protocol):
    """Where the jobs of a multirun come from.

    Attributes:
        keys: the swept keys, which labels and the sweep's name are made of.
        begins_at: number of the first job asked for; those before it were run by an earlier start.
    """

    keys: tuple[str, ...]
    begins_at: int

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

    begins_at = 0

    def __init__(self, jobs: Sequence[list[str]]) -> None:
        self.jobs = jobs
        varied = (i for i in range(len(jobs[0])) if len({job[i] for job in jobs}) > 1)
        self.keys = tuple(key_of(jobs[0][i]) for i in varied)

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
    summary = read_json(job.run.summary) if job.run is not None else {}
    return {
        "job": job.number,
        "overrides": " ".join(job.overrides),
        "status": job.status,
        "exit_code": job.exit_code,
        "seconds": round(job.seconds, 1),
        **{name: summary.get(name) for name in FIGURES},
        "directory": str(job.folder) if job.run is not None else "",
    }


def write_results(file: Path, jobs: Sequence[Job]) -> None:
    """Replace the table as a whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [row_of(job) for job in jobs]
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(file)


def read_results(file: Path) -> dict[int, dict[str, str]]:
    """Job number -> its line, of an earlier start; {} where there was none."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return {int(row["job"]): row for row in csv.DictReader(stream)}
    except (OSError, ValueError, KeyError):
        return {}
