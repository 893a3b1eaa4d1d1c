"""The plots of a comparison, as the report's: first plain data, then SVG that follows the page's colours.

A group keeps its colour and its mark through the whole page, so the page has one legend. Marks differ too, for those
who do not see the colours; groups without a colour lie in grey behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmlab.tracking import plots
from lmlab.tracking.curves import AXES, Axis, Band, band
from lmlab.tracking.groups import Group
from lmlab.tracking.plots import short
from lmlab.tracking.values import aligned, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
"""The marks of the plots as characters, for the page's legend; in the order of the colours."""

CURVES = ("val/loss", "train/loss")
_LOG_FROM = 8.0
"""Ratio of the highest to the lowest value from which a scale is logarithmic."""


@dataclass(frozen=True)
class BandPanel:
    """One metric of all groups against one axis."""

    metric: str
    axis: Axis
    bands: tuple[Band, ...]

    @property
    def key(self) -> str:
        """What the parts of its SVG are named after."""
        return f"{self.metric.replace('/', '_')}_{self.axis.key}"

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{self.metric} against {self.axis.title}"

    @property
    def log(self) -> bool:
        """Whether the values span so much that only a logarithmic scale shows the differences."""
        values = [value for one in self.bands for spread in one.spreads for value in spread.values]
        return bool(values) and min(values) > 0 and max(values) > _LOG_FROM * min(values)

    @property
    def note(self) -> str:
        """What must be known to read it rightly."""
        smoothed = ["smoothed"] if self.metric.startswith("train/") else []
        return ", ".join(smoothed + (["log scale"] if self.log else []))

    @property
    def description(self) -> str:
        """The plot in words."""
        ends = [
            f"{one.group.label}: {aligned(one.spreads[-1].mean)} at {scaled(one.x[-1])}" for one in self.bands
        ]
        return f"{self.title}. " + "; ".join(ends)


@dataclass(frozen=True)
class ScatterPanel:
    """Two figures of every run as a dot and of every group's means as a large one."""

    key: str
    title: str
    x: tuple[str, str]
    y: tuple[str, str]
    groups: tuple[Group, ...]
    note: str = "small: a run; large: the mean of a group"

    @property
    def description(self) -> str:
        """The plot in words."""
        parts = [
            f"{group.label}: {aligned(at[0])} and {aligned(at[1])}"
            for group in self.groups
            if (at := self.mean(group))
        ]
        return f"{self.title}. " + "; ".join(parts)

    def mean(self, group: Group) -> tuple[float, float] | None:
        """Where a group lies."""
        x, y = group.spread(self.x[0]), group.spread(self.y[0])
        return (x.mean, y.mean) if x and y else None


def curve_panels(groups: Sequence[Group]) -> dict[str, list[BandPanel]]:
    """Axis -> its panels; what nobody logged is left out."""
    found: dict[str, list[BandPanel]] = {}
    for axis in AXES:
        for metric in CURVES:
            bands = tuple(one for group in groups if (one := band(group, metric, axis.key)))
            if any(len(one.x) > 1 for one in bands):
                found.setdefault(axis.key, []).append(BandPanel(metric, axis, bands))
    return found


def scatter_panels(groups: Sequence[Group]) -> list[ScatterPanel]:
    """Quality against memory, where two groups have both."""
    made = []
    for figure, title in (("best", "best val/loss"), ("exact_match", "exact match")):
        panel = ScatterPanel(f"scatter_{figure}", f"{title} against peak memory", ("peak", "peak memory, GB"),
                             (figure, title), tuple(groups))  # fmt: skip
        if sum(panel.mean(group) is not None for group in groups) > 1:
            made.append(panel)
    return made


def memory_panels(groups: Sequence[Group]) -> list[plots.Panel]:
    """Peak memory by phase beside what was planned, a panel for each coloured group, all on one scale."""
    bars = {}
    for group in groups:
        rows: list[Any] = [row for result in group.counted for row in [*result.files.metrics, result.flat]]
        if group.colour is not None and (found := plots.phase_peaks(rows)):
            bars[group.place] = (group, found)
    reach = max(
        (max(bar.value, bar.planned or 0.0) for _, found in bars.values() for bar in found), default=0.0
    )
    return [
        plots.Panel(f"memory_{place}", group.label, bars=found, top=reach or None, colour=group.colour or 0)
        for place, (group, found) in bars.items()
    ]


def draw(panel: BandPanel | ScatterPanel | plots.Panel) -> str:
    """Any panel of a comparison as ``<svg>``."""
    if isinstance(panel, plots.Panel):
        return plots.draw(panel)
    if isinstance(panel, BandPanel):
        return plots.draw_svg(panel.key, lambda axes: _draw_bands(axes, panel), height=2.9)
    return plots.draw_svg(panel.key, lambda axes: _draw_scatter(axes, panel), height=2.9)


def _look(group: Group) -> dict[str, Any]:
    if group.colour is None:
        return {"color": plots.MUTED, "alpha": 0.45, "zorder": 1}
    return {"color": plots.LINES[group.colour], "zorder": 3}


def _mark(group: Group) -> str:
    return "o" if group.colour is None else MARKS[group.colour]


def _draw_bands(axes: Axes, panel: BandPanel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for one in panel.bands:
        means = [spread.mean for spread in one.spreads]
        few = len(one.x) <= 12
        axes.plot(
            one.x,
            means,
            linewidth=1.5,
            marker=_mark(one.group) if few else "",
            markersize=4,
            **_look(one.group),
        )
        if one.group.colour is not None and any(len(spread.values) > 1 for spread in one.spreads):
            low, high = [s.low for s in one.spreads], [s.high for s in one.spreads]
            axes.fill_between(one.x, low, high, color=plots.LINES[one.group.colour], alpha=0.18, linewidth=0)
    if panel.log:
        _logarithmic(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=panel.axis.key != "seconds"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(round(value, 9))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value, 12))))
    axes.set_xlabel(panel.axis.title, color=plots.MUTED)


def _draw_scatter(axes: Axes, panel: ScatterPanel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = []
    for group in panel.groups:
        dots = [(r.figures[panel.x[0]], r.figures[panel.y[0]]) for r in group.counted
                if panel.x[0] in r.figures and panel.y[0] in r.figures]  # fmt: skip
        mean = panel.mean(group)
        if not dots or mean is None:
            continue
        values += [y for _, y in dots]
        look = _look(group)
        axes.plot(
            *zip(*dots, strict=True),
            linestyle="",
            marker=_mark(group),
            markersize=4,
            markeredgewidth=0,
            **look,
        )
        axes.plot(*mean, linestyle="", marker=_mark(group), markersize=9, markerfacecolor="none", **look)
    if values and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        _logarithmic(axes)
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value, 12))))
    if panel.y[0] == "exact_match":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.set_xlabel(panel.x[1], color=plots.MUTED)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y with ticks at 1, 2 and 5: its own small ticks would carry labels in TeX, which nothing here sets."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
