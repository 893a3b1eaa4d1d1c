"""RUN_DIR -> fit. Every start ends here: one device, a process group, a job of a multirun, a resume, another node.

`python -m lmlab.worker RUN_DIR` reads the frozen config.yaml and what `start` prepared, and nothing of the command
line that led to it. With several devices it becomes the parent of one process per rank (torch's elastic launcher);
under torchrun or srun it is one of the ranks (`ranks`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmlab import ranks
from lmlab.config.compose import freeze, load_env, load_frozen, report_error
from lmlab.config.schema import RunConfig, world_size
from lmlab.journal import RunDir, read_json, write_json
from lmlab.records import OF_A_MULTIRUN, STOPPED_CODES, RunFailedError, UserError
from lmlab.tracking.transcript import note

STARTED = time.monotonic()


SHUTDOWN_SECONDS = 120
"""What ranks that were told to stop have for their step and their checkpoint; torch's own default is 30."""
PR_SET_PDEATHSIG = 1  # of prctl(2)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REQUEUE = 128 + signal.SIGUSR1
"""Exit code after SIGUSR1, which SLURM sends ahead of a time limit (``#SBATCH --signal=USR1@90``)."""


def launch(run: RunDir, config: RunConfig, *, started: float = STARTED) -> int:
    """Train the run in its directory, on as many processes as its config says; the exit code.

    Args:
        started: monotonic time from which the run's log counts, where it is not the process's beginning.
    """
    with patient_streams():
        return _launch(run, config, started)


def _launch(run: RunDir, config: RunConfig, started: float) -> int:
    if ranks.is_rank():
        return run_rank(run, config)
    ranks.refuse_alone(run, config)
    run.out_of_memory.unlink(missing_ok=True)
    alone = world_size(config) == 1
    code = run_rank(run, config, started=started) if alone else _launch_ranks(run, config)
    if code == 1 and config.trainer.auto_batch and run.out_of_memory.exists():
        smaller = halved(config)
        if smaller is not None:
            _begin_again(run, smaller)
    return code


