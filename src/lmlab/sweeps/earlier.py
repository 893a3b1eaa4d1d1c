"""What earlier starts of a sweep left: its table, jobs that still run, runs that finished and have no row.

``results.csv`` is the sweep's memory: it is rewritten by rename whenever a job ends, and a second start of the same
sweep reads in it what need not be done again.
"""

from __future__ import annotations

import csv
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lmlab.journal import RunDir, read_json
from lmlab.records import UserError
from lmlab.sweeps.jobs import Job, key_of
from lmlab.tracking.results import RESULTS

READ = ("overrides", "status", "exit_code", "seconds")
"""Columns of results.csv that a second start reads, besides the job's number."""


class StillRunningError(Exception):
    """A job of an earlier launcher goes on."""


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep: its table, its study, or jobs that were begun."""
    try:
        with (folder / RESULTS).open("rb") as stream:
            if stream.read(13) == b"job,overrides":
                return True
    except OSError:
        pass
    return (folder / "study.db").exists() or any(folder.glob("[0-9]*-*/run.json"))


def read_results(file: Path) -> dict[int, dict[str, str]]:
    """Job number -> its line, of an earlier start; {} where there was none.

    Raises:
        UserError: it cannot be read, or is no table of a sweep: it would be lost with the first job's end.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return dict(_numbered(row) for row in csv.DictReader(stream))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"this is no table of a sweep's jobs, {error}",
            where=str(file),
            fix="mend it or move it away (jobs that finished are known by their directories), or choose another run_name",
        ) from error


def _numbered(row: dict[str, str]) -> tuple[int, dict[str, str]]:
    if missing := [name for name in ("job", *READ) if row.get(name) is None]:
        raise ValueError(f"a line without {missing[0]}")
    number, _, _ = int(row["job"]), int(row["exit_code"] or 0), float(row["seconds"] or 0)
    return number, row


def overrides_of(row: Mapping[str, str]) -> list[str]:
    """The overrides in a line of results.csv."""
    try:
        return shlex.split(row["overrides"])
    except ValueError:  # written before they were quoted
        return row["overrides"].split()


def same_point(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether overrides are the same but for what only says how to go on."""
    ways = ("run_name", "resume", "overwrite", "launcher.jobs")  # its name is where it lies
    return [o for o in one if key_of(o) not in ways] == [o for o in other if key_of(o) not in ways]


def wait_for_orphan(job: Job, *, seconds: float, say: Callable[[str], None]) -> None:
    """A job of a launcher that was killed has been told to stop, and may still be saving.

    Raises:
        StillRunningError: it has not ended within ``seconds``.
    """
    until, run, said = time.monotonic() + seconds, RunDir(job.folder), False
    while (holder := run.holder()) is not None:
        if not said:
            say(
                f"job {job.number} ({job.label}) of an earlier start still runs ({holder}): waiting for its end"
            )
            said = True
        if time.monotonic() > until:
            raise StillRunningError(
                f"job {job.number} ({job.label}) is left to {holder}; if that is gone, delete {os.path.relpath(run.lock)}"
            )
        time.sleep(0.5)


def has_finished(job: Job, row: Mapping[str, str] | None) -> bool:
    """Whether the job's run finished, and its launcher was stopped or killed before it could write that into its ``row``."""
    if row is not None and row["status"] not in ("running", "interrupted"):
        return False
    run = RunDir(job.folder)
    argv = read_json(run.info).get("argv") or [""]
    is_same = run.config.is_file() and same_point(argv[1:], job.overrides)
    return is_same and read_json(run.summary).get("status") == "finished"
