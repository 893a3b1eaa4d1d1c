"""All runs below a folder: what is found there, sweeps with their jobs, and nothing that could break the list.

A run whose files have not changed since is taken from memory (`Reader`); only whether its process lives is asked anew.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmlab.tracking.report import RUN_FILES
from lmlab.tracking.results import RESULTS, by_number
from lmlab.tracking.run_row import Run, living, read_run, shortened

MARKS = frozenset({*RUN_FILES, "layers.jsonl", "mask_preview.txt", "console.log", ".lock", "checkpoints"})
"""What only a run's directory has; one that holds any of these is one, however little else is there."""
DEEPEST = 8
"""Folders below the root that are looked into; runs lie at depth 2 or 3."""
_READ = ("config.yaml", "run.json", "summary.json", "metrics.jsonl", "report.html")


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its jobs, in the launcher's order."""

    path: str
    name: str
    jobs: tuple[Run, ...]
    page: bool = False

    def lowest(self, figure: str) -> float | None:
        """The lowest of a figure over the finished jobs."""
        return min((j.figures[figure] for j in self.jobs if j.status == "finished" and figure in j.figures), default=None)  # fmt: skip


@dataclass
class Runs:
    """Everything below a root.

    Attributes:
        comparisons: paths of other pages that compare runs (``reports/...``).
        notices: what could not be looked at.
    """

    root: Path
    alone: list[Run] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    comparisons: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Run]:
        """The runs of sweeps and those alone."""
        return self.alone + [job for sweep in self.sweeps for job in sweep.jobs]

    @property
    def newest_first(self) -> list[Run | Sweep]:
        """Single runs and sweeps, what was started last first."""

        def start(thing: Run | Sweep) -> tuple[bool, float, str]:
            jobs = thing.jobs if isinstance(thing, Sweep) else (thing,)
            return min(map(_newest_first, jobs), default=(True, 0.0, thing.path))

        return sorted([*self.alone, *self.sweeps], key=start)


@dataclass
class _Tree:
    """Folders found, relative to the root."""

    runs: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    deeper: int = 0


class Reader:
    """Reads the runs below a root as often as asked, each anew only when its files have changed."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._known: dict[str, tuple[tuple[Any, ...], Run]] = {}

    def read(self) -> Runs:
        """Everything that is there now; nothing of it is ever an error."""
        tree = _Tree()
        _walk(self.root, "", 0, tree)
        runs = {path: self._run(path) for path in sorted(tree.runs)}
        runs |= {path: Run(path, path.rpartition("/")[2], notes="an empty directory") for path in tree.empty}
        self._known = {path: known for path, known in self._known.items() if path in runs}
        found = Runs(self.root, notices=_notices(tree))
        by_folder: dict[str, list[Run]] = {}
        for run in runs.values():
            by_folder.setdefault(run.path.rpartition("/")[0], []).append(run)
        for folder, members in by_folder.items():
            if folder in tree.tables or folder.rpartition("/")[0].rpartition("/")[2] == "sweeps":
                found.sweeps.append(self._sweep(folder, members))
            else:
                found.alone += members
        for folder in tree.tables:
            if folder not in by_folder:
                if (self.root / folder / "report.html").is_file():
                    found.comparisons.append(folder)
                elif folder.rpartition("/")[0].rpartition("/")[2] == "sweeps":
                    found.sweeps.append(self._sweep(folder, []))
        return found

    def _run(self, path: str) -> Run:
        folder = self.root / path
        stamp = tuple(_stamp(folder / name) for name in _READ)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = (stamp, read_run(folder, path))
            self._known[path] = known
        return living(known[1], folder)

    def _sweep(self, folder: str, members: Sequence[Run]) -> Sweep:
        """Its runs, and the jobs of its table that never had a directory."""
        at = self.root / folder
        jobs = [(by_number(run.name), replace(run, sweep=folder)) for run in members]
        there = {run.name for run in members}
        for row in _table(at / RESULTS):
            name = Path(row.get("directory") or "").name
            word, _, reason = str(row.get("status") or "").partition(":")
            if name in there or not word:
                continue
            label = str(row.get("overrides") or "") or f"job {row.get('job', '')}"
            gone = reason.strip() or ("its directory is gone" if name else "")
            jobs.append(
                (
                    by_number(f"{row.get('job')}-{label}"),
                    Run("", label, folder, status=word, reason=shortened(gone)),
                )
            )
        jobs.sort(key=lambda job: job[0])
        return Sweep(folder, folder.rpartition("/")[2] or at.resolve().name, tuple(run for _, run in jobs), (at / "report.html").is_file())  # fmt: skip


# --- finding --------------------------------------------------------------------------------------------------------


def _walk(folder: Path, path: str, depth: int, tree: _Tree) -> None:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        tree.unread.append(f"{path or folder.name}: {error.strerror}")
        return
    names = {entry.name for entry in found}
    if path and names & MARKS:
        tree.runs.append(path)
        return
    if path and not found and depth > 1:
        tree.empty.append(path)
    if RESULTS in names:
        tree.tables.append(path)
    for entry in found:
        inside = f"{path}/{entry.name}" if path else entry.name
        try:
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            if entry.is_symlink():
                tree.links.append(inside)
            elif depth >= DEEPEST:
                tree.deeper += 1
            else:
                _walk(folder / entry.name, inside, depth + 1, tree)
        except OSError as error:
            tree.unread.append(f"{inside}: {error.strerror}")


def _notices(tree: _Tree) -> list[str]:
    told = [f"Cannot be looked into: {line}." for line in tree.unread]
    if tree.links:
        told.append(f"Links to directories are not followed: {', '.join(tree.links[:5])}{' ...' if len(tree.links) > 5 else ''}.")  # fmt: skip
    if tree.deeper:
        told.append(f"Folders more than {DEEPEST} levels deep are not looked into: {tree.deeper}.")
    return told


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def _newest_first(run: Run) -> tuple[bool, float, str]:
    return run.started is None, -run.started.timestamp() if run.started else 0.0, run.path


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []
