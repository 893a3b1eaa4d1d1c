"""The comparison of tokenizers as files and on the terminal: report.html, results.csv, results.json.

All of it is made from one plain object (what results.json holds), so the page can be written again from that file.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.journal import write_json
from lmlab.tracking import plots
from lmlab.tracking.figure_table import print_figures
from lmlab.tracking.pages import Shell, draw_all, templates, write_page
from lmlab.tracking.transcript import print_words, screen
from lmlab.tracking.values import scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all"
"""The group of results.csv that stands for all texts together."""
COUNTS = ("texts", "size_bytes", "characters", "words", "tokens", "split_words", "exact")
RATES = ("bytes_per_token", "tokens_per_word", "split_share")
COLUMNS = ("tokenizer", "status", "vocab_size", "used", "group", *COUNTS, *RATES, "hidden_size")
COSTS = ("parameters", "share", "bf16_mb", "training_mb")
HEADINGS = (
    "tokenizer",
    "tokens",
    "bytes/token",
    "tokens/word",
    "words split",
    "round trip",
    "used",
    "embedding",
)
NONE = "–"
LONGEST_WORD = 15
"""Characters a word has on average, at most, where words are words: without spaces between them they are phrases."""


@dataclass(frozen=True)
class SizePanel:
    """A rate against the size of the vocabulary: a line for each family of tokenizers that differ in nothing else.

    Attributes:
        lines: family -> (vocabulary, rate), by size.
    """

    key: str
    title: str
    lines: dict[str, list[tuple[int, float]]]
    note: str = ""

    @property
    def description(self) -> str:
        """The plot in words, for those who do not see it."""
        told = (
            f"{family}: " + ", ".join(f"{value:.2f} at {size:,}" for size, value in points)
            for family, points in self.lines.items()
        )
        return f"{self.title} by size of the vocabulary. {'; '.join(told)}"


def size_panels(made: Sequence[Mapping[str, Any]]) -> list[SizePanel]:
    """Compression and fertility against the vocabulary; none where all vocabularies are of one size."""
    if len({each["vocab_size"] for each in made}) < 2:
        return []
    panels = []
    for key, title in (("bytes_per_token", "bytes per token"), ("tokens_per_word", "tokens per word")):
        lines: dict[str, list[tuple[int, float]]] = {}
        for each in made:
            if each["total"][key] is not None:
                lines.setdefault(each["family"], []).append((each["vocab_size"], each["total"][key]))
        panels.append(SizePanel(key, title, {family: sorted(points) for family, points in lines.items()}))
    return panels


def _draw(panel: SizePanel) -> str:
    return plots.draw_svg(panel.key, lambda axes: _draw_sizes(axes, panel), height=2.9)


def _draw_sizes(axes: Axes, panel: SizePanel) -> None:
    from matplotlib.ticker import NullLocator

    sizes = sorted({size for points in panel.lines.values() for size, _ in points})
    for place, (family, points) in enumerate(panel.lines.items()):
        look: dict[str, Any] = (
            {"color": plots.LINES[place]}
            if place < len(plots.LINES)
            else {"color": plots.MUTED, "alpha": 0.5}
        )
        mark = "osD^vP*X"[place % 8]
        axes.plot(*zip(*points, strict=True), linewidth=1.5, marker=mark, markersize=5, label=family, **look)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    kept = [
        size for i, size in enumerate(sizes) if i == 0 or size > 1.6 * sizes[i - 1]
    ]  # labels side by side
    axes.set_xticks(kept, [f"{size:,}" for size in kept])
    axes.set_xlabel("vocabulary, log scale", color=plots.MUTED)


def write_tokenizers(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the page and the figures into ``folder``; the page's path.

    Args:
        results: name, model, groups (name -> texts, characters), notes, and tokenizers: each with label, status, path,
            command, and, unless refused, vocab_size, used, total and groups (counts and rates), embedding, excerpts.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", dict(results))
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, [*COLUMNS, *(f"{kind}_{c}" for kind in ("tied", "untied") for c in COSTS), "path"]
        )
        writer.writeheader()
        writer.writerows(rows_of(results))
    return write_page(folder / "report.html", render(results))


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per tokenizer and group, `ALL` first; one row for a tokenizer that was refused."""
    rows = []
    for each in results["tokenizers"]:
        about = {"tokenizer": each["label"], "status": each["status"], "path": each["path"]}
        if "total" not in each:
            rows.append(about)
            continue
        about |= {"vocab_size": each["vocab_size"], "used": each["used"]}
        if (cost := each["embedding"]) is not None:
            about["hidden_size"] = cost["hidden_size"]
            about |= {f"{kind}_{c}": cost[kind][c] for kind in ("tied", "untied") for c in COSTS}
        for group, found in {ALL: each["total"], **each["groups"]}.items():
            rows.append({**about, "group": group, **{key: found[key] for key in (*COUNTS, *RATES)}})
    return rows


