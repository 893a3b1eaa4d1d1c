"""The report's plots: first plain data (`Panel`, what is drawn), then inline SVG drawn from it with matplotlib.

The two steps are apart so that tests can look at numbers instead of pixels. Colours are written as stand-ins and
turned into CSS variables, so one SVG follows the page into dark mode. The price is that an SVG makes sense only
inside the report's page, which defines those variables.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[int, float]
"""Step -> value, in the order of the steps."""

PHASES = ("load", "forward", "backward", "optimizer", "eval", "generate")
MAX_POINTS = 600
"""Points drawn of one line; more cannot be told apart and would make the page heavy."""

# Stand-in colour -> CSS variable of the page. matplotlib writes them unchanged, and nothing else uses them.
_COLOURS = {"#0a0b01": "--fg", "#0a0b02": "--muted", "#0a0b03": "--rule", "#0a0b04": "--c1", "#0a0b05": "--c2",
            "#0a0b06": "--c3", "#0a0b07": "--c4", "#0a0b08": "--c5", "#0a0b09": "--c6", "#0a0b0a": "--c7",
            "#0a0b0b": "--c8"}  # fmt: skip
FG, MUTED, RULE, *LINES = _COLOURS
_PEAK_NAME = re.compile(r"(?:^|/)memory/([^/]+)/(peak|planned)_gb$")


@dataclass(frozen=True)
class Line:
    """One curve. ``faint`` is drawn thin and pale, ``marked`` with a dot at each point."""

    label: str
    points: Series
    style: Literal["plain", "faint", "marked", "dashed"] = "plain"
    colour: int = 0


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, and the value that was planned for it."""

    label: str
    value: float
    planned: float | None = None


@dataclass(frozen=True)
class Panel:
    """What one plot shows. ``mark`` is a point singled out (label, step, value); above ``top`` it is cut off.

    Bars, of one ``colour``, reach up to ``top`` where several plots share a scale. ``bins`` are the (edges, counts) of a histogram, and ``middle`` its median.
    """

    key: str
    title: str
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    bins: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    middle: float | None = None
    mark: tuple[str, int, float] | None = None
    log: bool = False
    top: float | None = None
    colour: int = 0

    @property
    def note(self) -> str:
        """What must be known to read the plot rightly."""
        above = (
            sum(value > self.top for value in self.lines[0].points.values()) if self.top and self.lines else 0
        )
        cut = (
            f"{above} value{'' if above == 1 else 's'} above {short(self.top or 0)} cut off" if above else ""
        )
        return "log scale" if self.log else cut

    @property
    def description(self) -> str:
        """The plot in words, for those who do not see it."""
        parts = [f"{bar.label} {short(bar.value)} GB" for bar in self.bars]
        for line in self.lines:
            (first, start), (last, end) = next(iter(line.points.items())), list(line.points.items())[-1]
            low, high = min(line.points.values()), max(line.points.values())
            parts.append(f"{line.label}: {short(start)} at step {first}, {short(end)} at step {last}, "
                         f"between {short(low)} and {short(high)}")  # fmt: skip
        if self.bins:
            edges, counts = self.bins
            most = counts.index(max(counts))
            parts.append(f"{sum(counts):,} between {short(edges[0])} and {short(edges[-1])}, most of them "
                         f"({counts[most]:,}) from {short(edges[most])} to {short(edges[most + 1])}")  # fmt: skip
            parts += [f"median {short(self.middle)}"] if self.middle is not None else []
        if self.mark:
            parts.append(f"{self.mark[0]} {short(self.mark[2])} at step {self.mark[1]}")
        return f"{self.title}. " + "; ".join(parts)


def short(value: float) -> str:
    """A number as people read it: grouped thousands, four digits, no trailing noise."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == int(value):
        return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.3e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
    if abs(value) >= 1e-3:
        return f"{value:.4g}"
    return re.sub(r"\.?0*e-0*", "e-", f"{value:.2e}")


def number(value: Any) -> float | None:
    """The value as a float, also where a writer spelled it ``"NaN"`` or ``null``; None if it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def series(metrics: Iterable[Mapping[str, Any]], name: str) -> Series:
    """The finite values of one metric. A step logged twice (a resumed run) counts as logged last."""
    found: Series = {}
    for row in metrics:
        value = number(row[name]) if name in row else None
        if value is not None and math.isfinite(value):
            found[row["step"]] = value
    return dict(sorted(found.items()))


