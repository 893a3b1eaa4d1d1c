"""Runs as a comparison sees them: the figures of each, and the groups of those that differ only in ``seed``.

A group's figure is the mean over its finished runs with the lowest and the highest, not a standard deviation: sweeps
have three seeds, and of three values the range is what was seen while a deviation is guessed. Where no run of a group
finished, the figures are those of what is there, and the group says so; claims and budgets never use those.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from lmlab.tracking import plots
from lmlab.tracking.report import RunFiles, read_run, status
from lmlab.tracking.values import aligned, as_written, flatten

HOUSEKEEPING = ("run_name", "output_root", "resume", "overwrite", "logger/", "launcher/", "hparams_search/")
"""Settings that say where a run lies and who watches it; two runs that differ only in these are the same."""
MAX_COLOURED = 8
"""Groups that get a colour, a column of samples and a plot of memory; more cannot be told apart."""


@dataclass(frozen=True)
class Entry:
    """One job to compare.

    Attributes:
        label: what tells it from the others, e.g. its overrides.
        folder: its run directory; None if it never had one.
        status: ``finished``, ``failed``, ``refused: reason``, ...; empty: as its summary.json says.
        reason: why it did not finish.
        seconds: wall time of its processes, where somebody measured it.
        exit_code: of its processes, where known.
    """

    label: str
    folder: Path | None = None
    status: str = ""
    reason: str = ""
    seconds: float | None = None
    exit_code: int | None = None


@dataclass
class Result:
    """What is known of one entry; ``settings`` is its flat config without the seed and what is housekeeping."""

    entry: Entry
    files: RunFiles
    flat: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    status: str = ""
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.status == "finished"

    @property
    def notices(self) -> list[str]:
        """What has to be said about its files."""
        wanted = ("metrics.jsonl", "summary.json", "config.yaml")
        gone = [name for name in self.files.missing if name in wanted]
        return self.files.notices + ([f"Not there: {', '.join(gone)}."] if gone else [])


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value, also of values whose sum is too large for a float."""
    try:
        return statistics.fmean(values)
    except OverflowError:
        return sum(value / len(values) for value in values)


@dataclass(frozen=True)
class Spread:
    """Values of one figure over a group's runs, at least one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their arithmetic mean."""
        return mean(self.values)

    @property
    def low(self) -> float:
        """The lowest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The highest."""
        return max(self.values)


@dataclass
class Group:
    """Runs that differ only in ``seed``. ``colour`` is None for one that is drawn in grey, beside `MAX_COLOURED` others."""

    label: str
    place: int
    results: list[Result]
    colour: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The config its runs share."""
        return self.results[0].settings

    @property
    def finished(self) -> list[Result]:
        """Its runs that came to their end."""
        return [result for result in self.results if result.finished]

    @property
    def counted(self) -> list[Result]:
        """The runs that its figures are of: the finished ones, or if there are none those that left figures."""
        return self.finished or [result for result in self.results if result.figures]

    @property
    def note(self) -> str:
        """How many of its runs are counted, if that is not plain."""
        whole, some = len(self.results), len(self.finished)
        if some:
            return "" if some == whole else f"{some} of {whole} finished"
        words = ", ".join(dict.fromkeys(result.status for result in self.results))
        return f"not finished: {words}"

    @property
    def seeds(self) -> list[int]:
        """Seeds of the counted runs."""
        return sorted({result.seed for result in self.counted if result.seed is not None})

    def spread(self, figure: str) -> Spread | None:
        """A figure over the counted runs; None if none has it."""
        values = tuple(r.figures[figure] for r in self.counted if figure in r.figures)
        return Spread(values) if values else None

    def by_seed(self, figure: str) -> dict[int, float]:
        """Seed -> figure of the finished runs; of several runs with one seed their mean."""
        found: dict[int, list[float]] = {}
        for result in self.finished:
            if figure in result.figures and result.seed is not None:
                found.setdefault(result.seed, []).append(result.figures[figure])
        return {seed: mean(values) for seed, values in sorted(found.items())}


@dataclass(frozen=True)
class Measure:
    """A figure that runs are compared by, and how it is read from a run's files."""

    key: str
    title: str
    read: Callable[[RunFiles, dict[str, Any]], float | None]
    show: Callable[[float], str]
    better: Literal["lower", "higher", ""] = ""


