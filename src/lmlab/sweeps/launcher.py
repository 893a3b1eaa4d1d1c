"""Runs the jobs of a multirun, each as fresh processes on its frozen config, and ends in one table.

A job whose configuration cannot train is a row ``refused: reason``; a job that fails is a row too, and the others go
on. Directories: ``outputs/sweeps/<sweep>/<n>-<slug>/``; ``results.csv`` beside them is rewritten after every job.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lmlab.config.compose import hydra_error, to_run_config
from lmlab.journal import RunDir, check_run_name, read_json, slug
from lmlab.records import OF_A_MULTIRUN, STOPPED_CODES, RefusedError, UserError
from lmlab.start import create_run, plan_run

FIGURES = (
    "final/val/loss",
    "best/val_loss",
    "final/val/exact_match",
    "model/params_trainable",
    "model/base_bits_per_param",
    "memory/peak_gb",
    "perf/tokens_per_second_median",
)


@dataclass
class Job:
    """One point of the sweep and what became of it.

    Attributes:
        status: ``waiting``, ``running``, ``finished``, ``interrupted``, ``failed``, ``refused: reason`` or ``error: reason``.
        exit_code: of its processes; 2 for a job that could not start.
    """

    number: int
    overrides: list[str]
    label: str
    folder: Path
    status: str = "waiting"
    exit_code: int = 0
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    run: RunDir | None = None
    started: float = 0.0


def run_jobs(jobs: Sequence[list[str]], *, compose: Callable[[list[str]], Any]) -> int:
    """Run all ``jobs`` (lists of overrides); 0 if all finished or were refused, 1 if one failed, 128 + the signal that stopped them.

    Args:
        compose: overrides -> composed config.

    Raises:
        UserError: the sweep's directory exists already.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a log file has no narrow screen
    first = compose(
        list(jobs[0])
    )  # where the sweep lies and how many jobs at once cannot differ between jobs
    with contextlib.suppress(
        RefusedError
    ):  # a refused point is a row; anything else is wrong for the whole sweep
        to_run_config(first)
    name = _sweep_name(first.run_name, jobs)
    root = Path(first.output_root) / "sweeps" / name
    if root.exists() and not first.overwrite:
        raise UserError(
            "this sweep directory already exists",
            where=str(root),
            fix="choose another run_name, or overwrite=true",
        )
    if (root / "results.csv").exists():
        shutil.rmtree(root)
    queue = _queue(jobs, root)
    at_once = max(1, int(first.launcher.jobs))
    console.print(
        f"{len(queue)} jobs, {at_once} at a time, in {os.path.relpath(root)}", highlight=False, soft_wrap=True
    )
    code, done = 0, False
    old = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        _run_all(queue, at_once, compose, name, console)
        done = True
    except KeyboardInterrupt as error:
        code = 128 + int(error.args[0] if error.args else signal.SIGINT)
    finally:
        if not done:  # whatever ended the sweep, no job goes on without it
            _stop(queue)
        for number, handler in old.items():
            signal.signal(number, handler)
        _write_results(root, queue)
    console.print(_table(queue), highlight=False)
    for job in queue:
        if job.status.startswith("refused"):
            console.print(
                f"job {job.number} ({job.label}) {job.status}", markup=False, highlight=False, soft_wrap=True
            )
    if (root / "results.csv").exists():
        console.print(f"results: {os.path.relpath(root / 'results.csv')}", highlight=False, soft_wrap=True)
    failed = [
        job for job in queue if job.status in ("failed", "interrupted") or job.status.startswith("error")
    ]
    for job in failed:
        print(f"error: job {job.number} ({job.label}) {job.status}", file=sys.stderr)
    return code or (1 if failed else 0)


def _queue(jobs: Sequence[list[str]], root: Path) -> list[Job]:
    """The jobs in order, each labelled by what varies."""
    varied = _varied(jobs)
    labels = [_label(overrides, varied) for overrides in jobs]
    return [
        Job(number, list(overrides), label, root / f"{number}-{slug(label, max_length=60)}")
        for number, (overrides, label) in enumerate(zip(jobs, labels, strict=True))
    ]


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)


