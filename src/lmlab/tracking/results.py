"""results.csv, the table of a sweep's jobs, and what a path given by a person stands for: a run or a sweep.

The launcher writes the table as its jobs end; ``scripts/report.py`` writes one of runs that were started one by one.
"""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmlab.journal import read_json
from lmlab.records import UserError
from lmlab.tracking.groups import Entry, read_result
from lmlab.tracking.plots import number
from lmlab.tracking.report import is_run

RESULTS = "results.csv"
FIGURES = (
    "final/val/loss",
    "best/val_loss",
    "final/val/exact_match",
    "model/params_trainable",
    "model/base_bits_per_param",
    "memory/peak_gb",
    "perf/tokens_per_second_median",
)
"""Names of summary.json that are columns of results.csv."""


def result_row(*, job: int, overrides: str, status: str, exit_code: int | None, seconds: float | None, folder: Path | None) -> dict[str, Any]:  # fmt: skip
    """A job's row of results.csv; ``folder`` is None if it never had a run directory."""
    summary = read_json(folder / "summary.json") if folder is not None else {}
    return {
        "job": job,
        "overrides": overrides,
        "status": status,
        "exit_code": exit_code,
        "seconds": None if seconds is None else round(seconds, 1),
        **{name: summary.get(name) for name in FIGURES},
        "directory": "" if folder is None else str(folder),
    }


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``folder/results.csv`` in one piece; there is at least one row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    temporary = folder / f".{RESULTS}.{os.getpid()}.tmp"
    temporary.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")
    return temporary.replace(folder / RESULTS)


def rows_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """results.csv's rows of runs that no launcher kept a table of."""
    rows = []
    for place, entry in enumerate(entries):
        result = read_result(entry)
        code = result.flat.get("exit_code") if entry.exit_code is None else entry.exit_code
        folder = entry.folder if entry.folder is not None and entry.folder.is_dir() else None
        rows.append(result_row(job=place, overrides=entry.label, status=entry.status or result.status, exit_code=code,
                               seconds=result.figures.get("wall"), folder=folder))  # fmt: skip
    return rows


def entries_of(path: Path) -> list[Entry]:
    """What a path given by a person stands for: a run, or the jobs of a sweep.

    Raises:
        UserError: it is neither.
    """
    if (path / RESULTS).is_file():
        return _entries_of_table(path)
    if is_run(path):
        return [Entry(path.resolve().name, path)]
    inside = (
        sorted((p for p in path.iterdir() if is_run(p)), key=lambda p: by_number(p.name))
        if path.is_dir()
        else []
    )
    if not inside:
        what = "neither a run directory nor a sweep's" if path.is_dir() else "no such directory"
        raise UserError(
            what,
            where=str(path),
            fix="give directories that train.py made, e.g. outputs/sft/NAME or outputs/sweeps/NAME",
        )
    return [Entry(run.name, run) for run in inside]


def _words(overrides: str) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError:
        return overrides.split()


def by_number(name: str) -> tuple[int, str]:
    """For sorting jobs: ``10-adapter=lora`` after ``9-adapter=none``."""
    first = name.partition("-")[0]
    return (int(first) if first.isdecimal() and first.isascii() else 0, name)


def _entries_of_table(path: Path) -> list[Entry]:
    try:
        with open(path / RESULTS, encoding="utf-8", errors="replace", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("overrides") is not None]
    except (OSError, csv.Error) as error:
        raise UserError(
            f"results.csv cannot be read, {error}", where=str(path), fix="name the run directories themselves"
        ) from error
    words = [_words(str(row["overrides"])) for row in rows]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    entries = []
    for row, told in zip(rows, words, strict=True):
        label = " ".join(word for word in told if word not in common) or f"job {row.get('job', '')}"
        given = Path(row.get("directory") or "")
        # Written relative to where the sweep was started, and the sweep may have been moved since.
        folder = path / given.name if given.name and (path / given.name).is_dir() else given
        code = number(row.get("exit_code") or "")
        entries.append(Entry(label, folder if given.name else None, row.get("status") or "",
                             seconds=number(row.get("seconds") or ""), exit_code=None if code is None else int(code)))  # fmt: skip
    return entries
