"""The page that compares runs: a sweep's or any others', from their local files and nothing else.

`write_comparison` makes report.html of a multirun and of ``scripts/report.py RUN RUN...``. It reads each run as its own
report does, so what is torn or missing is said and never stops it; it recomputes everything and keeps nothing.
"""

from __future__ import annotations

import difflib
import itertools
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmlab.records import UserError
from lmlab.tracking import claims, curves, group_plots, groups, plots
from lmlab.tracking.groups import MEASURES, Entry, Group, Measure, Result, Spread
from lmlab.tracking.pages import Shell, draw_all, templates, write_page
from lmlab.tracking.values import aligned, as_written, scaled

PAIRED = ("val/loss", "best", "bits_per_byte", "exact_match", "peak", "growth", "speed")
SHOWN_OF_A_RUN = ("val/loss", "best", "exact_match", "peak", "wall")


def write_comparison(
    folder: Path, entries: Sequence[Entry], *, title: str, baseline: str | None = None
) -> Path:
    """Write ``folder/report.html``, which compares the entries, in one piece, and return its path.

    Args:
        baseline: label of the group that others are compared with; the first one that has figures if None.

    Raises:
        UserError: there is no such group, or the folder cannot be written to.
    """
    folder = Path(folder)
    return write_page(folder / "report.html", render(entries, title=title, baseline=baseline, folder=folder))


def render(
    entries: Sequence[Entry], *, title: str, baseline: str | None = None, folder: Path | None = None
) -> str:
    """The page as one string; ``folder`` is where it will lie, for links to the runs' own pages."""
    results = [groups.read_result(entry) for entry in entries]
    made = groups.grouped(results)
    base = _baseline(made, baseline)
    groups.colour(made, base)
    shown_groups = [group for group in made if group.colour is not None]
    drawn = {
        axis: draw_all(panels, group_plots.draw) for axis, panels in group_plots.curve_panels(made).items()
    }
    memory, no_memory = draw_all(group_plots.memory_panels(made), group_plots.draw)
    scatter, no_scatter = draw_all(group_plots.scatter_panels(made), group_plots.draw)
    undrawn = [line for _, failures in drawn.values() for line in failures] + no_memory + no_scatter
    checked = claims.claims(made)
    return templates().get_template("compare.html.jinja").render(
        title=title,
        shell=Shell(),
        tally=_tally(results),
        notices=undrawn + _notices(made, results),
        groups=made,
        shown_groups=shown_groups,
        baseline=base,
        glyphs=group_plots.GLYPHS,
        settings=_settings(made),
        shared=[(key, as_written(value)) for key, value in groups.shared(made)],
        summary=summary_table(made),
        paired=paired_table(made, base),
        axes=[(axis, drawn[axis.key][0]) for axis in curves.AXES if axis.key in drawn],
        budgets=_budgets(made),
        memory=memory,
        scatter=scatter,
        samples=sample_rows(shown_groups),
        figures=_all_figures(shown_groups, base),
        claims=checked,
        criteria={about: text for about, text in claims.CRITERIA.items() if any(c.about == about for c in checked)},
        verdicts=_counts(claim.verdict for claim in checked),
        alone=claims.without_full_tuning(made),
        jobs=[_job(result, folder) for result in results],
        job_columns=[measure.title for measure in _chosen(SHOWN_OF_A_RUN)],
    )  # fmt: skip


def _baseline(made: Sequence[Group], label: str | None) -> Group | None:
    if label is None:
        return next((group for group in made if group.finished), next((g for g in made if g.counted), None))
    for group in made:
        if group.label == label:
            return group
    names = [group.label for group in made]
    near = difflib.get_close_matches(label, names, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(map(repr, names)) or 'none'}"
    raise UserError(f"no group is called {label!r}", where="--baseline", fix=fix)


def _chosen(keys: Sequence[str]) -> list[Measure]:
    return [measure for measure in MEASURES if measure.key in keys]


