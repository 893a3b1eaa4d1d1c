"""The jobs of a multirun: what one is, where they come from, and its lines in the table and on the page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmlab.journal import RunDir
from lmlab.tracking.groups import Entry
from lmlab.tracking.results import result_row

CONSOLE = "console.log"
"""In a job's directory: what it would have printed."""
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
        console_from: where in console.log what it prints in this start begins.
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
    console_from: int = 0
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

    def keeps(self, status: str, *, is_whole: bool) -> bool:
        """Whether a job that ended so in an earlier start of the sweep is left as it is; ``is_whole``: its files are there."""
        ...

    def recall(self, job: Job) -> None:
        """A job of an earlier start that is left as it is."""
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

    def keeps(self, status: str, *, is_whole: bool) -> bool:
        """What finished; all else is tried again."""
        return status == "finished" and is_whole

    def recall(self, job: Job) -> None:
        """Nothing hangs on it."""

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
        overrides=shlex.join(job.overrides),
        status=job.status,
        exit_code=job.exit_code,
        seconds=job.seconds,
        folder=job.folder if job.run is not None else None,
    )


def entry_of(job: Job) -> Entry:
    """A job on the page that compares."""
    folder = job.folder if job.run is not None else None
    status = job.status.partition(": ")[0]
    return Entry(job.label, folder, status, reason_of(job), job.seconds, job.exit_code)


def reason_of(job: Job) -> str:
    """What was wrong with a job that did not start, or the last error of one that failed."""
    word, _, reason = job.status.partition(": ")
    if reason or not job.went_wrong or job.run is None:
        return reason
    try:
        said = (job.folder / CONSOLE).read_bytes()[job.console_from :]
        lines = said.decode("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ")[:300] if errors else f"{word}, exit code {job.exit_code}"
