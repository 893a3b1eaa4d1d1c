"""layers.jsonl as pictures: one heat map for each figure, layers down and validations across, and the means as curves.

A language model's layers are a stack of equal blocks, so rows are put together by what a matrix is (q_proj, gate_proj)
and run through the depth of the stack: neighbours can then be compared, where 200 rows in the model's own order are
noise. Colour is one hue in twelve steps of opacity, so that the map follows the page into dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmlab.tracking import plots
from lmlab.tracking.plots import Line, Panel, number, series, short, thin
from lmlab.tracking.values import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "update_ratio": "Update against weight, by layer",
    "effective_rank": "Effective rank of the update, by layer",
}
"""What is drawn as a heat map; gradient norms are in the table and the curve."""
LEVELS = 12
MAX_COLUMNS = 40
"""Validations shown; of more, some are left out evenly."""
ROW_HEIGHT, LEAST_ROW_HEIGHT, MAP_HEIGHT = 0.16, 0.045, 5.5
"""Inches: of a row where there are few, of a row at least, and of the whole map in between."""
GAP = 0.6
"""Between the kinds of matrices, in rows."""
LIGHT = {plots.FG: "#1d2125", plots.MUTED: "#626a73", plots.RULE: "#dfe2e5", plots.LINES[0]: "#2463b4"}
"""The page's light colours, for a picture that stands alone."""