# --- figures --------------------------------------------------------------------------------------------------------


def _last(name: str) -> Callable[[RunFiles, dict[str, Any]], float | None]:
    def read(files: RunFiles, flat: dict[str, Any]) -> float | None:
        values = list(plots.series(files.metrics, name).values())
        return values[-1] if values else None

    return read


def _summary(name: str) -> Callable[[RunFiles, dict[str, Any]], float | None]:
    return lambda files, flat: plots.number(flat[name]) if name in flat else None


def _best(files: RunFiles, flat: dict[str, Any]) -> float | None:
    best = plots.best_validation(files.metrics)
    return best[1] if best else None


def _peak(files: RunFiles, flat: dict[str, Any]) -> float | None:
    peaks = [bar.value for bar in plots.phase_peaks([*files.metrics, flat])]
    return max(peaks or plots.series(files.metrics, "memory/rss_gb").values(), default=None)


def _growth(files: RunFiles, flat: dict[str, Any]) -> float | None:
    """Over what the process takes without tensors. Loading is left out: on a CPU it is over before that is known."""
    base = _summary("memory/base_gb")(files, flat)
    peaks = [bar.value for bar in plots.phase_peaks([*files.metrics, flat]) if bar.label != "load"]
    return max(peaks) - base if peaks and base is not None else None


def _speed(files: RunFiles, flat: dict[str, Any]) -> float | None:
    speeds = plots.series(files.metrics, "perf/tokens_per_second").values()
    return statistics.median(speeds) if speeds else None


def wall_time(metrics: Sequence[dict[str, Any]]) -> float | None:
    """Seconds of all starts of a run up to their last log points; a resumed run's clock begins again."""
    times = [plots.number(row.get("time", "")) for row in metrics]
    known = [time for time in times if time is not None and math.isfinite(time)]
    ends = [before for before, after in pairwise(known) if after < before]
    return sum(ends) + known[-1] if known else None


def _rounded(value: float) -> str:
    return plots.short(round(value))


def _percent(value: float) -> str:
    return f"{value:.1%}"


MEASURES = (
    Measure("val/loss", "val/loss", _last("val/loss"), aligned, "lower"),
    Measure("best", "best val/loss", _best, aligned, "lower"),
    Measure("bits_per_byte", "bits per byte", _last("val/bits_per_byte"), aligned, "lower"),
    Measure("exact_match", "exact match", _last("val/exact_match"), _percent, "higher"),
    Measure("trained", "trained parameters", _summary("model/params_trainable"), _rounded),
    Measure("bits", "bits per base parameter", _summary("model/base_bits_per_param"), aligned),
    Measure("peak", "peak memory, GB", _peak, aligned, "lower"),
    Measure("growth", "memory growth, GB", _growth, aligned, "lower"),
    Measure("speed", "tokens/s", _speed, _rounded, "higher"),
    Measure("wall", "wall time, s", lambda files, flat: wall_time(files.metrics), _rounded, "lower"),
)


# --- reading --------------------------------------------------------------------------------------------------------


