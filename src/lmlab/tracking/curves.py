"""Curves of groups of runs against steps, tokens, FLOPs and seconds, and their losses at equal budgets.

Runs are logged by step; what a step is worth on the other axes is read from the log, and between log points a line is
drawn. Seconds are those of training alone, summed from tokens and tokens per second: ``time`` in metrics.jsonl also
counts loading, validation and samples, and begins again when a run is resumed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmlab.tracking import plots
from lmlab.tracking.groups import Group, Result, Spread

GRID = 240
"""Points of a band; a line is straight between them."""


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn against."""

    key: str
    title: str


AXES = (
    Axis("steps", "steps"),
    Axis("tokens", "tokens"),
    Axis("flops", "FLOPs"),
    Axis("seconds", "seconds of training"),
)


@dataclass(frozen=True)
class Curve:
    """A line through points in the order of ``x``; it may have none."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    @classmethod
    def of(cls, points: Mapping[float, float]) -> Curve:
        """The line through ``x -> y``, in any order; what overflowed is left out."""
        places = sorted(x for x, y in points.items() if math.isfinite(x) and math.isfinite(y))
        return cls(tuple(places), tuple(points[x] for x in places))

    def at(self, x: float) -> float | None:
        """The value at ``x``; None outside of the points."""
        if not self.x or not self.x[0] <= x <= self.x[-1]:
            return None
        after = bisect_left(self.x, x)
        if self.x[after] == x:
            return self.y[after]
        share = (x - self.x[after - 1]) / (self.x[after] - self.x[after - 1])
        return self.y[after - 1] * (1 - share) + self.y[after] * share


@dataclass(frozen=True)
class Band:
    """The mean of a group's curves and the lowest and highest of them, at each of ``x``."""

    group: Group
    x: tuple[float, ...]
    spreads: tuple[Spread, ...]


@dataclass(frozen=True)
class Budget:
    """val/loss of each group where all of them have used the same amount of something.

    Attributes:
        amount: the most that every run of every group reached.
        losses: by the groups' place; a group without validations has none.
    """

    axis: Axis
    amount: float
    losses: dict[int, Spread]


def worth(metrics: Sequence[dict[str, Any]], axis: str) -> Curve:
    """What had been used up to a step, as a curve over steps; of ``steps``, that is the step itself."""
    if axis == "steps":
        return Curve.of({float(row["step"]): float(row["step"]) for row in metrics})
    tokens = plots.series(metrics, "train/tokens")
    if axis == "seconds":
        return _seconds(tokens, plots.series(metrics, "perf/tokens_per_second"))
    used = tokens if axis == "tokens" else plots.series(metrics, "train/flops")
    return Curve.of({0.0: 0.0, **used}) if used else Curve((), ())


def _seconds(tokens: plots.Series, speeds: plots.Series) -> Curve:
    clock, before, found = 0.0, 0.0, {0.0: 0.0}
    for step, count in tokens.items():
        speed = speeds.get(step, 0.0)
        if speed <= 0:  # from here on nobody knows
            break
        clock += (count - before) / speed
        before = count
        found[float(step)] = clock
    return Curve.of(found) if len(found) > 1 else Curve((), ())


def curve(result: Result, metric: str, axis: str) -> Curve:
    """A run's metric against an axis. A noisy one (train/loss) is smoothed as in the run's own report."""
    metrics = result.files.metrics
    steps = plots.series(metrics, metric)
    if metric.startswith("train/") and len(steps) >= 20:
        steps = plots.thin(plots.smooth(steps))
    used = worth(metrics, axis)
    return Curve.of({x: value for step, value in steps.items() if (x := used.at(step)) is not None})


def band(group: Group, metric: str, axis: str) -> Band | None:
    """The group's counted runs as one band, where all of them have values; None if there is no such place."""
    curves = [found for result in group.counted if (found := curve(result, metric, axis)).x]
    if not curves:
        return None
    start, end = max(found.x[0] for found in curves), min(found.x[-1] for found in curves)
    grid = sorted({x for found in curves for x in found.x if start <= x <= end})
    if len(grid) > GRID:
        grid = [grid[round(place * (len(grid) - 1) / (GRID - 1))] for place in range(GRID)]
    rows = [tuple(y for found in curves if (y := found.at(x)) is not None) for x in grid]
    return Band(group, tuple(grid), tuple(Spread(row) for row in rows)) if grid else None


def budgets(groups: Sequence[Group]) -> list[Budget]:
    """val/loss of the groups' finished runs at the most tokens, FLOPs and seconds that all of them reached.

    Empty where fewer than two groups have a curve.
    """
    made = []
    for axis in AXES[1:]:
        curves: dict[int, list[Curve]] = {}
        for group in groups:
            all_of_it = [curve(result, "val/loss", axis.key) for result in group.finished]
            if found := [one for one in all_of_it if len(one.x) > 1]:
                curves[group.place] = found
        if len(curves) < 2:
            continue
        amount = min(one.x[-1] for found in curves.values() for one in found)
        losses = {
            place: Spread(values)
            for place, found in curves.items()
            if (values := tuple(y for one in found if (y := one.at(amount)) is not None))
        }
        made.append(Budget(axis, amount, losses))
    return made