def _counts(words: Any) -> list[tuple[str, int]]:
    """``[("finished", 8), ("refused", 1)]``, in the order in which they first come."""
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return list(found.items())


def _tally(results: Sequence[Result]) -> list[tuple[str, int]]:
    return _counts(result.status for result in results)


def _notices(made: Sequence[Group], results: Sequence[Result]) -> list[str]:
    notices = [f"{group.label}: {group.note}; figures are of the finished runs only."
               for group in made if group.note and group.finished]  # fmt: skip
    grey = sum(group.colour is None for group in made)
    if grey:
        notices.append(f"{grey} of {len(made)} groups are drawn in grey and have no samples or plots of memory here: "
                       f"those with the highest best val/loss.")  # fmt: skip
    for first, second in itertools.combinations([group for group in made if group.by_seed("val/loss")], 2):
        if first.by_seed("val/loss") == second.by_seed("val/loss"):
            notices.append(f"{first.label} and {second.label} have the same val/loss for every seed: their curves "
                           "lie on one another.")  # fmt: skip
    seeds = {seed for group in made for seed in group.seeds}
    if made and len(seeds) < 2:
        notices.append("One seed: differences may be chance, there is no spread to judge them by.")
    if not any("val/loss" in result.figures for result in results):
        notices.append("No run has a val/loss.")
    return notices


def _settings(made: Sequence[Group]) -> list[tuple[str, list[str], bool]]:
    """Settings that differ, a value for each group, and whether the key tells groups apart that have it."""
    telling = set(groups.telling(made))
    rows = [(key, [as_written(g.settings.get(key)) if g.settings else "?" for g in made], key in telling)
            for key in groups.varying(made)]  # fmt: skip
    return sorted(rows, key=lambda row: not row[2])


def _cell(spread: Spread | None, show: Any, *, best: bool = False, between: str = "–") -> dict[str, Any]:
    if spread is None:
        return {"value": "", "text": "–", "range": "", "best": False}
    low, high = show(spread.low), show(spread.high)
    # Values that are the same to the digits shown have no range worth a line.
    return {
        "value": spread.mean,
        "text": show(spread.mean),
        "range": "" if low == high else f"{low}{between}{high}",
        "best": best,
    }


def summary_table(made: Sequence[Group]) -> dict[str, Any]:
    """A row for each group, a column for each figure that any has; the best mean of a column is marked."""
    measures = [measure for measure in MEASURES if any(group.spread(measure.key) for group in made)]
    best: dict[str, float] = {}
    for measure in measures:
        means = [spread.mean for group in made if group.finished and (spread := group.spread(measure.key))]
        if measure.better and len(set(means)) > 1:
            best[measure.key] = min(means) if measure.better == "lower" else max(means)
    rows = []
    for group in made:
        spreads = [(measure, group.spread(measure.key)) for measure in measures]
        cells = [
            _cell(s, m.show, best=s is not None and bool(group.finished) and s.mean == best.get(m.key))
            for m, s in spreads
        ]
        rows.append((group, cells))
    return {"columns": [measure.title for measure in measures], "rows": rows}


def _signed(measure: Measure, value: float) -> str:
    if measure.key == "exact_match":
        return f"{100 * value:+.1f}"
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+#.3g}"


def paired_table(made: Sequence[Group], base: Group | None) -> dict[str, Any]:
    """Differences of each group to the baseline, paired by seed."""
    others = [group for group in made if group is not base] if base is not None else []
    pairs = (
        {(g.place, key): claims.paired(g, base, key) for g in others for key in PAIRED}
        if base is not None
        else {}
    )
    measures = [m for m in _chosen(PAIRED) if any(pairs[g.place, m.key].spread for g in others)]
    rows = []
    for group in others:
        mine = [(measure, pairs[group.place, measure.key]) for measure in measures]
        seeds = sorted({seed for _, pair in mine for seed in pair.differences})
        alone = sorted({seed for _, pair in mine for seed in pair.alone})
        cells = [
            _cell(pair.spread, lambda value, m=measure: _signed(m, value), between=" to ")
            for measure, pair in mine
        ]
        if seeds:
            rows.append((group, seeds, alone, cells))
    titles = [f"{m.title}, points" if m.key == "exact_match" else m.title for m in measures]
    return {"columns": titles, "rows": rows}


