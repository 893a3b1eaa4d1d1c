"""The page of all runs below a folder, outputs/index.html: a row each, sweeps as groups of rows, what is broken said.

`write_index` makes the file; `lmlab.tracking.serve` makes the same page anew for everyone who asks.
"""

from __future__ import annotations

import datetime
import hashlib
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lmlab.records import UserError
from lmlab.tracking.pages import Shell, templates, write_page
from lmlab.tracking.plots import short
from lmlab.tracking.run_row import FIGURES, Run
from lmlab.tracking.runs import Reader, Runs, Sweep
from lmlab.tracking.values import aligned

INDEX = "index.html"
_LOOKS = {"finished": ("good", "✓"), "running": ("now", "▶"), "failed": ("bad", "✗"), "error": ("bad", "✗"),
          "interrupted": ("open", "‖"), "refused": ("open", "–"), "unknown": ("open", "?")}  # fmt: skip
_ORDER = ("running", "failed", "error", "interrupted", "unknown", "finished")
_SHOW: dict[str, Callable[[float], str]] = {
    "val/loss": aligned,
    "val/bits_per_byte": aligned,
    "model/params_trainable": lambda value: short(round(value)),
    "memory/peak_gb": lambda value: f"{value:.2f}",
    "perf/tokens_per_second_median": lambda value: short(round(value)),
}
_OF_A_SWEEP = ("val/loss", "val/bits_per_byte", "memory/peak_gb")
_WIDTH, _HEIGHT, _POINTS = 96, 24, 48


def write_index(root: Path) -> Path:
    """Write ``root/index.html`` in one piece and return its path.

    Raises:
        UserError: the folder cannot be written to, or has an index.html of somebody else.
    """
    page = Path(root) / INDEX
    if page.is_file() and Shell.mark not in page.read_text(encoding="utf-8", errors="replace"):
        fix = "move it away, or list another folder"
        raise UserError("an index.html that is not lmlab's stands there", where=str(page), fix=fix)
    return write_page(page, render(Reader(root).read()))


def render(runs: Runs, *, live: bool = False) -> str:
    """The page as one string; ``live`` if a server makes it, so that its rows may follow the runs."""
    things = [
        _sweep(thing, live) if isinstance(thing, Sweep) else _alone(thing, live)
        for thing in runs.newest_first
    ]
    every = runs.all
    return templates().get_template("runs.html.jinja").render(
        shell=Shell(live),
        live=live,
        name=runs.root.resolve().name,
        total=len(every),
        tally=_tally(run.status for run in every),
        sweeps=len(runs.sweeps),
        running=any(run.status == "running" for run in every),
        notices=runs.notices,
        columns=list(FIGURES.values()),
        things=things,
        comparisons=[(path.rpartition("/")[2], f"./{urllib.parse.quote(path, errors='replace')}/report.html") for path in runs.comparisons],
        moment="" if live else datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def sparkline(curve: Sequence[tuple[int, float]]) -> Markup:
    """val/loss over the steps as a small ``<svg>``, on a scale of its own; nothing of fewer than two points."""
    if len(curve) < 2:
        return Markup("")
    if len(curve) > _POINTS:
        curve = [curve[round(place * (len(curve) - 1) / (_POINTS - 1))] for place in range(_POINTS)]
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    low, high = min(losses), max(losses)
    across, up = (steps[-1] - steps[0]) or 1, (high - low) or 1.0
    points = [
        (2 + (_WIDTH - 4) * (step - steps[0]) / across, 2 + (_HEIGHT - 4) * (high / up - loss / up))
        for step, loss in curve
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    told = f"val/loss {aligned(losses[0])} at step {steps[0]} to {aligned(losses[-1])} at step {steps[-1]}"
    return Markup(
        '<svg class="spark" viewBox="0 0 {0} {1}" role="img" aria-label="{2}"><polyline points="{3}"/>'
        '<circle cx="{4:.1f}" cy="{5:.1f}" r="2"/></svg>'
    ).format(_WIDTH, _HEIGHT, told, line, *points[-1])


def _tally(statuses: Iterable[str]) -> list[tuple[str, int]]:
    """How many of each status, those that want to be seen first."""
    found = Counter(statuses)
    return sorted(
        found.items(), key=lambda pair: (_ORDER.index(pair[0]) if pair[0] in _ORDER else len(_ORDER), pair[0])
    )


def _alone(run: Run, live: bool) -> dict[str, Any]:
    return _versioned({"key": run.path, "lead": None, "rows": [_row(run, live)]})


def _sweep(sweep: Sweep, live: bool) -> dict[str, Any]:
    finished = sum(job.status == "finished" for job in sweep.jobs)
    starts = [job.started for job in sweep.jobs if job.started]
    figures = []
    for name in FIGURES:
        value = sweep.lowest(name) if name in _OF_A_SWEEP else None
        note = f"lowest of {finished}" if value is not None and finished > 1 else ""
        figures.append({"value": "" if value is None else value, "text": "–" if value is None else _SHOW[name](value), "note": note})  # fmt: skip
    lead = {
        "name": sweep.name,
        "link": _link(sweep.path) if sweep.page or live else "",
        "jobs": len(sweep.jobs),
        "tasks": ", ".join(sorted({job.task for job in sweep.jobs if job.task})),
        "tally": ", ".join(f"{count} {word}" for word, count in _tally(job.status for job in sweep.jobs)),
        "running": any(job.status == "running" for job in sweep.jobs),
        "started": _moment(min(starts, default=None)),
        "adapters": ", ".join(sorted({job.adapter for job in sweep.jobs if job.adapter})),
        "quants": ", ".join(sorted({job.quant for job in sweep.jobs if job.quant})),
        "figures": figures,
    }
    return _versioned(
        {"key": sweep.path or ".", "lead": lead, "rows": [_row(job, live) for job in sweep.jobs]}
    )


def _row(run: Run, live: bool) -> dict[str, Any]:
    looks, glyph = _LOOKS.get(run.status, ("open", "?"))
    figures = []
    for name in FIGURES:
        value = run.figures.get(name)
        figures.append(("" if value is None else value, "–" if value is None else _SHOW[name](value)))
    return {
        "name": run.name,
        "link": _link(run.path) if run.page or (live and run.readable) else "",
        "task": run.task,
        "status": run.status,
        "looks": looks,
        "glyph": glyph,
        "about": [line for line in (run.reason, run.notes) if line],
        "started": _moment(run.started),
        "step": run.step,
        "of": run.max_steps if run.status != "finished" else None,
        "figures": figures,
        "spark": sparkline(run.curve),
        "adapter": run.adapter,
        "quant": run.quant,
    }


def _versioned(thing: dict[str, Any]) -> dict[str, Any]:
    """With a digest of what is shown, by which a live page knows the rows that changed."""
    return {**thing, "version": hashlib.sha256(repr(thing).encode("utf-8", "replace")).hexdigest()[:12]}


def _moment(moment: datetime.datetime | None) -> tuple[float | str, str]:
    return ("", "–") if moment is None else (moment.timestamp(), moment.strftime("%Y-%m-%d %H:%M"))


def _link(path: str) -> str:
    try:
        return "./" + urllib.parse.quote(f"{path}/report.html" if path else "report.html")
    except UnicodeError:  # a name that is no text
        return ""