def halved(config: RunConfig) -> RunConfig | None:
    """The same global batch from micro-batches of half the size (or the largest smaller divisor), validation's halved too.

    None: of one row already, both.
    """
    trainer = config.trainer
    size = next((n for n in range(trainer.batch_size // 2, 0, -1) if trainer.batch_size % n == 0), 1)
    smaller: dict[str, Any] = {
        "batch_size": size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches * (trainer.batch_size // size),
        "val_batch_size": max(1, trainer.val_batch_size // 2),
    }
    if all(getattr(trainer, name) == value for name, value in smaller.items()):
        return None
    told = {"trainer": trainer.model_copy(update=smaller), "resume": "auto", "overwrite": False}
    return config.model_copy(update=told)


def _begin_again(run: RunDir, config: RunConfig) -> None:
    """From the last checkpoint, or step 0, in a process that has none of the memory of this one."""
    freeze(run, config)
    trainer = config.trainer
    said = (
        f"out of memory: beginning again with trainer.batch_size={trainer.batch_size} "
        f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, the same global batch, "
        f"and trainer.val_batch_size={trainer.val_batch_size}"
    )
    print(said, flush=True)
    note(run.path, said)
    sys.stderr.flush()
    os.execv(
        sys.executable, [sys.executable, "-m", "lmlab.worker", str(run.path)]
    )  # the lock stays: the same pid


def requeue(code: int) -> int:
    """After SIGUSR1 put the SLURM job back into its queue: with ``resume=auto`` in its script, or a multirun with a run_name, it goes on.

    The last thing of a start: the queue may kill what is left of the job. Not for the jobs of a multirun, which share one.

    Returns:
        ``code``.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if code != REQUEUE or job is None or OF_A_MULTIRUN in os.environ:
        return code
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
        print(
            f"SLURM: job {job} is requeued; with resume=auto (a multirun: under the same run_name) it goes on from here"
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"warning: SLURM: job {job} could not be requeued ({error})", file=sys.stderr)
    return code


def _launch_ranks(run: RunDir, config: RunConfig) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    devices = config.trainer.devices
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    os.environ[ranks.HAS_PARENT] = "1"
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # the system chooses the port, so two runs never collide
        max_restarts=0,
        monitor_interval=0.2,
        **_stopping(LaunchConfig),
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "lmlab.worker", str(run.path))
        code = 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # Of the rank that failed first: the others' SIGTERM came from here, or they lost the connection to it.
        code = 1 if run.out_of_memory.exists() or failure.exitcode < 0 else int(failure.exitcode)
        summary = read_json(run.summary)
        if summary.get("status") != "finished" and summary.get("exit_code") != code:
            status = "interrupted" if code in STOPPED_CODES else "failed"
            write_json(run.summary, {**summary, "status": status, "exit_code": code})
        if code not in (2, *STOPPED_CODES):
            said = f"error: rank {rank} ended with exit code {failure.exitcode}: its own error stands above"
            print(said, file=sys.stderr)
            note(run.path, said)
    except SignalException as error:
        code = 128 + int(error.sigval)
    finally:
        del os.environ[ranks.HAS_PARENT]
    summary = read_json(run.summary)
    if summary.get("status") in (None, "running"):
        write_json(run.summary, {**summary, "status": "failed", "exit_code": code})
    return int(summary.get("exit_code") or code)


def _stopping(launch_config: Any) -> dict[str, Any]:
    """How the launcher passes signals on, as far as this version of torch has it."""
    wanted = {
        "shutdown_timeout": SHUTDOWN_SECONDS,
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    }
    return {name: value for name, value in wanted.items() if name in launch_config.__dataclass_fields__}


def run_rank(run: RunDir, config: RunConfig, *, started: float = STARTED) -> int:
    """Be one rank: build, train, write down how it ended; the exit code. Nothing is raised."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        return _run_rank(run, config, started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_rank(run: RunDir, config: RunConfig, started: float) -> int:
    from lmlab.session import Session

    interrupt = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # outside the steps, where `GracefulStop` has its own
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    session = Session(run, config, started=started)
    code, reason, agreed = 1, "", False
    try:
        code = session.train()
        agreed = code in STOPPED_CODES
    except UserError as error:
        code, reason = report_error(error), str(error)
    except RunFailedError as error:
        code, reason = error.exit_code, str(error)
        session.figures.update(error.facts)
        if session.rank == 0 or not error.everywhere:
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code, reason = 130, "stopped by Ctrl-C"
    except SystemExit as error:
        code, reason = (error.code if isinstance(error.code, int) else 1), "stopped"
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of it
            code, reason = 130, "stopped by Ctrl-C"
    except (
        Exception
    ) as error:  # the last resort: whatever it was, it is written down and the run is closed as failed
        reason = f"{type(error).__name__}: {error}"
        if _out_of_memory(error):
            with contextlib.suppress(OSError):  # on a full disk too the line below is what counts
                run.out_of_memory.touch()
            from lmlab.fitting import out_of_memory

            print(f"error: out of memory: {out_of_memory(config, session.meter)}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"error: the run failed: {_short(error)} (the lines above say where)", file=sys.stderr)
    finally:
        if agreed:  # what is left is bounded, and a launcher that passes the signal on must not cut it short
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, interrupt)  # Lightning has it ignored after the first
        session.close(code, reason)
    # The first rank, which still saves and requeues, speaks for all: a launcher ends the others at the first bad code.
    return 0 if agreed and session.rank != 0 else code


class _Patient:
    """A stream that a run outlives: its reader may go away (``| head``), its terminal be closed, its disk be full.

    What is printed for nobody is dropped; what a full disk does not take is lost until it does, which is said once; a
    character that the stream's encoding does not have is an escape.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_full = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self._spare(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._spare(error)

    def _spare(self, error: OSError) -> None:
        if error.errno not in NO_ROOM:
            self._to_nowhere()
        elif not self._is_full:
            self._is_full = True  # first, as stderr may lie on that disk too
            said = f"warning: what is printed cannot be written ({error.strerror}): it is lost until it can"
            print(said, file=sys.stderr)

    def end(self) -> None:
        """A last try at what a full disk has left in the buffer, which would be an error of the process's end."""
        if self._is_full:
            try:
                self._stream.flush()
            except OSError:
                self._to_nowhere()

    def _to_nowhere(self) -> None:
        with contextlib.suppress(OSError):  # no file of the system
            target = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, target)
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def patient_streams() -> Iterator[None]:
    """Streams that may fail without ending what prints to them."""
    before = sys.stdout, sys.stderr
    patient = [None if stream is None else _Patient(stream) for stream in before]  # None: closed (``>&-``)
    sys.stdout, sys.stderr = patient  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for each in patient:
            if each is not None:
                each.end()


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _end_with_launcher() -> None:
    """A job of a multirun, and a rank, is told to save and stop when who started it goes away, however that went (Linux)."""
    launcher, is_rank = os.environ.get(OF_A_MULTIRUN, ""), ranks.HAS_PARENT in os.environ
    if not is_rank and not launcher.isdigit():
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if not is_rank and os.getppid() != int(launcher):  # gone already
            os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """``python -m lmlab.worker RUN_DIR``."""
    given: list[str] = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGTERM, signal.SIGUSR1):  # also while the libraries are imported
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    _end_with_launcher()
    load_env()
    try:
        if len(given) != 1:
            raise UserError(
                "one run directory is needed", where="lmlab.worker", fix="python -m lmlab.worker RUN_DIR"
            )
        run, under_srun = RunDir(Path(given[0])), ranks.adopt_srun()
        if ranks.is_rank():
            ranks.require_here(run)
        config: Any = load_frozen(run.config)
        if ranks.is_rank():
            ranks.require_world(config)
            if ranks.HAS_PARENT in os.environ or os.environ["RANK"] != "0":
                return launch(run, config)
        run.take_lock()  # for all ranks, where nobody holds it for them
        try:
            code = launch(run, config)
        finally:
            run.release()
        return requeue(code) if under_srun or not ranks.is_rank() else code
    except UserError as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main())
