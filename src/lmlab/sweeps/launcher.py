"""Runs the jobs of a multirun, each as fresh processes on its frozen config, and ends in one table.

A job whose configuration cannot train is a row ``refused: reason``; one that fails, or does not fit into memory, is a row
too, and the others go on. Directories: ``outputs/sweeps/<sweep>/<n>-<slug>/``; ``results.csv`` beside them is rewritten
after every job. The same command with the same ``run_name`` goes on with a sweep that was stopped: what finished is left
alone, what was interrupted or failed goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lmlab.config.compose import hydra_error, to_run_config
from lmlab.config.schema import RunConfig
from lmlab.journal import RunDir, check_run_name, read_json, slug
from lmlab.records import STOPPED_CODES, RefusedError, UserError
from lmlab.start import create_run, plan_run
from lmlab.sweeps.board import Board, newest_figures, print_outcome
from lmlab.sweeps.earlier import (
    StillRunningError,
    has_finished,
    is_sweep,
    overrides_of,
    read_results,
    same_point,
    wait_for_orphan,
)
from lmlab.sweeps.executors import Executor, Handle, LocalProcesses, Slurm
from lmlab.sweeps.jobs import (
    CONSOLE,
    NOT_STARTED,
    OUT_OF_MEMORY,
    GridPoints,
    Job,
    Points,
    entry_of,
    label_of,
    reason_of,
    row_of,
)
from lmlab.tracking.compare import write_comparison
from lmlab.tracking.results import RESULTS, write_results
from lmlab.tracking.transcript import screen
from lmlab.worker import SHUTDOWN_SECONDS

Compose = Callable[[list[str]], Any]
STOP_SECONDS = SHUTDOWN_SECONDS + 30.0
"""What jobs that were told to stop have for their step and their checkpoint."""
ASKED_EVERY = 1.0
"""Seconds between two looks at whether a running job is worth going on with."""


def run_jobs(points: Points, *, compose: Compose, root: Path, options: Any, overwrite: bool = False) -> int:
    """Run what ``points`` gives; 0 if no job failed, else 1, or 128 + the signal that stopped them.

    Args:
        compose: overrides -> composed config.
        root: the sweep's folder.
        options: the launcher's, composed.
        overwrite: begin anew.

    Raises:
        UserError: the sweep's directory is taken, or the launcher cannot start jobs.
    """
    console = screen()
    sweep = _Sweep(points, compose=compose, root=root.absolute(), options=options, console=console)
    try:
        sweep.claim(overwrite=overwrite)
        code = sweep.run()
    finally:
        sweep.release()
    sweep.report()
    failed = [job for job in sweep.jobs if job.went_wrong]
    for job in failed:
        print(f"error: job {job.number} ({job.label}) {job.status}{_why(job)}", file=sys.stderr)
    if any(job.status in ("interrupted", "not started") for job in sweep.jobs):
        print(f"go on with: {_same_sweep(sweep.root)}", file=sys.stderr)
    return code or (1 if failed else 0)


class _Sweep:
    """One start of a sweep in its directory."""

    def __init__(
        self, points: Points, *, compose: Compose, root: Path, options: Any, console: Console
    ) -> None:
        self.points, self.compose, self.root, self.console = points, compose, root, console
        self.at_once = max(1, int(options.jobs))
        self.executor: Executor = (
            Slurm(options, root / "submitit") if options.kind == "slurm" else LocalProcesses(self.at_once)
        )
        self.jobs: list[Job] = []
        self.handles: dict[int, Handle] = {}
        self._earlier: dict[int, dict[str, str]] = {}
        self._asked = 0.0
        self._more, self._starting, self._caught = True, False, 0
        self._told: set[int] = set()
        self._lock = RunDir(root)
        self.board = Board(console, self.jobs, total=points.total)

    # --- the directory ------------------------------------------------------------------------------------------

    def claim(self, *, overwrite: bool) -> None:
        """Take the sweep's directory: a new one, or one of the same sweep to go on with.

        Raises:
            UserError: something else is there, or another start is at work in it.
        """
        begun = is_sweep(self.root)
        if not begun and self.root.exists() and any(self.root.glob("[!.]*")):
            raise UserError("not a sweep's directory", where=str(self.root), fix="choose another run_name")
        if overwrite and begun:
            self._lock.take_lock()  # refuses while it is at work
            for lock in self.root.glob(
                "*/.lock"
            ):  # or one of its jobs is, left by a launcher that was killed
                RunDir(lock.parent).check_free(overwrite=True, resume=False)
            shutil.rmtree(self.root)
        self._earlier = read_results(self.root / RESULTS)
        for number, row in self._earlier.items():
            asked = self.points.next(number) if isinstance(self.points, GridPoints) else None
            if asked is not None and not same_point(asked, overrides_of(row)):
                raise UserError(
                    f"this directory holds another sweep (its job {number} was {row['overrides'] or 'the defaults'})",
                    where=str(self.root),
                    fix="choose another run_name, or overwrite=true",
                )
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock.take_lock()
        self._recall()

    def _recall(self) -> None:
        """Rows of an earlier start that are left as they are."""
        for number, row in sorted(self._earlier.items()):
            job = self._job(number, overrides_of(row))
            run = RunDir(job.folder)
            job.run = run if run.config.is_file() else None
            is_whole = job.run is not None and read_json(run.summary).get("status") == row["status"]
            if self.points.keeps(row["status"], is_whole=is_whole):
                job.status, job.exit_code = row["status"], int(row["exit_code"] or 0)
                self.jobs.append(job)
                self.points.recall(job)

    def release(self) -> None:
        """Let go of the directory; one that nothing was written to goes."""
        self._lock.release()
        with contextlib.suppress(OSError):
            self.root.rmdir()

    # --- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until there are no more points; 0, or 128 + the signal that ended it early."""
        code, done = 0, False
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        old = {number: signal.signal(number, self._interrupt) for number in caught}
        kept = f", {len(self.jobs)} of them done before" if self.jobs else ""
        where = os.path.relpath(self.root)
        self.board.say(f"{self.points.total} jobs{kept}, {self.at_once} at a time, in {where}")
        try:
            with self.board:
                self._run_all()
            done = True
        except KeyboardInterrupt as error:
            code = 128 + int(error.args[0] if error.args else signal.SIGINT)
        finally:
            try:
                if not done:  # whatever ended the sweep, no job goes on without it
                    self._stop()
            finally:
                for number, handler in old.items():
                    signal.signal(number, handler)
                self._write()
        return code

    def _interrupt(self, number: int, frame: Any) -> None:
        self._caught = number
        if not self._starting:  # else a process would run that nobody knows of
            raise KeyboardInterrupt(number)

    def _run_all(self) -> None:
        while self._more or self.handles:
            while self._more and len(self.handles) < self.at_once and self._begin():
                pass
            for job in [job for job in self.jobs if job.number in self.handles]:
                code = self.handles[job.number].poll()
                if code is not None:
                    self._end(job, code)
            self._look_at_running()
            self.board.refresh()
            if self.handles:
                time.sleep(0.1)

    def _begin(self) -> bool:
        """Start the next job; False if there is none now."""
        taken = {job.number for job in self.jobs}
        number = next(n for n in itertools.count() if n not in taken)
        overrides = self.points.next(number)
        if overrides is None:
            self._more = bool(self.handles)  # what ends may bring new ones
            return False
        job = self._job(number, overrides)
        self.jobs.append(job)
        self.jobs.sort(key=lambda each: each.number)
        if not self._start(job):
            self._tell(job)
        self.board.tell(job)
        self._write()
        return True

    def _job(self, number: int, overrides: list[str]) -> Job:
        label = label_of(overrides, self.points.keys)
        job = Job(number, overrides, label, self.root / f"{number}-{slug(label, max_length=60)}")
        earlier = self._earlier.get(number)
        job.seconds = float(earlier["seconds"] or 0) if earlier is not None else 0.0
        return job

    def _start(self, job: Job) -> bool:
        """Prepare and start one job; False if it cannot start, or need not, with the reason in its status."""
        job.started = time.monotonic()
        try:
            handle = self.executor.adopt(job)
            if handle is None:
                wait_for_orphan(job, seconds=STOP_SECONDS, say=self.board.say)
                if has_finished(job, self._earlier.get(job.number)):
                    job.run, job.status = RunDir(job.folder), "finished"
                    job.seconds = float(newest_figures(job).get("time", job.seconds))
                    return False
                config = self._prepare(job)
                self._starting = True
                handle = self.executor.start(job, config)
            job.run, job.status = RunDir(job.folder), "running"
            self.handles[job.number] = handle
        except RefusedError as error:
            job.status, job.exit_code = f"refused: {error}", 2
        except UserError as error:
            job.status, job.exit_code = f"error: {error}", 2
        except StillRunningError as error:
            job.status = "interrupted"
            self.board.say(str(error))
        except Exception as error:  # a queue that takes no job, a full disk: the others go on
            said = (str(error).strip().splitlines() or [""])[0]
            job.status, job.exit_code = f"error: {type(error).__name__}: {said[:200]}", 1
        finally:
            self._starting = False
        if self._caught:
            raise KeyboardInterrupt(self._caught)
        return job.status == "running"

    def _prepare(self, job: Job) -> RunConfig:
        """Check and freeze a job into its directory, new or to go on with; the config in force there."""
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        try:
            config: RunConfig = to_run_config(self.compose(job.overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise hydra_error(error) from error
        again = RunDir(job.folder).config.is_file()
        if job.folder.exists() and not again:
            shutil.rmtree(job.folder)  # begun by a start that was killed, and never complete
        told = {
            "run_name": check_run_name(job.folder.name),
            "logger": config.logger.model_copy(update={"group": config.logger.group or self.root.name}),
            "resume": "auto" if again else None if config.resume == "auto" else config.resume,
            "overwrite": False,
        }
        plan = plan_run(config.model_copy(update=told), job.overrides, folder=job.folder)
        create_run(plan, job.overrides)
        job.run = plan.run
        job.steps = plan.config.trainer.steps(plan.prepared.meta["report"]["rows"]["train"])
        console = job.folder / CONSOLE
        job.console_from = console.stat().st_size if console.is_file() else 0
        plan.run.out_of_memory.unlink(missing_ok=True)
        plan.run.release()  # the job's own process is the writer; this parent only waits
        return plan.config

    def _end(self, job: Job, code: int) -> None:
        assert job.run is not None
        del self.handles[job.number]
        job.seconds += time.monotonic() - job.started
        job.exit_code = code
        summary = read_json(job.run.summary)
        if job.status == "running":
            job.status = _status(code, str(summary.get("status")), job.run, told=job.number in self._told)
        self.board.tell(job)
        self._write()
        self._tell(job)

    def _tell(self, job: Job) -> None:
        try:
            self.points.done(job)
        except UserError:
            raise
        except Exception as error:  # a database that is locked: the next start tells it
            self.board.say(f"warning: job {job.number} could not be told to the search: {error}")

    def _look_at_running(self) -> None:
        if time.monotonic() - self._asked < ASKED_EVERY:
            return
        self._asked = time.monotonic()
        for job in self.jobs:
            if job.status == "running" and self.points.hopeless(job):
                job.status = "pruned"
                self.handles[job.number].stop()

    def _stop(self) -> None:
        """Pass the stop on and wait for the jobs to save."""
        self._told = set(self.handles)
        for handle in self.handles.values():
            handle.stop()
        until = time.monotonic() + STOP_SECONDS
        for job in [job for job in self.jobs if job.number in self.handles]:
            handle = self.handles[job.number]
            while (code := handle.poll()) is None:
                if time.monotonic() > until:
                    handle.kill()
                time.sleep(0.1)
            with contextlib.suppress(UserError):  # what was wrong for one of them has ended the sweep already
                self._end(job, code)
        for number in range(self.points.total if isinstance(self.points, GridPoints) else 0):
            if all(job.number != number for job in self.jobs):
                self.jobs.append(self._job(number, self.points.next(number) or []))
                self.jobs[-1].status = "not started"
        self.jobs.sort(key=lambda each: each.number)

    # --- the end ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """results.csv; a command line that is wrong for every job leaves nothing behind."""
        if all(job.status.startswith("error") or job.status in NOT_STARTED for job in self.jobs):
            return
        present = {job.number: row_of(job) for job in self.jobs}
        rows = {**self._earlier, **present}  # those not come to yet stay as they were
        try:
            write_results(self.root, [rows[number] for number in sorted(rows)])
        except OSError as error:  # a full disk; the next job's end tries again
            self.board.say(f"warning: {RESULTS} cannot be written ({error.strerror})")

    def report(self) -> None:
        """The table, the reasons of refusals, and where the rest lies."""
        print_outcome(self.console, self.jobs)
        for job in self.jobs:
            if job.status.startswith("refused"):
                self.board.say(f"job {job.number} ({job.label}) {job.status}")
        if not (self.root / RESULTS).exists():
            return
        self.board.say(f"results: {os.path.relpath(self.root / RESULTS)}")
        try:
            page = write_comparison(self.root, [entry_of(job) for job in self.jobs], title=self.root.name)
        except (
            Exception
        ) as error:  # a page that cannot be drawn must not turn a finished sweep into a failed one
            self.board.say(f"warning: report.html was not written: {type(error).__name__}: {error}")
        else:
            self.board.say(f"report: {os.path.relpath(page)}")


def _status(code: int, said: str, run: RunDir, *, told: bool) -> str:
    """What an exit code and the run's own word for its end come to; ``told``: this launcher stopped it."""
    if code == 0 and said == "finished":
        return "finished"
    if told or (code in STOPPED_CODES and said == "interrupted"):
        return "interrupted"
    return OUT_OF_MEMORY if run.out_of_memory.exists() else "failed"


def _why(job: Job) -> str:
    """For a line about a failed job: its reason, and where the rest is."""
    if job.run is None or job.status == "interrupted":
        return ""
    return f": {reason_of(job)} (see {os.path.relpath(job.folder / CONSOLE)})"


def _same_sweep(root: Path) -> str:
    """The command that began the sweep, with its name, as a drawn one would be another."""
    kept = [word for word in sys.argv[1:] if not word.lstrip("+").startswith(("run_name=", "overwrite="))]
    return shlex.join(["python", Path(sys.argv[0]).name, *kept, f"run_name={root.name}"])