def read_result(entry: Entry) -> Result:
    """Everything of one entry that a comparison needs; what cannot be read is left out and said."""
    word, _, reason = entry.status.partition(":")
    reason = entry.reason or reason.strip()
    if entry.folder is None or not entry.folder.is_dir():
        if entry.folder is not None:
            reason = reason or "its directory is gone"
        return Result(entry, RunFiles(Path()), status=word or "not started", reason=reason)
    files = read_run(entry.folder)
    ended = status(files)
    flat = flatten(files.summary)
    config = _flat_config(files)
    seed = config.pop("seed", None)
    settings = {k: v for k, v in config.items() if not k.startswith(HOUSEKEEPING)}
    figures: dict[str, float] = {}
    for measure in MEASURES:
        value = measure.read(files, flat)
        if value is not None and math.isfinite(value):
            figures[measure.key] = value
    if entry.seconds is not None:
        figures["wall"] = entry.seconds
    return Result(entry, files, flat, settings, seed if isinstance(seed, int) else None,
                  word or ended["word"], reason or ("" if ended["kind"] == "good" else ended["reason"]), figures)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases, which can make a short file as large as one likes; lmlab writes none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _flat_config(files: RunFiles) -> dict[str, Any]:
    if not files.config:
        return {}
    try:
        value = yaml.load(files.config, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return flatten({str(name): part for name, part in value.items()})
    files.notices.append("config.yaml is broken: this run stands alone.")
    return {}


# --- grouping -------------------------------------------------------------------------------------------------------


def grouped(results: Iterable[Result]) -> list[Group]:
    """Groups in the order in which their first runs came. What left nothing at all is in none."""
    found: dict[str, list[Result]] = {}
    for place, result in enumerate(results):
        if not result.figures and not result.settings:
            continue
        key = json.dumps(result.settings, sort_keys=True, default=str) if result.settings else f"run {place}"
        found.setdefault(key, []).append(result)
    groups = [Group("", place, members) for place, members in enumerate(found.values())]
    for group, label in zip(groups, _labels(groups), strict=True):
        group.label = label
    return groups


def colour(groups: Sequence[Group], baseline: Group | None) -> None:
    """Give `MAX_COLOURED` groups a colour: the baseline and those with the lowest best val/loss."""

    def rank(group: Group) -> tuple[bool, float, int]:
        best = group.spread("best")
        return group is not baseline, best.mean if best else math.inf, group.place

    chosen = sorted(sorted(groups, key=rank)[:MAX_COLOURED], key=lambda group: group.place)
    for place, group in enumerate(chosen):
        group.colour = place


def _labels(groups: Sequence[Group]) -> list[str]:
    """What its runs were called without the seed, if that tells the groups apart; else the settings that do."""
    called = [{_without_seed(result.entry.label) for result in group.results} for group in groups]
    names = [next(iter(words)) if len(words) == 1 else "" for words in called]
    if not all(names) or len(set(names)) < len(names):
        keys = telling(groups)
        names = [_told(group, keys) or group.results[0].entry.label for group in groups]
    seen = Counter[str]()
    for place, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[place] = f"{name} ({seen[name]})"
    return names


def _told(group: Group, keys: Sequence[str]) -> str:
    """``adapter=lora optim.lr=0.001``."""
    there = {
        key.removesuffix("/kind").replace("/", "."): group.settings[key]
        for key in keys
        if key in group.settings
    }
    return " ".join(f"{key}={as_written(value)}" for key, value in there.items())


def _without_seed(label: str) -> str:
    """``adapter=lora seed=1`` -> ``adapter=lora``."""
    return " ".join(word for word in label.split() if not word.startswith("seed="))


def telling(groups: Sequence[Group]) -> list[str]:
    """Settings that two groups have with different values. One that only some have (adapter.rank) need not tell anything."""
    return [
        key for key in varying(groups) if len({str(g.settings[key]) for g in groups if key in g.settings}) > 1
    ]


def varying(groups: Sequence[Group]) -> list[str]:
    """Settings that are not the same in all groups, of those whose config could be read."""
    known = [group.settings for group in groups if group.settings]
    keys = dict.fromkeys(key for settings in known for key in settings)
    return [key for key in keys if any(key not in s or s[key] != known[0].get(key) for s in known)]


def shared(groups: Sequence[Group]) -> list[tuple[str, Any]]:
    """Settings that all groups have alike."""
    settings = next((group.settings for group in groups if group.settings), {})
    differing = set(varying(groups))
    return [(key, value) for key, value in settings.items() if key not in differing]
