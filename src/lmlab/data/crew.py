"""Worker processes that take jobs one by one, report progress, and never outlive their parent.

Each worker has a pipe of its own and holds one tool (an encoder) for all its jobs. A pipe that ends tells either side
that the other is gone, however it went: a killed worker is reported at once and not waited for, and workers of a killed
parent stop at their next sign of progress. The first failing job in order is the one reported, whoever is faster.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from lmlab.records import RunFailedError

Tick = Callable[[int], None]
"""Called by a job with the bytes it has done since the last call."""
TICK_BYTES = 2**20


class Crew:
    """``with Crew(tool, workers, progress) as crew: results = crew.run(...)``.

    Args:
        tool: sent to every worker once, by pickle; the second argument of each job's function.
        workers: processes.
        progress: called with the stage, and bytes done and in all.
    """

    def __init__(self, tool: Any, workers: int, progress: Callable[[str, int, int], object]) -> None:
        self.tool, self.workers, self.progress = tool, workers, progress
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
            RunFailedError: a worker died, or ran out of disk or memory.
            Exception: the one of the first job in order that failed.
        """
        results: list[Any] = [None] * len(jobs)
        failed: dict[int, BaseException] = {}
        running: dict[Connection, int] = {}
        waiting = list(range(len(jobs)))[::-1]
        self.progress(stage, done, total)
        while True:
            for connection in self._processes:
                if waiting and not failed and connection not in running:
                    running[connection] = waiting.pop()
                    connection.send((function, jobs[running[connection]]))
            # Jobs are given out in order, so whatever precedes a failed one is running or done.
            open_jobs = [job for job in running.values() if not failed or job < min(failed)]
            if not open_jobs:
                break
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    what, value = ready.recv()
                except (EOFError, OSError):
                    self._died(ready, stage)
                if what == "tick":
                    done += value
                    self.progress(stage, done, total)
                    continue
                number = running.pop(ready)
                if what == "failed":
                    failed[number] = value
                results[number] = value
        if failed:
            raise failed[min(failed)]
        return results

    def _died(self, connection: Connection, stage: str) -> None:
        process = self._processes[connection]
        process.join(5)
        raise RunFailedError(
            f"a worker process died with exit code {process.exitcode} ({stage}; -9 is often a lack of memory): "
            "what is finished stays, run the same command again, perhaps with fewer --workers"
        )


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
            try:
                answer = ("done", function(job, tool, tick))
            except BrokenPipeError:
                raise
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                text = f"{error.strerror or error}{where}: what is finished stays; mend it and run the same command again"
                answer = ("failed", RunFailedError(text))
            except Exception as error:
                answer = ("failed", error)
            if pending:
                connection.send(("tick", pending))
                pending = 0
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
