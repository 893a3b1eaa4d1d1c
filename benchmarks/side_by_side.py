"""Runs of several programs side by side: fresh processes, the same cores, A B A B order, spreads instead of single figures.

A contender is a command that writes its own figures as one JSON object to the file named by ``$BENCHMARK_OUT``. What can be
seen from outside (wall time, peak resident memory, load of the machine) is added here. Memory is polled every 20 ms, the
high-water mark too: a program may reset its own mark (lmlab does, for its peaks by phase), and a reading at the end
would then miss the peak.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LMLAB_TEST_DATA", ROOT.parent / "shared" / "data"))
"""Real text and tokenizers that the figures are taken over; see `require_data`."""
RESULTS = Path(__file__).resolve().parent / "results"
POLL_SECONDS = 0.02
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


def require_data() -> None:
    """End the program in one line where the shared data is not at hand."""
    if not (DATA / "clm").is_dir() or not (DATA / "tokenizers").is_dir():
        print(
            f"error: no shared data in {DATA}: set LMLAB_TEST_DATA to a folder with clm/ and tokenizers/",
            file=sys.stderr,
        )
        sys.exit(2)


@dataclass(frozen=True)
class Contender:
    """One program of a comparison.

    Attributes:
        name: as it stands in the tables.
        command: writes its figures to ``$BENCHMARK_OUT``.
        before: a command that prepares each run and is not measured.
        limit: seconds after which it is stopped; that it was is then its result.
        environment: over the common one.
    """

    name: str
    command: Sequence[str]
    before: Sequence[str] = ()
    limit: float = 1800.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """Where everything of a comparison runs.

    Attributes:
        cores: ids of the logical processors, the same for every process.
        threads: OMP_NUM_THREADS.
    """

    cores: tuple[int, ...]
    threads: int

    @classmethod
    def of_threads(cls, threads: int) -> Machine:
        """The first ``threads`` processors this process may use."""
        return cls(tuple(sorted(os.sched_getaffinity(0))[:threads]), threads)

    def describe(self) -> dict[str, Any]:
        """Hardware and system, for the record."""
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
        fields = dict(
            [part.strip() for part in line.split(":", 1)] for line in info.splitlines() if ":" in line
        )
        flags = set(fields.get("flags", "").split())
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
        return {
            "cpu": fields.get("model name", platform.processor()),
            "features": [name for name in wanted if name in flags],
            "logical_cpus": os.cpu_count(),
            "cores_used": list(self.cores),
            "threads": self.threads,
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "system": platform.platform(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }


def run_once(contender: Contender, machine: Machine) -> dict[str, Any]:
    """One fresh process: its figures, ``wall_seconds``, ``peak_rss_gb``, ``load_before``; or ``stopped`` with the limit.

    Raises:
        SystemExit: the command failed.
    """
    if contender.before:
        _execute(contender.before, contender, machine, out=None)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lmlab-benchmark-") as folder:
        out = Path(folder) / "figures.json"
        seconds, peak, stopped = _execute(contender.command, contender, machine, out=out)
        figures = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if not figures and not stopped:
        raise SystemExit(f"{contender.name}: wrote no figures to $BENCHMARK_OUT")
    figures["peak_rss_gb"] = max(peak, figures.get("peak_rss_gb", 0.0))
    if "rss_after_imports_gb" in figures:
        figures["rss_growth_gb"] = figures["peak_rss_gb"] - figures["rss_after_imports_gb"]
    figures.update(wall_seconds=seconds, load_before=load)
    return {**figures, "stopped": contender.limit} if stopped else figures


def _execute(
    command: Sequence[str], contender: Contender, machine: Machine, *, out: Path | None
) -> tuple[float, float, bool]:
    """(seconds, peak GB of the process until it has written its figures, whether it was stopped at its limit)."""
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": str(machine.threads), **contender.environment}
    if out is not None:
        environment["BENCHMARK_OUT"] = str(out)
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, machine.cores),
        )
        peak, stopped = 0.0, False
        before = signal.signal(
            signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
        )  # the child goes too
        try:
            while process.poll() is None:
                if out is None or not out.is_file():  # what comes after is not compared
                    peak = max(peak, status_gb("VmHWM", process.pid))
                if time.perf_counter() - began > contender.limit:
                    stopped = True
                    break
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)
        seconds = time.perf_counter() - began
        if process.returncode and not stopped:
            said.seek(0)
            raise SystemExit(f"{contender.name} failed ({process.returncode}):\n{said.read()[-4000:]}")
    return seconds, peak, stopped


def status_gb(name: str, pid: int | str = "self") -> float:
    """A memory field of /proc/PID/status in GB (1e9 bytes); 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def write_figures(figures: Mapping[str, Any]) -> None:
    """What a contender says of itself, to the file the harness reads; to the screen without a harness."""
    text = json.dumps(figures)
    if "BENCHMARK_OUT" in os.environ:
        Path(os.environ["BENCHMARK_OUT"]).write_text(text, encoding="utf-8")
    else:
        print(text)


