"""One run as a row of the list of all runs: from the files it left, quickly, and whatever state they are in.

Thousands of runs must come in seconds, so files are not parsed whole as for a run's own report: of a finished run's
log only the validations are read, of config.yaml only the lines that are shown.
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import re
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmlab.journal import RunDir
from lmlab.records import STOPPED_CODES
from lmlab.tracking import plots
from lmlab.tracking.report import is_run

_MAX_TEXT = 200

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
    max_steps = setting(config, "trainer", "max_steps")
    return Run(
        path=path,
        name=path.rpartition("/")[2],
        task=setting(config, "task") or path.partition("/")[0],
        status=status,
        reason=shortened(reason),
        notes=shortened(", ".join(broken)),
        started=_moment(info.get("started")),
        step=log.step,
        max_steps=int(max_steps) if max_steps.isdecimal() and max_steps.isascii() else None,
        adapter=setting(config, "adapter", "kind"),
        quant=setting(config, "quant", "kind"),
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
    with open(_no_pipe(path), "rb") as file:
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
    if isinstance(row, dict) and isinstance(row.get("step"), int) and abs(row["step"]) < 2**53:
        rows.append(row)
        return True
    return row is None


def _no_pipe(path: Path) -> Path:
    if path.is_fifo():  # opening one waits without end for somebody to write
        raise OSError(errno.ESPIPE, "a pipe", str(path))
    return path


def _text(path: Path, broken: list[str]) -> str:
    try:
        return _no_pipe(path).read_text(encoding="utf-8", errors="replace")
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


def setting(config: str, *names: str) -> str:
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


def shortened(text: str) -> str:
    """On one line, and no longer than a cell of the table bears."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