@dataclass(frozen=True)
class Band:
    """The rows of one kind of matrix: ``values[row][column]``, from the first block of the stack to the last."""

    label: str
    depths: tuple[int | None, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class HeatMap:
    """What one heat map shows.

    Attributes:
        name: the figure, as layers.jsonl calls it.
        steps: of the columns.
        low, high: ends of the colour scale.
        left_out: validations for which there was no column.
    """

    name: str
    title: str
    steps: tuple[int, ...]
    bands: tuple[Band, ...]
    low: float
    high: float
    left_out: int

    @property
    def key(self) -> str:
        """Of its element in the page."""
        return f"layers_{self.name}"

    @property
    def note(self) -> str:
        """What must be known to read it rightly."""
        averaged = any("*" in band.label for band in self.bands)
        parts = ["mean over experts"] if averaged else []
        parts += [f"{self.left_out} validations left out"] if self.left_out else []
        return ", ".join(parts)

    @property
    def description(self) -> str:
        """The map in words, for those who do not see it."""
        last = [(band.label, depth, row[-1]) for band in self.bands
                for depth, row in zip(band.depths, band.values, strict=True) if row[-1] is not None]  # fmt: skip
        text = f"{self.title}. {sum(len(band.values) for band in self.bands)} rows, steps {self.steps[0]} to {self.steps[-1]}"
        if not last:
            return text
        ends = [min(last, key=lambda cell: cell[2] or 0.0), max(last, key=lambda cell: cell[2] or 0.0)]
        said = [f"{word} {short(value or 0.0)} in {label}{'' if depth is None else f' of block {depth}'}"
                for word, (label, depth, value) in zip(("lowest", "highest"), ends, strict=True)]  # fmt: skip
        return f"{text}; at the last of them {', '.join(said)}"


def place(name: str) -> tuple[str, int | None]:
    """A layer's name as (kind of matrix, block of the stack): ``model.layers.3.self_attn.q_proj`` is the q_proj of block 3.

    A second number, an expert's, becomes ``*``.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or first == len(parts) - 1:
        return name, None
    return ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :]), int(parts[first])


def heat_maps(rows: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """The heat maps of layers.jsonl's rows; none of a figure that no row has."""
    made = (_heat_map(rows, name, title) for name, title in TITLES.items())
    return [heat_map for heat_map in made if heat_map is not None]


def newest(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers at the last step as a table: ``step``, ``layer`` and ``figures``, the three numbers as text."""
    last = max((row["step"] for row in rows), default=None)
    names = ("update_ratio", "effective_rank", "grad_norm")
    table = []
    for row in _once(rows):
        if row["step"] == last:
            values = [number(row[name]) if row.get(name) is not None else None for name in names]
            figures = ["–" if value is None else short(float(f"{value:.4g}")) for value in values]
            table.append({"step": last, "layer": str(row.get("layer", "")), "figures": figures})
    return table


def _once(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A layer's step that was logged twice, as logged last."""
    return list({(row["step"], str(row.get("layer"))): row for row in rows}.values())


def _heat_map(rows: Iterable[Mapping[str, Any]], name: str, title: str) -> HeatMap | None:
    found: dict[tuple[str, int | None], dict[int, list[float]]] = {}
    steps: set[int] = set()
    for row in _once(rows):
        value = number(row[name]) if row.get(name) is not None else None
        if value is not None and math.isfinite(value) and isinstance(row.get("layer"), str):
            steps.add(row["step"])
            found.setdefault(place(row["layer"]), {}).setdefault(row["step"], []).append(value)
    if not found:
        return None
    chosen = _evenly(sorted(steps), MAX_COLUMNS)
    short_names = _short_names(list(dict.fromkeys(kind for kind, _ in found)))
    bands = []
    for kind, label in short_names.items():
        stack = sorted(
            (depth for k, depth in found if k == kind), key=lambda depth: -1 if depth is None else depth
        )
        values = tuple(tuple(_mean(found[kind, depth].get(step)) for step in chosen) for depth in stack)
        bands.append(Band(label, tuple(stack), values))
    cells = [value for band in bands for row in band.values for value in row if value is not None]
    low = 0.0 if name == "update_ratio" else min(cells)
    return HeatMap(name, title, tuple(chosen), tuple(bands), low, max(cells), len(steps) - len(chosen))


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _evenly(steps: Sequence[int], count: int) -> list[int]:
    if len(steps) <= count:
        return list(steps)
    stride = (len(steps) - 1) / (count - 1)
    return [steps[round(index * stride)] for index in range(count)]


def _short_names(kinds: Sequence[str]) -> dict[str, str]:
    """The last part of each name where it tells them apart, of at most 24 characters."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    if len(set(last)) == len(last) and not any("*" in kind for kind in kinds):
        names = last
    else:
        names = list(kinds)
    shown = [visible(name if len(name) <= 24 else "…" + name[-23:]) for name in names]
    return dict(zip(kinds, shown, strict=True))


def panels(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The means over all layers as curves, each on a scale of its own; one without data is left out."""
    titles = {
        "layers/update_ratio": "Update against weight, mean over layers",
        "layers/effective_rank": "Effective rank of the update, mean over layers",
        "layers/grad_norm_max": "Largest gradient norm of a layer",
    }
    drawn = ((name, title, series(metrics, name)) for name, title in titles.items())
    return [
        Panel(name.replace("/", "_"), title, (Line(name, thin(points), "marked"),))
        for name, title, points in drawn
        if points
    ]


def draw(heat_map: HeatMap) -> str:
    """The heat map as an ``<svg>`` element of the page."""
    svg = plots.draw_svg(heat_map.key, lambda axes: _paint(axes, heat_map), height=_height(heat_map))
    # A tenth of a point is enough for a cell, and a fifth of the bytes.
    svg = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0].replace("\n", "")), svg)
    # Cells of one colour side by side would show a seam where their edges are smoothed.
    return svg.replace("<svg ", '<svg shape-rendering="crispEdges" ', 1)