def compare(
    contenders: Sequence[Contender], machine: Machine, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Every contender ``repeats`` times, one round after another; one that was stopped at its limit is not tried again."""
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    for repeat in range(repeats):
        for contender in contenders:
            if any("stopped" in run for run in runs[contender.name]):
                continue
            made = run_once(contender, machine)
            runs[contender.name].append(made)
            said = ", ".join(
                f"{key} {value:.4g}"
                for key, value in made.items()
                if key in ("tokens_per_second", "peak_rss_gb", "seconds", "stopped", "load_before")
            )
            print(f"  [{repeat + 1}/{repeats}] {contender.name}: {said}", flush=True)
    return runs


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated figures; prints as ``median (min to max)``."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one figure."""
        known = sorted(values)
        return cls(statistics.median(known), known[0], known[-1])

    def text(self, digits: int) -> str:
        """``median (min to max)``, or the median alone where all are equal."""
        middle, low, high = (f"{value:.{digits}f}" for value in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


def spread(runs: Sequence[Mapping[str, Any]], figure: str) -> Spread | None:
    """Of one figure over the runs that have it."""
    values = [run[figure] for run in runs if isinstance(run.get(figure), int | float)]
    return Spread.of(values) if values else None


def paired_ratio(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], figure: str
) -> Spread | None:
    """Ours over theirs, run by run of the same round: what slows a whole round down cancels out."""
    pairs = zip(ours, theirs, strict=False)
    ratios = [a[figure] / b[figure] for a, b in pairs if a.get(figure) and b.get(figure)]
    return Spread.of(ratios) if ratios else None


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def save(name: str, result: Mapping[str, Any], text: str, folder: Path = RESULTS) -> None:
    """``NAME.json`` and ``NAME.md`` in the folder of results; the text goes to the screen too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def bars(
    path: Path, panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]], *, title: str, first: str
) -> None:
    """Horizontal bars, one panel a figure: the median, each run as a dot.

    Args:
        panels: (axis label, contender -> its figures).
        first: prefix of the contenders drawn in the stronger colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.2 + 0.34 * max(len(values) for _, values in panels)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), height), squeeze=False, layout="constrained"
    )
    for axis, (label, values) in zip(axes[0], panels, strict=True):
        names = list(values)
        medians = [statistics.median(values[name]) for name in names]
        colours = ["#1f5fa8" if name.startswith(first) else "#b4bcc6" for name in names]
        axis.barh(names, medians, color=colours, height=0.66)
        for place, name in enumerate(names):
            axis.plot(values[name], [place] * len(values[name]), ".", color="#222222", markersize=3.5)
            axis.text(max(values[name]), place, f"  {medians[place]:.3g}", va="center", fontsize=8)
        axis.set_xlim(0, max(max(each) for each in values.values()) * 1.18)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.tick_params(axis="y", labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def wait_until_quiet(limit: float, *, load: float, say: Callable[[str], None] = print) -> float:
    """Wait for the one-minute load to fall to ``load``, ``limit`` seconds at most; the load then."""
    began = time.monotonic()
    while (now := os.getloadavg()[0]) > load and time.monotonic() - began < limit:
        time.sleep(5)
    if now > load:
        say(f"note: the machine is busy (load {now:.1f}): trust ratios, not times")
    return now


def python() -> str:
    """The interpreter lmlab runs under."""
    return sys.executable
