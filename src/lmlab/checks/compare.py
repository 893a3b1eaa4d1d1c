"""Two runs held against each other: what they logged and what they ended in, bit for bit, with the size of what differs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmlab.checks.sizes import largest
from lmlab.journal import RunDir

MEASURED = ("time", "perf/", "memory/")
"""Beginnings of what differs between two runs of the same numbers."""
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
"""Parts of a checkpoint."""


def run_worker(
    run: RunDir, *, quiet: bool, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Train a run that was made, in a fresh process.

    Args:
        quiet: its output is kept in what is returned instead of shown.
        environment: over this process's own.
    """
    return subprocess.run(
        [sys.executable, "-m", "lmlab.worker", str(run.path)],
        env={**os.environ, **(environment or {})},
        capture_output=quiet,
        text=True,
        check=False,
    )


class Difference(NamedTuple):
    """``text`` says what differs and how; ``size`` by how much, infinite for what has no size (a missing line)."""

    text: str
    size: float


def compare_runs(
    one: RunDir, other: RunDir, *, after: int = 0, upto: int | None = None, both_fresh: bool = False
) -> Iterator[str]:
    """The texts of `differences`."""
    for difference in differences(one, other, after=after, upto=upto, both_fresh=both_fresh):
        yield difference.text


def differences(
    one: RunDir,
    other: RunDir,
    *,
    after: int = 0,
    upto: int | None = None,
    both_fresh: bool = False,
    logs: Sequence[str] = ("metrics", "samples", "layers"),
) -> Iterator[Difference]:
    """Everything that differs between two runs beyond step ``after``, and in their last checkpoints.

    Args:
        upto: the step at which ``other`` was ended early. What its end added there (a validation, samples) is left out,
            and the checkpoints compared are those of that step, if both have one.
        both_fresh: neither goes on from the other, so of the random states only torch's are compared: Python's own is
            drawn from by libraries that have nothing to do with training (W&B).
        logs: whose lines are compared.
    """
    import torch

    for name in logs:
        rows = logged_rows(one, other, name, after=after, upto=upto)
        if rows[0] != rows[1]:
            pairs = [(a, b) for a, b in zip(*rows, strict=False) if a != b]
            first = (
                f"{pairs[0][0]} against {pairs[0][1]}"
                if pairs
                else f"{len(rows[0])} and {len(rows[1])} lines"
            )
            alike = len(rows[0]) == len(rows[1])
            size = largest(_rows_apart(a, b) for a, b in pairs) if alike else math.inf
            yield Difference(f"{name}.jsonl: {first[:300]}", size)
    last = [sorted(path.name for path in run.checkpoints.glob("step-*")) for run in (one, other)]
    common = common_checkpoint(one, other, upto=upto)
    if common is None:
        if upto is None:
            named = " and ".join(names[-1] if names else "none" for names in last)
            yield Difference(f"the last checkpoints are {named}", math.inf)
        return
    paths = [run.checkpoints / common / "state.pt" for run in (one, other)]
    states = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    for state in states if both_fresh else ():
        state["rng"] = [
            {name: rank.get(name) for name in ("torch", "cuda")} for rank in state.get("rng") or []
        ]
    for part in COMPARED:
        yield from _differences(part, states[0].get(part), states[1].get(part))


def _rows_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative difference of two logged lines' values."""
    if one.keys() != other.keys():
        return math.inf
    return largest(_apart(one[name], other[name]) for name in one)


def common_checkpoint(one: RunDir, other: RunDir, *, upto: int | None = None) -> str | None:
    """The checkpoint that both runs end in (both have of step ``upto``), None if there is none."""
    names = [{path.name for path in run.checkpoints.glob("step-*")} for run in (one, other)]
    if upto is not None:
        wanted = f"step-{upto:08d}"
        return wanted if wanted in names[0] & names[1] else None
    last = {max(found, default="") for found in names}
    return (last.pop() or None) if len(last) == 1 else None


def logged_rows(
    one: RunDir, other: RunDir, name: str, *, after: int, upto: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of ``name``.jsonl of two runs that can be compared, without what is measured; see `compare_runs`."""
    mine, its = (list(_numbers(getattr(run, name), after, upto)) for run in (one, other))
    if upto is not None:
        known = {_identity(row) for row in mine}
        its = [row for row in its if row["step"] < upto or _identity(row) in known]
    return mine, its


def _numbers(file: Path, after: int, upto: int | None) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        try:
            row = {name: value for name, value in json.loads(line).items() if not name.startswith(MEASURED)}
            compared = after < row["step"] <= (math.inf if upto is None else upto)
        except (ValueError, AttributeError, KeyError, TypeError):  # torn by a kill, so not there
            continue
        if compared and row.keys() != {"step"}:  # every start measures what loading took
            yield row


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a line is about, whatever its numbers are."""
    return (row["step"], *sorted(row), row.get("prompt_id"), row.get("sampler"), row.get("layer"))


@dataclass(frozen=True)
class Agreement:
    """How far one metric of two runs agrees.

    Attributes:
        points: log points that both have.
        missing: those that one of them lacks.
        largest: relative difference, 0.0 if all are equal bit for bit; infinite where one is a number and one is not.
        step: where that is.
    """

    name: str
    points: int
    missing: int
    largest: float
    step: int | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs and nothing is missing."""
        return not self.missing and self.largest == 0.0


def metric_agreement(one: RunDir, other: RunDir, *, after: int, upto: int | None = None) -> list[Agreement]:
    """Every metric of two runs' metrics.jsonl, in the order of the first; for the arguments see `compare_runs`."""
    rows = logged_rows(one, other, "metrics", after=after, upto=upto)
    names = dict.fromkeys(name for side in rows for row in side for name in row if name != "step")
    found = []
    for name in names:
        mine, its = ({row["step"]: row[name] for row in side if name in row} for side in rows)
        apart = {step: _apart(mine[step], its[step]) for step in mine if step in its}
        worst = max(apart, key=lambda step: apart[step], default=None)
        largest = 0.0 if worst is None else apart[worst]
        missing = len(mine.keys() ^ its.keys())
        found.append(Agreement(name, len(apart), missing, largest, worst if largest else None))
    return found


def _apart(one: Any, other: Any) -> float:
    """Relative difference of two logged values; infinite where that is no number, as of NaN to anything."""
    if one == other:
        return 0.0
    if not all(isinstance(value, int | float) for value in (one, other)):
        return math.inf
    return largest([abs(one - other) / max(abs(one), abs(other))])


def _differences(path: str, one: Any, other: Any) -> Iterator[Difference]:
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            yield from _differences(f"{path}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{index}]", a, b)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            shapes = f"{tuple(one.shape)} {one.dtype} against {tuple(other.shape)} {other.dtype}"
            yield Difference(f"{path}: {shapes}", math.inf)
        elif not torch.equal(one, other):
            size = largest([float((one.double() - other.double()).abs().max())])
            yield Difference(f"{path}: apart by up to {size:.3g}", size)
    elif one != other:
        yield Difference(f"{path}: {str(one)[:80]} against {str(other)[:80]}", _apart(one, other))