def _run_all(
    queue: list[Job], at_once: int, compose: Callable[[list[str]], Any], sweep: str, console: Console
) -> None:
    waiting, running = list(queue), []
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            if _start(job, compose, sweep):
                running.append(job)
                console.print(
                    f"[{job.number + 1}/{len(queue)}] {job.label}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            else:
                console.print(
                    f"[{job.number + 1}/{len(queue)}] {job.label}: {job.status}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
        for job in [j for j in running if j.process is not None and j.process.poll() is not None]:
            running.remove(job)
            _finish(job)
            _write_results(job.folder.parent, queue)
        time.sleep(0.1)


def _start(job: Job, compose: Callable[[list[str]], Any], sweep: str) -> bool:
    """Compose, check, freeze and start one job; False if it cannot start, with the reason in its status."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    job.started = time.monotonic()
    try:
        try:
            config = to_run_config(compose(job.overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise hydra_error(error) from error
        config = config.model_copy(
            update={
                "run_name": check_run_name(job.folder.name),
                "logger": config.logger.model_copy(update={"group": config.logger.group or sweep}),
            }
        )
        plan = plan_run(config, job.overrides, folder=job.folder)
        create_run(plan, job.overrides)
    except RefusedError as error:
        job.status, job.exit_code = f"refused: {error}", 2
        return False
    except UserError as error:
        job.status, job.exit_code = f"error: {error}", 2
        return False
    job.run = plan.run
    plan.run.release()  # the job's own process is the writer; this parent only waits
    job.process = subprocess.Popen(
        [sys.executable, "-m", "lmlab.worker", str(plan.run.path)],
        env={**os.environ, OF_A_MULTIRUN: "1"},
        start_new_session=True,
    )
    job.status = "running"
    return True


def _finish(job: Job) -> None:
    assert job.process is not None
    assert job.run is not None
    job.seconds = time.monotonic() - job.started
    job.exit_code = job.process.returncode
    summary = read_json(job.run.summary)
    stopped = job.exit_code in STOPPED_CODES and summary.get("status") == "interrupted"
    good = job.exit_code == 0 and summary.get("status") == "finished"
    job.status = "finished" if good else "interrupted" if stopped else "failed"


def _stop(queue: Sequence[Job]) -> None:
    """Pass the stop on and wait for the jobs to save."""
    running = [job for job in queue if job.process is not None and job.process.poll() is None]
    for job in running:
        assert job.process is not None
        os.killpg(job.process.pid, signal.SIGTERM)
    for job in running:
        assert job.process is not None
        try:
            job.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
        _finish(job)
    for job in queue:
        if job.status == "waiting":
            job.status = "not started"


def _sweep_name(given: str | None, jobs: Sequence[Sequence[str]]) -> str:
    """The run_name of the command line, or the time and the keys that vary."""
    if given is not None:
        return check_run_name(given)
    keys = [jobs[0][i].split("=")[0].lstrip("+~") for i in sorted(_varied(jobs))]
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{moment}-{slug('-'.join(keys) or 'sweep', max_length=40)}-{secrets.token_hex(2)}"


def _varied(jobs: Sequence[Sequence[str]]) -> set[int]:
    return {i for i in range(len(jobs[0])) if len({job[i] for job in jobs}) > 1}


def _label(overrides: Sequence[str], varied: set[int]) -> str:
    return " ".join(o for i, o in enumerate(overrides) if i in varied) or "run"


def _row(job: Job) -> dict[str, Any]:
    summary = read_json(job.run.summary) if job.run is not None else {}
    return {
        "job": job.number,
        "overrides": " ".join(job.overrides),
        "status": job.status,
        "exit_code": job.exit_code,
        "seconds": round(job.seconds, 1),
        **{name: summary.get(name) for name in FIGURES},
        "directory": str(job.folder) if job.run is not None else "",
    }


def _write_results(root: Path, queue: Sequence[Job]) -> None:
    if all(job.status.startswith(("error", "waiting")) for job in queue):
        return  # a command line that is wrong for every job leaves nothing behind
    root.mkdir(parents=True, exist_ok=True)
    rows = [_row(job) for job in queue]
    temporary = root / f".results.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(root / "results.csv")


def _table(queue: Sequence[Job]) -> Table:
    table = Table(title="jobs", box=SIMPLE)
    columns = ("job", "status", "val/loss", "best", "exact", "trained", "bits", "peak GB", "tok/s", "seconds")
    for column in columns:
        left = column in ("job", "status")
        table.add_column(column, overflow="fold", justify="left" if left else "right", no_wrap=not left)

    def number(value: Any, form: str) -> str:
        return format(value, form) if isinstance(value, int | float) else ""

    forms = (".4f", ".4f", ".3f", ",", ".2f", ".2f", ",.0f")
    for job in queue:
        row = _row(job)
        figures = [number(row[name], form) for name, form in zip(FIGURES, forms, strict=True)]
        table.add_row(job.label, job.status.split(":")[0], *figures, f"{job.seconds:.0f}")
    return table
