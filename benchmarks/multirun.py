"""What the launcher costs: a multirun of tiny jobs beside the same jobs started one by one with `python train.py`.

Blocks of plain runs and parts of the sweep take turns (A B A B): the sweep is run in as many pieces, each a whole start of
`python train.py -m` with its own share of the jobs. The launcher's memory is polled while it runs one long sweep at the end.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from side_by_side import OFFLINE, ROOT, Machine, markdown, python, save, status_gb

JOB = (
    "data=skills",
    "data.num_records=200",
    "metrics=none",
    "samples.prompts=0",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.memory_plan=false",
    "trainer.max_steps=10",
    "trainer.val_every_n_steps=10",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=40, help="of the long sweep")
    parser.add_argument("--block", type=int, default=5, help="runs of a block, and jobs of a piece")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmark-multirun")
    options = parser.parse_args()
    work, machine = options.work.absolute(), Machine.of_threads(options.threads)
    shutil.rmtree(work, ignore_errors=True)
    environment = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": str(options.threads)}
    plain(work, environment, 1)  # the data is prepared, files are in the cache
    pairs: list[tuple[float, float]] = []
    for repeat in range(options.repeats):
        alone = plain(work, environment, options.block)
        swept, _ = sweep(work, environment, options.block)
        pairs.append((alone / options.block, swept / options.block))
        print(
            f"  [{repeat + 1}/{options.repeats}] a run {pairs[-1][0]:.2f} s, a job {pairs[-1][1]:.2f} s",
            flush=True,
        )
    seconds, memory = sweep(work, environment, options.jobs)
    ratios = sorted(job / run for run, job in pairs)
    early, late = memory_at(memory, 3), memory_at(memory, options.jobs)
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "pairs": pairs,
        "memory": memory,
        "jobs": options.jobs,
    }
    rows = [
        ["a plain run, s", f"{statistics.median(run for run, _ in pairs):.2f}", ""],
        [f"a job of a sweep of {options.block}, s", f"{statistics.median(job for _, job in pairs):.2f}", ""],
        ["job over run", f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", "<= 1.10"],
        [f"a job of a sweep of {options.jobs}, s", f"{seconds / options.jobs:.2f}", ""],
        ["the launcher's resident memory after 3 jobs, GB", f"{early:.3f}", ""],
        [f"after {options.jobs}", f"{late:.3f}", "flat"],
    ]
    shutil.rmtree(work, ignore_errors=True)
    save("multirun", result, markdown(["", "median (range)", "target"], rows))
    return 0


def plain(work: Path, environment: dict[str, str], count: int) -> float:
    """Seconds of ``count`` runs one after another."""
    began = time.perf_counter()
    for seed in range(count):
        told = [*JOB, f"seed={seed}", f"output_root={work}", f"run_name=run-{seed}", "overwrite=true"]
        _finished(
            subprocess.run(
                [python(), "train.py", *told], cwd=ROOT, env=environment, capture_output=True, text=True
            )
        )
    return time.perf_counter() - began


def sweep(work: Path, environment: dict[str, str], count: int) -> tuple[float, list[tuple[int, float]]]:
    """Seconds of one multirun, and (jobs ended, GB of its launcher) over its time."""
    results = work / "sweeps" / "swept" / "results.csv"
    told = [*JOB, f"seed=range(0,{count})", f"output_root={work}", "run_name=swept", "overwrite=true"]
    memory: list[tuple[int, float]] = []
    began = time.perf_counter()
    with subprocess.Popen(
        [python(), "train.py", "-m", *told],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while process.poll() is None:
            if resident := status_gb("VmRSS", process.pid):
                memory.append((ended(results), resident))
            time.sleep(0.5)
        seconds = time.perf_counter() - began
        assert process.stderr is not None
        _finished(subprocess.CompletedProcess([], process.returncode, "", process.stderr.read()))
    return seconds, memory


def ended(results: Path) -> int:
    """Jobs that results.csv calls finished."""
    try:
        with results.open(encoding="utf-8", newline="") as stream:
            return sum(row["status"] == "finished" for row in csv.DictReader(stream))
    except OSError:
        return 0


def memory_at(memory: list[tuple[int, float]], jobs: int) -> float:
    """The launcher's memory when that many jobs had ended, or as near to it as was seen."""
    return min(memory, key=lambda seen: abs(seen[0] - jobs))[1]


def _finished(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise SystemExit(f"a run failed ({done.returncode}):\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