def smooth(points: Series) -> Series:
    """Running mean over a twentieth of the run, centred; the window shrinks at the ends instead of leaning."""
    sums, width = [0.0], max(1, len(points) // 40)
    for value in points.values():
        sums.append(sums[-1] + value)
    means: Series = {}
    for i, step in enumerate(points):
        half = min(i, len(points) - 1 - i, width)
        means[step] = (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)
    return means


def thin(points: Series) -> Series:
    """At most about `MAX_POINTS` points that keep every spike: the lowest and the highest of each stretch."""
    if len(points) <= MAX_POINTS:
        return points
    items = list(points.items())
    size = math.ceil(len(items) / (MAX_POINTS // 2))
    kept = {items[0], items[-1]}
    for start in range(0, len(items), size):
        stretch = items[start : start + size]
        kept |= {min(stretch, key=lambda item: item[1]), max(stretch, key=lambda item: item[1])}
    return dict(sorted(kept))


def phase_peaks(rows: Iterable[Mapping[str, Any]]) -> tuple[Bar, ...]:
    """The highest memory of each phase over the whole run, in the order in which a step goes through them."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, raw in row.items():
            match = _PEAK_NAME.search(name) if "_gb" in name else None
            value = number(raw) if match else None
            if match and value is not None and math.isfinite(value):
                phase = found.setdefault(match[1], {})
                phase[match[2]] = max(value, phase.get(match[2], value))
    known = {name: place for place, name in enumerate(PHASES)}
    order = sorted((name for name in found if "peak" in found[name]), key=lambda n: (known.get(n, 99), n))
    return tuple(Bar(name, found[name]["peak"], found[name].get("planned")) for name in order)


def best_validation(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Step and value of the lowest val/loss after step 0, which is the one that `best/` on disk holds."""
    trained = {step: value for step, value in series(metrics, "val/loss").items() if step > 0}
    return min(trained.items(), key=lambda item: item[1]) if trained else None


def _curve(metrics: Sequence[Mapping[str, Any]], name: str, colour: int = 0) -> list[Line]:
    """A noisy metric: every point thin, and the running mean over it once there are enough points."""
    points = series(metrics, name)
    if len(points) < 20:
        return [Line(name, points, "plain", colour)] if points else []
    return [Line(name, thin(points), "faint", colour),
            Line(f"{name}, smoothed", thin(smooth(points)), "plain", colour)]  # fmt: skip


def panels(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Panel]:
    """Everything the report draws, in its order; a plot without data is left out."""
    validation = series(metrics, "val/loss")
    best = best_validation(metrics)
    loss = _curve(metrics, "train/loss") + ([Line("val/loss", validation, "marked", 1)] if validation else [])
    norms = series(metrics, "train/grad_norm").values()
    spiky = bool(norms) and min(norms) > 0 and max(norms) > 20 * statistics.median(norms)
    speed = series(metrics, "perf/tokens_per_second")
    middle = statistics.median(speed.values()) if speed else 0.0
    levels = [Line(name.removeprefix("memory/"), thin(points), "plain", place)
              for place, name in enumerate(("memory/vram_allocated_gb", "memory/vram_reserved_gb", "memory/rss_gb"))
              if (points := series(metrics, name))]  # fmt: skip
    rate = series(metrics, "train/lr")
    drawn = [
        Panel("loss", "Loss", tuple(loss), mark=("best", *best) if best else None),
        Panel("lr", "Learning rate", (Line("train/lr", thin(rate)),) if rate else ()),
        Panel("grad_norm", "Gradient norm", tuple(_curve(metrics, "train/grad_norm")), log=spiky),
        Panel("memory_phases", "Peak memory per phase, GB", bars=phase_peaks([*metrics, summary])),
        Panel("memory_steps", "Memory over the run, GB", tuple(levels)),
        Panel("throughput", "Tokens per second",
              (Line("non-padding tokens/s", thin(speed)),
               Line("median", dict.fromkeys((min(speed), max(speed)), middle), "dashed", 1)) if speed else (),
              # One log point timed wrongly must not press all others onto the axis.
              top=float(f"{3 * middle:.1e}") if speed and max(speed.values()) > 5 * middle > 0 else None),
    ]  # fmt: skip
    return [panel for panel in drawn if panel.lines or panel.bars]


def draw(panel: Panel) -> str:
    """The panel as an ``<svg>`` element for an HTML page: no prolog, no outside names, ids of its own."""
    height = 0.55 + 0.34 * len(panel.bars) if panel.bars else 2.3 if panel.bins else 2.9
    paint = _draw_bars if panel.bars else _draw_bins if panel.bins else _draw_lines
    return draw_svg(panel.key, lambda axes: paint(axes, panel), height=height, bars=bool(panel.bars))


def draw_svg(key: str, paint: Callable[[Axes], None], *, height: float, bars: bool = False) -> str:
    """Axes dressed as all of the project's, painted by ``paint``, as an ``<svg>`` element whose ids begin with ``key``.

    Args:
        height: in inches, of a figure 4.7 wide.
        bars: of horizontal bars, which have names at the side instead of a scale below.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False, "font.size": 11.5,
                "axes.unicode_minus": True, "path.simplify": False}  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        axes = figure.add_subplot()
        _dress(axes, bars=bars)
        paint(axes)
        handles = sorted(
            zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: pair[1] == "planned"
        )
        if handles:
            axes.legend(*zip(*handles, strict=True), loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if bars else 2, markerscale=0.6 if bars else 1, frameon=False, labelcolor=FG,
                        borderaxespad=0.2, handlelength=1.2, columnspacing=1.0, handletextpad=0.5, fontsize=10)  # fmt: skip
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue(), key)


def _dress(axes: Axes, *, bars: bool) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == ("left" if bars else "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=FG, length=0 if bars else 3)
    if not bars:
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_lines(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    looks: dict[str, dict[str, Any]] = {
        "plain": {"linewidth": 1.6},
        "faint": {"linewidth": 0.9, "alpha": 0.55},
        "marked": {"linewidth": 1.4, "marker": "o", "markersize": 4},
        "dashed": {"linewidth": 1.2, "linestyle": (0, (4, 3))},
    }
    for line in panel.lines:
        look = dict(looks[line.style])
        if len(line.points) == 1:
            look["marker"] = "o"
        axes.plot(
            list(line.points), list(line.points.values()), color=LINES[line.colour], label=line.label, **look
        )
    if panel.mark:
        label, step, value = panel.mark
        axes.plot([step], [value], "o", markersize=9, markerfacecolor="none", markeredgecolor=FG,
                  label=f"{label} {short(value)} (step {step})")  # fmt: skip
    if panel.log:
        axes.set_yscale("log")
    elif panel.key in ("lr", "memory_steps", "throughput"):
        axes.set_ylim(bottom=0, top=panel.top)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step", color=MUTED)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value, 12))))


def _draw_bars(axes: Axes, panel: Panel) -> None:
    names = [bar.label if len(bar.label) <= 20 else f"{bar.label[:19]}…" for bar in panel.bars]
    places = range(len(names))
    axes.barh(
        places, [bar.value for bar in panel.bars], height=0.62, color=LINES[panel.colour], label="measured"
    )
    planned = [
        (bar.planned, place) for place, bar in zip(places, panel.bars, strict=True) if bar.planned is not None
    ]
    if planned:
        axes.plot([value for value, _ in planned], [place for _, place in planned], "|", markersize=21,
                  markeredgewidth=2, color=FG, label="planned")  # fmt: skip
    reach = panel.top or max([bar.value for bar in panel.bars] + [v for v, _ in planned if v]) or 1.0
    for place, bar in zip(places, panel.bars, strict=True):
        at = max(bar.value, bar.planned or 0.0) + reach * 0.02
        axes.text(at, place, short(bar.value), va="center", color=FG)
    axes.set_xlim(0, reach * 1.16)
    axes.set_xticks([])
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()


def _draw_bins(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edges, counts = panel.bins or ((0.0, 1.0), (0,))
    widths = [high - low for low, high in pairwise(edges)]
    # A sliver of background between the bars, so that the bins can be told apart.
    axes.bar(edges[:-1], counts, [0.92 * width for width in widths], align="edge", color=LINES[0])
    if panel.middle is not None:
        axes.axvline(
            panel.middle,
            color=FG,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label=f"median {short(panel.middle)}",
        )
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6 if axis is axes.xaxis else 4, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(round(value, 12))))
    axes.set_xlabel("tokens", color=MUTED)


def _inline(svg: str, key: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    # Several SVGs share the page, and matplotlib calls the parts of each one figure_1, axes_1 and so on.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(
        r'<svg\b[^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1
    )
    return svg.strip()
