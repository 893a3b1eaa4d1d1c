"""All runs below a folder, each as one row: from the files it left, quickly, and whatever state they are in.

Thousands of runs must come in seconds, so files are not parsed whole as for a run's own report: of a finished run's
log only the validations are read, of config.yaml only the lines that are shown. A run whose files have not changed
since is taken from memory (`Reader`); only whether its process lives is asked anew each time.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmlab.journal import RunDir
from lmlab.records import STOPPED_CODES
from lmlab.tracking import plots
from lmlab.tracking.report import RUN_FILES, is_run
from lmlab.tracking.results import RESULTS, by_number

MARKS = frozenset({*RUN_FILES, "layers.jsonl", "mask_preview.txt", "console.log", ".lock", "checkpoints"})
"""What only a run's directory has; one that holds any of these is one, however little else is there."""
DEEPEST = 8
"""Folders below the root that are looked into; runs lie at depth 2 or 3."""
_READ = ("config.yaml", "run.json", "summary.json", "metrics.jsonl", "report.html")
_MAX_REASON = 200

FIGURES = {
    "val/loss": "val/loss",
    "val/bits_per_byte": "bits per byte",
    "model/params_trainable": "trained",
    "memory/peak_gb": "peak GB",
    "perf/tokens_per_second_median": "tok/s",
}
"""Names of a row's figures -> titles of their columns."""


@dataclass(frozen=True)
class Run:
    """One run as a row. What its files do not say is empty, None or absent.

    Attributes:
        path: relative to the root, with ``/``; empty for a job that never had a directory.
        sweep: path of the sweep's folder it is a job of, or empty.
        status: ``finished``, ``running``, ``failed``, ``interrupted``, a launcher's word, or ``unknown``.
        reason: why it is not finished, or of a running one which process holds it.
        notes: what is missing or broken of its files.
        started: as run.json says.
        step: the last logged one.
        figures: by the names in `FIGURES`; the validation's are of the last one.
        curve: (step, val/loss), finite values alone.
        page: whether it has a report.html.
        readable: whether it has any file that a report can be made of.
    """

    path: str
    name: str
    sweep: str = ""
    task: str = ""
    status: str = "unknown"
    reason: str = ""
    notes: str = ""
    started: datetime.datetime | None = None
    step: int | None = None
    max_steps: int | None = None
    adapter: str = ""
    quant: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    page: bool = False
    readable: bool = False


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its jobs, in the launcher's order."""

    path: str
    name: str
    jobs: tuple[Run, ...]
    page: bool = False

    @property
    def statuses(self) -> Counter[str]:
        """Status -> how many jobs have it."""
        return Counter(job.status for job in self.jobs)

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
        jobs = [replace(run, sweep=folder) for run in sorted(members, key=lambda run: by_number(run.name))]
        there = {run.name for run in members}
        for row in _table(at / RESULTS):
            name = Path(row.get("directory") or "").name
            word, _, reason = str(row.get("status") or "").partition(":")
            if name in there or not word:
                continue
            label = str(row.get("overrides") or "") or f"job {row.get('job', '')}"
            gone = reason.strip() or ("its directory is gone" if name else "")
            jobs.append(Run("", label, folder, status=word, reason=_short(gone)))
        return Sweep(folder, folder.rpartition("/")[2] or at.resolve().name, tuple(jobs), (at / "report.html").is_file())  # fmt: skip


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


# --- reading --------------------------------------------------------------------------------------------------------


def read_run(folder: Path, path: str) -> Run:
    """A run's row, but for whether its process lives (`living`)."""
    broken: list[str] = []
    summary, info = _object(folder / "summary.json", broken), _object(folder / "run.json", broken)
    config = _text(folder / "config.yaml", broken)
    status, reason = _ended(summary)
    log = _Log.read(folder / "metrics.jsonl", whole=status != "finished", broken=broken)
    figures = {name: value for name in FIGURES if (value := _figure(summary, name)) is not None}
    figures = {**log.figures, **figures}
    if log.last_validation:  # the summary's "final" is the same, but a killed run has none
        figures |= log.last_validation
    max_steps = _setting(config, "trainer", "max_steps")
    return Run(
        path=path,
        name=path.rpartition("/")[2],
        task=_setting(config, "task") or path.partition("/")[0],
        status=status,
        reason=_short(reason),
        notes=_short(", ".join(broken)),
        started=_moment(info.get("started")),
        step=log.step,
        max_steps=int(max_steps) if max_steps.isdecimal() and max_steps.isascii() else None,
        adapter=_setting(config, "adapter", "kind"),
        quant=_setting(config, "quant", "kind"),
        figures=figures,
        curve=log.curve,
        page=(folder / "report.html").is_file(),
        readable=is_run(folder),
    )