def picture(heat_map: HeatMap) -> bytes:
    """The heat map as a PNG in the page's light colours."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False, "font.size": 10}):
        figure = Figure(figsize=(4.7, _height(heat_map)), layout="constrained")
        axes = figure.add_subplot(title=heat_map.title)
        _paint(axes, heat_map, colours=LIGHT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _rows(heat_map: HeatMap) -> float:
    return sum(len(band.values) for band in heat_map.bands) + GAP * (len(heat_map.bands) - 1)


def _row_height(heat_map: HeatMap) -> float:
    return min(ROW_HEIGHT, max(LEAST_ROW_HEIGHT, MAP_HEIGHT / _rows(heat_map)))


def _height(heat_map: HeatMap) -> float:
    return 1.1 + _rows(heat_map) * _row_height(heat_map)


def _level(value: float, heat_map: HeatMap) -> int:
    span = heat_map.high - heat_map.low
    return LEVELS if span <= 0 else 1 + min(LEVELS - 1, int((value - heat_map.low) / span * LEVELS))


def _opacity(level: int) -> float:
    return 0.05 + 0.95 * (level - 1) / (LEVELS - 1)


def _paint(axes: Axes, heat_map: HeatMap, *, colours: Mapping[str, str] | None = None) -> None:
    """Cells as one path for each level, runs of a level as one rectangle; above them the scale."""
    real = {} if colours is None else colours
    text, muted, hue = (real.get(name, name) for name in (plots.FG, plots.MUTED, plots.LINES[0]))
    rectangles: dict[int, list[tuple[float, float, float, float]]] = {}
    ticks: list[tuple[float, str]] = []
    depths: list[tuple[float, int | None, Literal["top", "bottom"]]] = []
    top, row_height = 0.0, _row_height(heat_map)
    for band in heat_map.bands:
        for index, row in enumerate(band.values):
            for start, stop, level in _runs(row, heat_map):
                rectangles.setdefault(level, []).append((start, top + index, stop, top + index + 1))
        count = len(band.values)
        if not ticks or (top + count / 2 - ticks[-1][0]) * row_height > 0.14:
            ticks.append((top + count / 2, band.label))
        if count > 1 and count * row_height > 0.3:
            depths.append((top, band.depths[0], "top"))
            depths.append((top + count, band.depths[-1], "bottom"))
        top += count + GAP
    columns, bottom = len(heat_map.steps), top - GAP
    unit = 1 / row_height  # an inch, in rows
    _paint_scale(axes, heat_map, rectangles, text=text, inch=unit)
    for level, cells in sorted(rectangles.items()):
        axes.add_patch(_patch(cells, hue, _opacity(level)))
    small: dict[str, Any] = {"ha": "right", "fontsize": 8, "color": muted}
    for y, depth, align in depths:
        axes.text(-0.012 * columns, y, str(depth), va=align, **small)
    if depths:
        axes.text(-0.012 * columns, -0.02 * unit, "block", va="bottom", **small)
    axes.set_xlim(0, columns)
    axes.set_ylim(bottom, -0.52 * unit)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=10)
    axes.tick_params(axis="y", length=0, pad=16 if depths else 4, labelcolor=text)
    shown = range(0, columns, -(-columns // 6))
    axes.set_xticks([column + 0.5 for column in shown], [short(heat_map.steps[column]) for column in shown])
    axes.tick_params(axis="x", color=muted, labelcolor=text)
    axes.set_xlabel("step", color=muted)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _paint_scale(
    axes: Axes,
    heat_map: HeatMap,
    rectangles: dict[int, list[tuple[float, float, float, float]]],
    *,
    text: str,
    inch: float,
) -> None:
    """The colours from low to high with their values, above the map."""
    columns = len(heat_map.steps)
    if heat_map.high <= heat_map.low:
        axes.text(
            0,
            -0.3 * inch,
            f"everywhere {short(heat_map.high)}",
            ha="left",
            va="center",
            fontsize=10,
            color=text,
        )
        return
    left, width = 0.3 * columns, 0.4 * columns
    for level in range(1, LEVELS + 1):
        x = left + width * (level - 1) / LEVELS
        rectangles.setdefault(level, []).append((x, -0.38 * inch, x + width / LEVELS, -0.22 * inch))
    for x, value, side in ((left, heat_map.low, "right"), (left + width, heat_map.high, "left")):
        shift = -0.02 * columns if side == "right" else 0.02 * columns
        axes.text(
            x + shift,
            -0.3 * inch,
            short(float(f"{value:.3g}")),
            ha=side,
            va="center",
            fontsize=10,
            color=text,
        )


def _runs(row: Sequence[float | None], heat_map: HeatMap) -> Iterable[tuple[int, int, int]]:
    """(from column, to column, level) of each stretch of one level; cells without a value are in none."""
    levels = [None if value is None else _level(value, heat_map) for value in row]
    start = 0
    for column in range(1, len(levels) + 1):
        if column == len(levels) or levels[column] != levels[start]:
            level = levels[start]
            if level is not None:
                yield start, column, level
            start = column


def _patch(cells: Sequence[tuple[float, float, float, float]], colour: str, opacity: float) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners, codes = [], []
    for left, top, right, bottom in cells:
        corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return PathPatch(
        Path(corners, codes), facecolor=colour, edgecolor="none", linewidth=0, alpha=opacity, snap=False
    )
