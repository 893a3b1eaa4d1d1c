"""Results as tables: for a terminal of 80 columns, as markdown for a file. The first row is what the others are held against."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from lmlab.tracking.figure_table import print_figures

Columns = Sequence[tuple[str, str, str]]
"""Heading, figure, format."""
PERPLEXITY = "perplexity"
"""Two decimals up to 1,000, three digits beyond: that of an untrained model has many, and none of them tells anything."""
MAX_NAME = 16
"""Characters of a row's name on the terminal."""
QUALITY: Columns = (
    ("loss", "loss", ".4f"),
    ("ppl", "perplexity", PERPLEXITY),
    ("bits/byte", "bits_per_byte", ".4f"),
    ("EM", "exact_match", ".3f"),
    ("R-1", "rouge1", ".3f"),
    ("R-2", "rouge2", ".3f"),
    ("R-L", "rougeL", ".3f"),
)
COST: Columns = (
    ("base MB", "base_mb", ",.1f"),
    ("bits/param", "bits_per_param", ".3f"),
    ("peak GB", "peak_gb", ".2f"),
    ("read tok/s", "tokens_per_second", ",.0f"),
    ("new tok/s", "new_tokens_per_second", ",.0f"),
)
DIFFERENCES = ("loss", "exact_match")
"""Figures whose difference to the first row has a column of its own; all of them are in results.json."""


def row_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each row: the form, with the model where there are several, numbered where two are equal."""
    models = {result["model"] for result in results}
    names = []
    for result in results:
        short = os.path.basename(os.path.normpath(result["model"]))
        names.append(
            result["form"]
            if len(models) == 1
            else short
            if result["form"] == "as trained"
            else f"{short} {result['form']}"
        )
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def tables(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headings, rows) per data set, for the tasks of the harness, and for what the rows cost."""
    names, made = row_names(results), []
    for data in results[0]["data"]:
        figures = [result["data"][data] for result in results]
        made.append(_table(data, names, figures, QUALITY, differences=DIFFERENCES))
    if results[0]["suites"]:
        figures = [
            {
                f"{task} {metric}": value
                for task, each in result["suites"].items()
                for metric, value in each.items()
            }
            for result in results
        ]
        keys = list(dict.fromkeys(key for each in figures for key in each))
        # Tasks go down: there may be many of them, and few rows.
        made.append(
            (
                "tasks",
                ["task", *names],
                [[key, *(_cell(each.get(key), ".4f") for each in figures)] for key in keys],
            )
        )
    made.append(_table("cost", names, [_costs(result) for result in results], COST))
    return made


def _costs(result: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(result["data"].values()), {})
    speeds = {key: first[key] for key in ("tokens_per_second", "new_tokens_per_second") if key in first}
    return {**result["cost"], "base_mb": result["cost"]["base_bytes"] / 1e6, **speeds}


def _table(
    title: str,
    names: list[str],
    figures: Sequence[Mapping[str, Any]],
    columns: Columns,
    *,
    differences: Sequence[str] = (),
) -> tuple[str, list[str], list[list[str]]]:
    shown = [c for c in columns if any(each.get(c[1]) is not None for each in figures)]
    headings = [""]
    rows = [[name] for name in names]
    for heading, key, form in shown:
        headings.append(heading)
        for row, each in zip(rows, figures, strict=True):
            row.append(_cell(each.get(key), form))
        if key in differences and any(_same_records(each, figures[0]) for each in figures[1:]):
            headings.append(f"Δ {heading}")
            for row, each in zip(rows, figures, strict=True):
                first = figures[0].get(key) if _same_records(each, figures[0]) else None
                row.append(_cell(_difference(each.get(key), first), "+" + form))
    for row in rows[:1]:  # against itself
        row[:] = ["" if headings[i].startswith("Δ") else cell for i, cell in enumerate(row)]
    return title, headings, rows


def _same_records(figures: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether two rows' figures are of the same records: what runs held out of their own data may not be."""
    return figures.get("held_out") == first.get("held_out")


def _difference(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value - first


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return ""
    if form == PERPLEXITY:
        return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
    return format(value, form)


def with_differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as JSON values, each with ``differences``: its figures less the first row's, by data set and by task."""
    kinds = ("data", "suites")
    found = []
    for row in rows:
        differences = {
            name: {
                key: value - rows[0][kind][name][key]
                for key, value in figures.items()
                if _is_number(value)
                and _is_number(rows[0][kind].get(name, {}).get(key))
                and _same_records(figures, rows[0][kind][name])
            }
            for kind in kinds
            for name, figures in row[kind].items()
        }
        found.append({**row, "differences": differences})
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _notes(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(data set, and of which rows where they differ; what is to be known)."""
    said = []
    names = row_names(results)
    for data in results[0]["notes"]:
        figures = [result["data"][data] for result in results]
        apart = [
            name for name, each in zip(names, figures, strict=True) if not _same_records(each, figures[0])
        ]
        if apart:
            said.append((data, f"not the first row's records in {', '.join(apart)}, so no difference to it"))
        of_rows: dict[str, list[str]] = {}
        for name, result in zip(names, results, strict=True):
            of_rows.setdefault("; ".join(result["notes"][data]), []).append(name)
        for notes, names in of_rows.items():
            said.append((data if len(of_rows) == 1 else f"{data}, {', '.join(names)}", notes))
    return said


def show(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """Print the notes on the data and all tables."""
    for about, notes in _notes(results):
        console.print(Text(f"{about}: {notes}"), soft_wrap=True)
    for title, headings, rows in tables(results):
        clipped = [
            (name if len(name) <= MAX_NAME or title == "tasks" else name[: MAX_NAME - 1] + "…", *cells)
            for name, *cells in rows
        ]
        print_figures(console, title, headings, clipped)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The same for a file."""
    lines = []
    for about, notes in _notes(results):
        lines.append(f"- **{_escaped(about)}**: {_escaped(notes)}")
    for title, headings, rows in tables(results):
        lines += ["", f"## {_escaped(title)}", ""]
        lines.append("| " + " | ".join(map(_escaped, headings)) + " |")
        lines.append("|" + " --- |" + " ---: |" * (len(headings) - 1))
        lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