def living(run: Run, folder: Path) -> Run:
    """The row with what the lock says: a run that is held is running; one that only says so was killed."""
    holder = RunDir(folder).holder() if (folder / ".lock").exists() else None
    if holder:
        return replace(run, status="running", reason=holder)
    if run.status == "running":
        return replace(run, status="interrupted", reason="its process is gone and left no summary")
    return run


def _ended(summary: dict[str, Any]) -> tuple[str, str]:
    word, code = str(summary.get("status") or "").lower(), summary.get("exit_code")
    reason = next((str(summary[name]) for name in ("error", "reason", "message") if summary.get(name)), "")
    if not word and code is not None:
        word = "finished" if code == 0 else "interrupted" if code in STOPPED_CODES else "failed"
    return word or "unknown", reason


def _figure(summary: dict[str, Any], name: str) -> float | None:
    for key in (name, f"final/{name}"):
        value = plots.number(summary[key]) if key in summary else None
        if value is not None and math.isfinite(value):
            return value
    return None


@dataclass
class _Log:
    """What is read of metrics.jsonl."""

    step: int | None = None
    curve: tuple[tuple[int, float], ...] = ()
    last_validation: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, whole: bool, broken: list[str]) -> _Log:
        """Of a finished run the validations and the last line; ``whole`` of every line, as no summary has counted yet."""
        try:
            rows, torn = _rows(path, whole)
        except FileNotFoundError:
            broken.append("no metrics.jsonl")
            return cls()
        except OSError as error:
            broken.append(f"metrics.jsonl cannot be read ({error.strerror})")
            return cls()
        if torn:
            broken.append(f"metrics.jsonl has {torn} broken line{'s' if torn > 1 else ''}")
        losses = plots.series(rows, "val/loss")
        log = cls(max((row["step"] for row in rows), default=None), tuple(losses.items()))
        for name in ("val/loss", "val/bits_per_byte"):
            if values := plots.series(rows, name):
                log.last_validation[name] = values[max(values)]
        if whole:
            peaks = [bar.value for bar in plots.phase_peaks(rows)] or [
                *plots.series(rows, "memory/rss_gb").values()
            ]
            speeds = plots.series(rows, "perf/tokens_per_second").values()
            log.figures |= {"memory/peak_gb": max(peaks)} if peaks else {}
            log.figures |= {"perf/tokens_per_second_median": statistics.median(speeds)} if speeds else {}
        return log


def _rows(path: Path, whole: bool) -> tuple[list[dict[str, Any]], int]:
    """Log points with a step, and how many lines were none; without ``whole`` only those of validations and the last."""
    rows: list[dict[str, Any]] = []
    torn, line, used = 0, b"", True
    with open(path, "rb") as file:
        for line in file:
            used = whole or b'"val/loss"' in line
            if used:
                torn += not _row(line, rows)
    if not used:
        torn += not _row(line, rows)
    return rows, torn


def _row(line: bytes, rows: list[dict[str, Any]]) -> bool:
    try:
        row = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        return False
    fine = isinstance(row, dict) and isinstance(row.get("step"), int) and abs(row["step"]) < 2**53
    if fine:
        rows.append(row)
    return fine or row is None


def _text(path: Path, broken: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        broken.append(f"no {path.name}")
    except OSError as error:
        broken.append(f"{path.name} cannot be read ({error.strerror})")
    return ""


def _object(path: Path, broken: list[str]) -> dict[str, Any]:
    text = _text(path, broken)
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        broken.append(f"{path.name} is broken")
        return {}
    return value


def _setting(config: str, *names: str) -> str:
    """A plain value of config.yaml as lmlab writes it, block style and two spaces a level; empty if it is not there.

    Parsing the whole file would take longer than everything else together.
    """
    block = config
    for depth, name in enumerate(names):
        lead = "  " * depth
        if depth == len(names) - 1:
            found = re.search(rf"^{lead}{name}: ([^\s#'\"\[{{&*!|>][^\n]*)$", block, re.MULTILINE)
            return found[1].strip()[:80] if found and found[1].strip() != "null" else ""
        start = re.search(rf"^{lead}{name}:[ ]*\n((?:{lead}  [^\n]*\n?)*)", block, re.MULTILINE)
        block = start[1] if start else ""
    return ""


def _moment(value: Any) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(str(value))
        return moment.astimezone(datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON - 1]}…"
