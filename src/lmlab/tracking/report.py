"""The report of one run: run_dir/report.html, made from the run's local files and nothing else.

Reads whatever is there, because the report of a run that died is the one that matters most: a missing or torn
file is said on the page and never stops it. The price of using no service and no library of the training is that
the page is a snapshot: it does not follow a run that goes on.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmlab.records import STOPPED_CODES, UserError
from lmlab.tracking import layer_plots, plots
from lmlab.tracking.data_view import DataView, Lengths, Shown
from lmlab.tracking.pages import Shell, draw_all, templates, write_page
from lmlab.tracking.plots import short
from lmlab.tracking.sample_view import sample_groups
from lmlab.tracking.values import aligned, as_written, counted, duration, flatten

RUN_FILES = ("metrics.jsonl", "samples.jsonl", "summary.json", "data_report.json", "config.yaml", "run.json")
_WENT_WELL = {"finished", "completed", "complete", "success", "succeeded", "ok", "done"}
_WENT_WRONG = {"failed", "error", "crashed", "killed", "nonfinite", "diverged"}


@dataclass(frozen=True)
class Tile:
    """One key figure: what, how much, and a second line that puts it in proportion."""

    label: str
    value: str
    note: str = ""


@dataclass
class RunFiles:
    """What could be read of a run, and what has to be said about the rest."""

    directory: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    preview: str = ""
    examples: list[Any] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` in one piece and return its path.

    Raises:
        UserError: ``run_dir`` is no run directory, or cannot be written to.
    """
    run_dir = Path(run_dir)
    if not is_run(run_dir):
        what = "no run directory" if run_dir.is_dir() else "no such directory"
        raise UserError(
            what, where=str(run_dir), fix="give a directory that train.py made, e.g. outputs/sft/NAME"
        )
    return write_page(run_dir / "report.html", render(read_run(run_dir)))


def is_run(path: Path) -> bool:
    """Whether a directory has any of a run's files."""
    return any((path / name).is_file() for name in RUN_FILES)


def read_run(run_dir: Path) -> RunFiles:
    """Read a run's files as far as they go."""
    run = RunFiles(run_dir)
    run.metrics = _read_lines(run, "metrics.jsonl")
    run.samples = _read_lines(run, "samples.jsonl")
    if (run_dir / "layers.jsonl").exists():  # a run may go without
        run.layers = _read_lines(run, "layers.jsonl")
    run.summary = _read_object(run, "summary.json")
    run.data = _read_object(run, "data_report.json")
    run.run = _read_object(run, "run.json")
    run.config = _read_text(run, "config.yaml") or ""
    run.preview = _read_text(run, "mask_preview.txt") or ""
    run.examples = _read_examples(run)
    for before, after in zip(run.metrics, run.metrics[1:], strict=False):
        if after["step"] < before["step"]:
            run.notices.append(f"The log goes back from step {before['step']} to step {after['step']}: the run was "
                               "resumed there. Of steps logged twice the later values are shown.")  # fmt: skip
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        values = [(row["step"], plots.number(row[name])) for row in run.metrics if name in row]
        bad = [step for step, value in values if value is None or not math.isfinite(value)]
        if bad:
            run.notices.append(f"{name} is not a finite number at {counted(len(bad), 'log point')}, first at step "
                               f"{bad[0]}. The curves leave these out.")  # fmt: skip
    return run


