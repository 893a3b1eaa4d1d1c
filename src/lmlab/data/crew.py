"""Workers that take jobs one by one and report progress: processes of this machine here, those of a Ray cluster beside.

`Team` gives out the jobs in order and says which failure counts: that of the first failing job, whoever is faster. What a
worker is, is a subclass's: `Crew` has processes, `ray_crew.RayCrew` has actors.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from lmlab.records import RunFailedError

Worker = TypeVar("Worker")

Tick = Callable[[int], None]
"""Called by a job with the bytes it has done since the last call."""
Progress = Callable[[str, int, int], object]
"""Called with the stage, and bytes done and in all."""
TICK_BYTES = 2**20
LOST_TIMES = 3
"""How often the worker of one job may die before the job itself is taken to be the reason."""


class Team(ABC, Generic[Worker]):
    """``with Crew(tool, workers, progress) as crew: results = crew.run(...)``.

    Args:
        tool: sent to every worker once, by pickle; the second argument of each job's function.
        workers: how many.
        progress: called with the stage, and bytes done and in all.
    """

    def __init__(self, tool: Any, workers: int, progress: Progress) -> None:
        self.tool, self.workers, self.progress = tool, workers, progress

    def run(
        self,
        stage: str,
        function: Callable[[Any, Any, Tick], Any],
        jobs: Sequence[Any],
        *,
        total: int,
        done: int = 0,
    ) -> list[Any]:
        """``function(job, tool, tick)`` of every job, in order.

        Args:
            total: bytes that the stage is about; ``done`` of them were done before.

        Raises:
            RunFailedError: a worker died (with a Ray cluster: again and again at one job), or ran out of disk or memory.
            Exception: the one of the first job in order that failed.
        """
        results: list[Any] = [None] * len(jobs)
        failed: dict[int, BaseException] = {}
        running: dict[Worker, int] = {}
        waiting = list(range(len(jobs)))[::-1]
        lost = Counter[int]()
        self.progress(stage, done, total)

        def counts(number: int) -> bool:
            return not failed or number < min(failed)  # what comes after a failure is of no interest

        while True:
            for worker in self._free(running):
                if waiting and counts(waiting[-1]):
                    running[worker] = waiting.pop()
                    self._give(worker, function, jobs[running[worker]])
            if not any(counts(number) for number in (*running.values(), *waiting[-1:])):
                break
            for worker, what, value in self._heard(running, stage):
                if what == "tick":
                    done += value
                    self.progress(stage, done, total)
                    continue
                number = running.pop(worker)
                if what == "failed":
                    failed[number] = value
                elif what == "lost":
                    lost[number] += 1
                    if lost[number] == LOST_TIMES:
                        failed[number] = RunFailedError(f"{value} ({stage}, {LOST_TIMES} times at one unit)")
                    waiting = sorted([*waiting, number], reverse=True)
                else:
                    results[number] = value
        if failed:
            raise failed[min(failed)]
        return results

    @abstractmethod
    def _free(self, running: Collection[Worker]) -> list[Worker]:
        """The workers that a job can be given to."""

    @abstractmethod
    def _give(self, worker: Worker, function: Callable[..., Any], job: Any) -> None:
        """Begin the job."""

    @abstractmethod
    def _heard(self, running: Collection[Worker], stage: str) -> Iterable[tuple[Worker, str, Any]]:
        """Waits, then (worker, what, value): ``tick`` bytes, ``done`` result, ``failed`` error or ``lost`` reason."""


class Crew(Team[Connection]):
    """Processes of this machine; they never outlive their parent.

    Each has a pipe of its own. A pipe that ends tells either side that the other is gone, however it went: a killed
    worker is reported at once and not waited for, and workers of a killed parent stop at their next sign of progress.
    """

    def __init__(self, tool: Any, workers: int, progress: Progress) -> None:
        super().__init__(tool, workers, progress)
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> Crew:
        # A fresh interpreter: forking a process with threads (rich, torch, rayon) may deadlock.
        context = multiprocessing.get_context("spawn")
        for number in range(self.workers):
            ours, theirs = context.Pipe()
            name = f"worker-{number}"
            process = context.Process(target=_work, args=(theirs, self.tool), name=name, daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.join()

    def _free(self, running: Collection[Connection]) -> list[Connection]:
        return [connection for connection in self._processes if connection not in running]

    def _give(self, worker: Connection, function: Callable[..., Any], job: Any) -> None:
        with contextlib.suppress(
            BrokenPipeError
        ):  # it died while it waited: `_heard` finds its pipe at its end
            worker.send((function, job))

    def _heard(self, running: Collection[Connection], stage: str) -> Iterable[tuple[Connection, str, Any]]:
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            try:
                what, value = ready.recv()
            except (EOFError, OSError):
                self._died(ready, stage)
            yield ready, what, value

    def _died(self, connection: Connection, stage: str) -> None:
        process = self._processes[connection]
        process.join(5)
        raise RunFailedError(
            f"a worker process died with exit code {process.exitcode} ({stage}; -9 is often a lack of memory): "
            "what is finished stays, run the same command again, perhaps with fewer --workers"
        )


def attempt(function: Callable[[Any, Any, Tick], Any], job: Any, tool: Any, tick: Tick) -> tuple[str, Any]:
    """``("done", result)``, or ``("failed", error)`` with what the machine lacks as a `RunFailedError`."""
    try:
        return "done", function(job, tool, tick)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror or error}{where}: what is finished stays; mend it and run the same command again"
        return "failed", RunFailedError(text)
    except Exception as error:
        return "failed", error


def _work(connection: Connection, tool: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a thread here
    pending = 0

    def tick(count: int) -> None:
        nonlocal pending
        pending += count
        if pending >= TICK_BYTES:
            connection.send(("tick", pending))
            pending = 0

    try:
        while True:
            function, job = connection.recv()
            answer = attempt(function, job, tool, tick)
            if pending:
                connection.send(("tick", pending))
                pending = 0
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