def _budgets(made: Sequence[Group]) -> dict[str, Any]:
    found = curves.budgets(made)
    rows = [(group, [_cell(budget.losses.get(group.place), aligned) for budget in found])
            for group in made if any(group.place in budget.losses for budget in found)]  # fmt: skip
    return {"columns": [f"{scaled(budget.amount)} {budget.axis.title}" for budget in found], "rows": rows}


def sample_rows(shown_groups: Sequence[Group]) -> dict[str, Any]:
    """The last samples of each group's first run that has any: a row for each prompt and sampler, a column for each group."""
    columns: list[tuple[Group, Result, int]] = []
    for group in shown_groups:
        result = next((result for result in group.counted if result.files.samples), None)
        if result is not None:
            columns.append((group, result, max(row["step"] for row in result.files.samples)))
    prompts: dict[str, dict[str, list[dict[str, Any] | None]]] = {}
    for place, (_, result, step) in enumerate(columns):
        for row in result.files.samples:
            if row["step"] == step:
                cells = prompts.setdefault(str(row.get("prompt", "")), {})
                cells.setdefault(str(row.get("sampler", "")), [None] * len(columns))[place] = row
    return {"columns": columns, "prompts": prompts}


def _all_figures(shown_groups: Sequence[Group], base: Group | None) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every number of summary.json: each group's mean, and how far it is from the baseline's."""
    means: dict[str, dict[int, float]] = {}
    for group in shown_groups:
        for name in dict.fromkeys(
            name for result in group.counted for name in result.flat if name != "exit_code"
        ):
            found = [
                value for r in group.counted if (value := plots.number(r.flat.get(name, ""))) is not None
            ]
            finite = [value for value in found if abs(value) < float("inf")]
            if finite:
                means.setdefault(name, {})[group.place] = groups.mean(finite)
    rows = []
    for name, values in means.items():
        of_base = None if base is None else values.get(base.place)
        cells = []
        for group in shown_groups:
            value = values.get(group.place)
            text = "–" if value is None else plots.short(value)
            away = ""
            if value is not None and of_base and group is not base and value != of_base:
                away = f"{(value - of_base) / abs(of_base):+.1%}"
            cells.append({"text": text, "away": away})
        rows.append((name, cells))
    return rows


def _job(result: Result, folder: Path | None) -> dict[str, Any]:
    steps = [row["step"] for row in result.files.metrics]
    cells = [{"value": result.figures.get(m.key, ""), "text": m.show(result.figures[m.key]) if m.key in result.figures else "–"}
             for m in _chosen(SHOWN_OF_A_RUN)]  # fmt: skip
    kind = "good" if result.finished else "bad" if result.status in ("failed", "error") else "open"
    return {"label": result.entry.label, "link": _link(result, folder), "seed": result.seed, "status": result.status,
            "kind": kind, "reason": result.reason, "notices": result.notices if result.entry.folder is not None else [],
            "step": max(steps, default=None), "cells": cells}  # fmt: skip


def _link(result: Result, folder: Path | None) -> str:
    """The run's own page, relative to where this one lies."""
    page = None if result.entry.folder is None else result.entry.folder / "report.html"
    if folder is None or page is None or not page.is_file():
        return ""
    try:
        return "./" + urllib.parse.quote(Path(os.path.relpath(page.absolute(), folder.absolute())).as_posix())
    except (ValueError, UnicodeError):  # another drive, or a name that is no text
        return ""