def read_layers(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of layers.jsonl as far as they can be read."""
    return _read_lines(RunFiles(run_dir), "layers.jsonl")


def _read_text(run: RunFiles, name: str) -> str | None:
    try:
        with open(run.directory / name, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        run.missing.append(name)
    except OSError as error:
        run.notices.append(f"{name} cannot be read: {error.strerror}.")
    return None


def _read_object(run: RunFiles, name: str) -> dict[str, Any]:
    text = _read_text(run, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    run.notices.append(f"{name} is incomplete or not a JSON object: it is ignored.")
    return {}


def _read_examples(run: RunFiles) -> list[Any]:
    """mask_preview.json; where it is absent or torn, mask_preview.txt says the same with less colour."""
    try:
        value = json.loads((run.directory / "mask_preview.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return value if isinstance(value, list) else []


def _read_lines(run: RunFiles, name: str) -> list[dict[str, Any]]:
    # Split at \n only: str.splitlines would also cut at characters that may stand inside a JSON string.
    lines = [line for line in (_read_text(run, name) or "").split("\n") if line.strip()]
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int) and abs(row["step"]) < 2**53:
            rows.append(row)
        else:
            bad.append(place)
    if bad and bad[-1] == len(lines):
        run.notices.append(
            f"The last line of {name} is cut off (line {bad.pop()}): that line alone is ignored."
        )
    if bad:
        run.notices.append(f"{name}: {counted(len(bad), 'broken line')} ignored, the first is line {bad[0]}.")
    return rows


def status(run: RunFiles) -> dict[str, str]:
    """How the run ended: a word, ``good``/``bad``/``open`` for its looks, and what is known about why."""
    code, word = run.summary.get("exit_code"), str(run.summary.get("status") or "")
    reason = [str(run.summary[name]) for name in ("error", "reason", "message") if run.summary.get(name)]
    trace = str(run.summary.get("traceback") or "")
    if code in STOPPED_CODES or word.lower() in ("interrupted", "running"):
        kind = "open"
    elif code not in (None, 0) or word.lower() in _WENT_WRONG:
        kind = "bad"
    else:
        kind = "good" if code == 0 or word.lower() in _WENT_WELL else "open"
    last = max((row["step"] for row in run.metrics), default=None)
    facts = [f"exit code {code}"] if code is not None else []
    facts += [f"last logged step {last:,}"] if last is not None else []
    if not run.summary or word.lower() == "running":
        reason += [
            "No final summary.json was written: the run is still going, or it ended too suddenly to write it."
        ]
    return {"kind": kind, "word": word or ("unknown" if code is None else "failed" if code else "finished"),
            "facts": ", ".join(facts), "reason": "\n".join(reason), "trace": trace}  # fmt: skip


def key_figures(run: RunFiles) -> list[Tile]:
    """The tiles at the top; one that has no data is left out."""
    flat = flatten(run.summary)
    tiles: list[Tile] = []
    best, losses = plots.best_validation(run.metrics), plots.series(run.metrics, "val/loss")
    if best:
        start = f", from {short(losses[0])} at step 0" if 0 in losses else ""
        tiles.append(Tile("Best val/loss", short(best[1]), f"at step {best[0]:,}{start}"))
    elif losses:
        step, value = list(losses.items())[-1]
        tiles.append(
            Tile("val/loss", short(value), f"at step {step:,}, before any training" if step == 0 else "")
        )
    if train := list(plots.series(run.metrics, "train/loss").items()):
        recent = [value for _, value in train[-10:]]
        note = f"at step {train[-1][0]:,}; mean of the last {len(recent)} log points {short(statistics.mean(recent))}"
        tiles.append(Tile("Final train/loss", short(train[-1][1]), note))
    for label, name in (("Bits per byte", "val/bits_per_byte"), ("Perplexity", "val/perplexity"),
                        ("Exact match", "val/exact_match")):  # fmt: skip
        if values := plots.series(run.metrics, name):
            at = best[0] if best and best[0] in values else max(values)
            form = (lambda v: f"{v:.1%}") if name == "val/exact_match" else short
            start = f", from {form(values[0])} at step 0" if 0 in values and at else ""
            tiles.append(Tile(label, form(values[at]), f"at step {at:,}{start}"))
    return tiles + _cost_figures(run, flat)


def _cost_figures(run: RunFiles, flat: Mapping[str, Any]) -> list[Tile]:
    tiles: list[Tile] = []
    if speed := list(plots.series(run.metrics, "perf/tokens_per_second").values()):
        tiles.append(
            Tile("Tokens per second", short(round(statistics.median(speed))), "median, padding not counted")
        )
    if peaks := plots.phase_peaks([*run.metrics, flat]):
        top = max(peaks, key=lambda bar: bar.value)
        gpu = any("memory/vram_allocated_gb" in row for row in run.metrics)
        tiles.append(
            Tile("Peak GPU memory" if gpu else "Peak memory", f"{short(top.value)} GB", f"in {top.label}")
        )
    elif rss := plots.series(run.metrics, "memory/rss_gb"):
        tiles.append(
            Tile("Peak memory", f"{short(max(rss.values()))} GB", "of the process, at the log points")
        )
    total, trained = (plots.number(flat.get(f"model/params_{kind}", "")) for kind in ("total", "trainable"))
    if trained is not None:
        share = f"{trained / total:.2%} of {short(total)}" if total else ""
        tiles.append(Tile("Trained parameters", short(trained), share))
    if (bits := plots.number(flat.get("model/base_bits_per_param", ""))) is not None:
        size = plots.number(flat.get("model/base_bytes", ""))
        note = f"the base is stored in {short(size / 1e6)} MB" if size else ""
        tiles.append(Tile("Bits per base parameter", short(bits), note))
    times = [plots.number(row.get("time", "")) for row in run.metrics]
    if times := [time for time in times if time is not None and math.isfinite(time)]:
        tokens = plots.series(run.metrics, "train/tokens")
        note = (
            f"{short(max(tokens.values()))} tokens trained on; the time has validations and samples in it"
            if tokens
            else ""
        )
        tiles.append(Tile("Time to the last log point", duration(max(times)), note))
    return tiles


def validations(run: RunFiles) -> dict[str, Any]:
    """The validation metrics as a table: the numbers behind the curve, for reading and copying."""
    names = [name for row in run.metrics for name in row if name.startswith("val/")]
    columns = {name: plots.series(run.metrics, name) for name in dict.fromkeys(names)}
    columns = {name: points for name, points in columns.items() if points}
    best = plots.best_validation(run.metrics)
    steps = sorted({step for points in columns.values() for step in points})
    rows = [
        (step, [aligned(points[step]) if step in points else "–" for points in columns.values()])
        for step in steps
    ]
    return {"columns": list(columns), "rows": rows, "best": best[0] if best else None}


def length_panel(lengths: Lengths) -> plots.Panel:
    """The histogram of tokens per document."""
    return plots.Panel(
        "lengths", "Tokens per document", bins=(lengths.edges, lengths.counts), middle=lengths.median
    )


def mask_page(examples: Sequence[Shown]) -> str:
    """A page of the examples alone, with the trained spans marked, as W&B shows it in a panel."""
    return templates().get_template("mask.html.jinja").render(examples=examples)


def render(run: RunFiles) -> str:
    """The page as one string."""
    argv = run.run.get("argv")
    data = DataView.of(run.data, run.examples)
    drawn, undrawn = draw_all(plots.panels(run.metrics, flatten(run.summary)))
    curves, no_curves = draw_all(layer_plots.panels(run.metrics))
    maps, no_maps = draw_all(layer_plots.heat_maps(run.layers), layer_plots.draw)
    lengths, no_lengths = draw_all([length_panel(data.lengths)] if data.lengths else [])
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            shell=Shell(),
            name=run.directory.resolve().name,
            command=" ".join(map(str, argv)) if isinstance(argv, list) else str(argv or ""),
            status=status(run),
            tiles=key_figures(run),
            notices=run.notices + undrawn + no_curves + no_maps + no_lengths,
            missing=run.missing,
            panels=drawn,
            layers={"drawn": maps + curves, "rows": layer_plots.newest(run.layers)},
            validation=validations(run),
            samples=sample_groups(run.samples),
            data=data,
            data_warnings=data.warnings(
                masked=re.search(r"^task: sft$", run.config, re.MULTILINE) is not None
            ),
            lengths=lengths,
            preview=run.preview,
            config=run.config,
            summary=[
                (name, as_written(value))
                for name, value in flatten(run.summary).items()
                if name != "traceback"
            ],
            environment=[(name, as_written(value)) for name, value in flatten(run.run).items()],
        )
    )