def render(results: Mapping[str, Any]) -> str:
    """The page as one string, with nothing outside of it."""
    made = [each for each in results["tokenizers"] if "total" in each]
    groups = list(results["groups"])
    drawn, undrawn = draw_all(size_panels(made), _draw)
    return templates().get_template("tokenizers.html.jinja").render(
        title=results["name"],
        results=results,
        made=made,
        drawn=drawn,
        undrawn=undrawn,
        refused=[each for each in results["tokenizers"] if "total" not in each],
        groups=groups,
        best={key: _best(made, groups, key, highest=key == "bytes_per_token") for key in RATES},
        spaceless=spaceless(results),
        lossy=[(each["label"], group, found) for each in made for group, found in each["groups"].items()
               if found["exact"] < found["texts"]],
        sweep=sweep_command(made),
        shell=Shell(),
        rate=rate, percent=percent, scaled=scaled,
    )  # fmt: skip


def spaceless(results: Mapping[str, Any]) -> list[str]:
    """Groups whose words are so long that they must be phrases: scripts that put no spaces between words."""
    first = next(each for each in results["tokenizers"] if "total" in each)
    return [
        group
        for group, found in first["groups"].items()
        if found["words"] and found["characters"] / found["words"] > LONGEST_WORD
    ]


def sweep_command(made: Sequence[Mapping[str, Any]]) -> str:
    """One command that pretrains with each of the trained tokenizers; "" where they differ in data or model as well."""
    commands = [shlex.split(each["command"]) for each in made if each["status"] == "trained"]
    if len(commands) < 2 or any(words[:-1] != commands[0][:-1] for words in commands):
        return ""
    key = "tokenizer.path="
    paths = ",".join(words[-1].removeprefix(key) for words in commands)
    return shlex.join([*commands[0][:2], "-m", *commands[0][2:-1], key + paths])


def _best(
    made: Sequence[Mapping[str, Any]], groups: Sequence[str], key: str, *, highest: bool
) -> dict[str, float | None]:
    """The best value of each group's row, and under `ALL` of all texts."""
    rows = {ALL: [each["total"][key] for each in made]}
    rows |= {group: [each["groups"][group][key] for each in made] for group in groups}
    chosen: dict[str, float | None] = {}
    for group, values in rows.items():
        known = [value for value in values if value is not None]
        chosen[group] = (max if highest else min)(known) if known and len(made) > 1 else None
    return chosen


def rate(value: float | None) -> str:
    """Two digits behind the point, which is what differences between tokenizers are made of."""
    return NONE if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share; never rounded up to 100 %."""
    if value is None:
        return NONE
    return f"{value:.1%}" if value in (0.0, 1.0) or value < 0.9995 else "99.9%"


def print_tokenizers(results: Mapping[str, Any]) -> None:
    """The table of all texts, that by group, and what to type next."""
    from rich.box import SIMPLE

    console = screen()
    made = [each for each in results["tokenizers"] if "total" in each]
    print_figures(console, "All texts", HEADINGS, [_all_texts(each) for each in made], box=SIMPLE)
    for each in results["tokenizers"]:
        if "total" not in each:
            print_words(console, f"{each['label']}: {each['status']}", style="yellow")
    groups = list(results["groups"])
    if len(groups) > 1:
        headings = ["texts", *(each["label"] for each in made)]
        rows = [
            [group, *(rate(each["groups"][group]["bytes_per_token"]) for each in made)] for group in groups
        ]
        print_figures(console, "Bytes per token", headings, rows, box=SIMPLE)
    for note in results["notes"]:
        print_words(console, f"note: {note}")
    print("pretrain with one of them (val/bits_per_byte can be compared between them, val/loss cannot):")
    for each in made:
        print(f"  {each['command']}")


def _all_texts(each: Mapping[str, Any]) -> list[str]:
    """A tokenizer's row under `HEADINGS`."""
    total, cost = each["total"], each["embedding"]
    kind = "tied" if cost is None or cost["model_is_tied"] else "untied"
    return [
        each["label"],
        f"{each['vocab_size']:,}",
        rate(total["bytes_per_token"]),
        rate(total["tokens_per_word"]),
        percent(total["split_share"]),
        f"{total['exact']:,}/{total['texts']:,}",
        percent(each["used"] / each["vocab_size"]),
        NONE if cost is None else scaled(cost[kind]["parameters"]),
    ]
