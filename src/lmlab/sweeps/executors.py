"""Where a job's processes run: on this machine, or as a SLURM job through submitit. Either way it is ``lmlab.worker RUN_DIR``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmlab.journal import RunDir, read_json
from lmlab.records import OF_A_MULTIRUN, UserError
from lmlab.sweeps.jobs import CONSOLE, Job

if TYPE_CHECKING:
    from lmlab.config.schema import RunConfig, SlurmLauncher

SUBMITTED = ".submitted"
"""In a job's directory: the number of its SLURM job."""
UNKNOWN = "UNKNOWN"
"""submitit's state of a job that sacct does not name."""
KNOWN_AFTER = 600.0
"""Seconds from a job's submission until sacct surely names it."""
NO_END_OF_REQUEUES = 1000


class Handle(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to save and end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...


class Executor(Protocol):
    """Starts jobs."""

    def start(self, job: Job, config: RunConfig) -> Handle:
        """Begin the job whose directory is complete; returns at once."""
        ...

    def adopt(self, job: Job) -> Handle | None:
        """What an earlier start of the sweep began of it, if that is still under way."""
        ...


# --- this machine -----------------------------------------------------------------------------------------------------


class LocalProcesses:
    """Each job is a process group with its own part of the machine: the GPUs that the fewest others use, or its share of the cores.

    Args:
        at_once: how many jobs share the machine.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._gpus = _visible_gpus()
        self._load: Counter[str] = Counter()

    def start(self, job: Job, config: RunConfig) -> Handle:
        """See `Executor`."""
        assert job.run is not None
        environment = {**os.environ, OF_A_MULTIRUN: str(os.getpid())}
        taken: list[str] = []
        if self._gpus and config.trainer.accelerator != "cpu":
            taken = sorted(self._gpus, key=lambda gpu: (self._load[gpu], self._gpus.index(gpu)))
            taken = taken[: config.trainer.devices]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
            self._load.update(taken)
        elif self.at_once > 1:
            cores = max(1, len(os.sched_getaffinity(0)) // (self.at_once * config.trainer.devices))
            environment.setdefault("OMP_NUM_THREADS", str(cores))
        with (job.folder / CONSOLE).open("ab") as console:
            process = subprocess.Popen(
                [sys.executable, "-m", "lmlab.worker", str(job.run.path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Process(process, release=lambda: self._load.subtract(taken))

    def adopt(self, job: Job) -> Handle | None:
        """None: processes end with their launcher."""
        return None


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name for a child; no CUDA context is made here."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


class _Process:
    def __init__(self, process: subprocess.Popen[bytes], *, release: Any) -> None:
        self._process, self._release = process, release

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._release is not None:
            self._release()
            self._release = None
        return code

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


# --- SLURM ------------------------------------------------------------------------------------------------------------


class Slurm:
    """Each job is a SLURM job of as many nodes and GPUs as its config trains on.

    Args:
        options: what the queue is asked for.
        folder: submitit's files; on a file system that the nodes share.

    Raises:
        UserError: submitit is not installed, or finds no SLURM.
    """

    def __init__(self, options: SlurmLauncher, folder: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                "launcher=slurm needs submitit", where="launcher", fix="pip install 'lmlab[slurm]'"
            ) from error
        self.options, self._submitit = options, submitit
        self.folder = folder
        try:
            with (
                tempfile.TemporaryDirectory() as elsewhere
            ):  # it makes its folder, and the sweep's is not taken yet
                submitit.AutoExecutor(folder=elsewhere, cluster=options.cluster)
        except RuntimeError as error:  # no srun on this machine
            raise UserError(
                f"SLURM cannot be reached: {error}",
                where="launcher",
                fix="start it where sbatch is installed, or launcher=local",
            ) from error

    def start(self, job: Job, config: RunConfig) -> Handle:
        """See `Executor`."""
        assert job.run is not None
        options, trainer = self.options, config.trainer
        # One task starts the ranks of one node itself; over several nodes SLURM starts every rank.
        tasks = trainer.devices if trainer.num_nodes > 1 else 1
        asked: dict[str, Any] = {
            "name": job.folder.name[:60],
            "timeout_min": options.time_minutes,
            "nodes": trainer.num_nodes,
            "tasks_per_node": tasks,
            "cpus_per_task": options.cpus_per_task,
            "mem_gb": options.memory_gb,
            "gpus_per_node": None if trainer.accelerator == "cpu" else trainer.devices,
            "slurm_partition": options.partition,
            "slurm_account": options.account,
            **options.parameters,
        }
        executor = self._executor()
        executor.update_parameters(**{k: v for k, v in asked.items() if v is not None})
        submitted = executor.submit(WorkerTask(str(job.run.path)))
        (job.folder / SUBMITTED).write_text(submitted.job_id, encoding="utf-8")
        return _Submitted(submitted, job)

    def adopt(self, job: Job) -> Handle | None:
        """A job that waits in the queue or runs there goes on without its launcher.

        Of one that the queue has forgotten the run's own lock and summary tell, as of a process of this machine.
        """
        note = job.folder / SUBMITTED
        if not note.is_file():
            return None
        kind = self._executor()._executor.job_class  # SLURM's; AutoExecutor's own can be asked nothing
        submitted = kind(self.folder, note.read_text(encoding="utf-8"))
        job.run = RunDir(job.folder)
        if not submitted.done():
            # Of a job that is weeks old the queue may know nothing any more, which submitit takes for one that waits.
            forgotten = submitted.state == UNKNOWN and time.time() - note.stat().st_mtime > KNOWN_AFTER
            return None if forgotten else _Submitted(submitted, job)
        if read_json(job.run.lock).get("host") != socket.gethostname():
            job.run.lock.unlink(
                missing_ok=True
            )  # no pid to look at: the queue knows that nobody is there any more
        return None

    def _executor(self) -> Any:
        """A new one for each job: what one was told to ask for stays with it."""
        return self._submitit.AutoExecutor(
            folder=self.folder, cluster=self.options.cluster, slurm_max_num_timeout=NO_END_OF_REQUEUES
        )


class WorkerTask:
    """What a SLURM task does: the worker in a process of its own, and on with it in a new job where the queue ends this one early.

    Args:
        folder: the run's directory.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_process": None}

    def __call__(self) -> int:
        """Train; the exit code."""
        with (Path(self.folder) / CONSOLE).open("ab") as console:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmlab.worker", self.folder],
                env={**os.environ, OF_A_MULTIRUN: "slurm"},
                stdout=console,
                stderr=subprocess.STDOUT,
                # submitit's warning, sent to every process of the job; it is for this one, which passes on what it means.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        return self._process.wait()

    def checkpoint(self) -> Any:
        """Called by submitit ahead of a time limit or a preemption: save, and go on in a job that is queued anew."""
        from submitit.helpers import DelayedSubmission

        from lmlab.config.compose import freeze, load_frozen

        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        run = RunDir(self.folder)
        freeze(run, load_frozen(run.config).model_copy(update={"resume": "auto", "overwrite": False}))
        return DelayedSubmission(self)


class _Submitted:
    def __init__(self, submitted: Any, job: Job) -> None:
        self._submitted, self._job = submitted, job

    def poll(self) -> int | None:
        if not self._submitted.done():
            return None
        assert self._job.run is not None
        # What the run wrote about itself; a job that SLURM ended wrote nothing, or that it still runs.
        summary = read_json(self._job.run.summary)
        code = summary.get("exit_code")
        return 1 if code is None or summary.get("status") == "running" else int(code)

    def stop(self) -> None:
        self._submitted.cancel(check=False)

    def kill(self) -> None:
        self._submitted.cancel(check=False)
