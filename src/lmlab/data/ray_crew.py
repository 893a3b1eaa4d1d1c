"""The workers of a corpus as actors of a Ray cluster (https://docs.ray.io), one a CPU, wherever they run.

An actor keeps the encoder, and with it the words it has seen, for all its jobs; a plain Ray task would start each unit anew.
An actor that dies is replaced and its unit given out again: units are written whole or not at all, so it may be done twice.
Before its first unit every actor shows that it has the same code as the driver, can read the input and writes to the same
place, as a cluster's machines may differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from lmlab.data.crew import Progress, Team, attempt
from lmlab.records import RunFailedError, UserError

STORE_BYTES = 128 * 2**20
"""Ray's object store on this machine under ``local``: an encoder and results of some kilobytes pass through it."""
CONNECT_SECONDS = 5.0
WAIT_SECONDS = 30.0
"""How long the cluster may have no CPU for a worker before it is said."""
MOST_STARTS = 3
"""How often in a row workers may die before their first job."""

Probe = Callable[[], None]
"""Run by each worker before its first job, sent by pickle; raises what is wrong with its machine."""


def code_version() -> str:
    """Hash of what decides the bytes that are written: this package's code and the tokenizers library."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for folder in ("data", "tokenizers"):
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return f"{digest.hexdigest()[:12]}, tokenizers {version('tokenizers')}"


class _Worker:
    """The actor."""

    def __init__(self, tool: Any, folder: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a thread here
        with contextlib.suppress(
            OSError
        ):  # relative paths are those of the driver; without it the probe says so
            os.chdir(folder)
        self.tool = tool

    def probe(self, probe: Probe, code: str) -> tuple[str, Any]:
        """("done", machine), or ("failed", why this one cannot help)."""

        def look(job: object, tool: object, tick: object) -> str:
            machine = socket.gethostname()
            if code_version() != code:
                what = f"the worker on {machine} has other code: lmlab {code_version()}, here {code}"
                fix = "install the same lmlab and tokenizers on all nodes"
                raise UserError(what, where="--ray", fix=fix)
            probe()
            return machine

        return attempt(look, None, None, lambda count: None)

    def work(self, function: Callable[..., Any], job: Any) -> tuple[int, str, Any]:
        """Bytes done, and what `attempt` says."""
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count

        what, value = attempt(function, job, self.tool, tick)
        return done, what, value


class RayCrew(Team[Any]):
    """Actors of the cluster at ``address``: ``auto``, ``local`` (a Ray of our own on this machine) or HOST:PORT.

    Args:
        workers: at most so many; no more than the cluster has CPUs.
        cpus: what the user asked for; under ``local`` the CPUs that Ray takes this machine to have.
        probe: see `Probe`.
    """

    def __init__(
        self,
        tool: Any,
        workers: int,
        progress: Progress,
        *,
        address: str,
        probe: Probe,
        cpus: int | None = None,
    ) -> None:
        super().__init__(tool, workers, progress)
        self.address, self.probe, self.cpus = address, probe, cpus
        self._starting: dict[Any, Any] = {}
        self._ready: list[Any] = []
        self._jobs: dict[Any, Any] = {}
        self._failed_starts = 0
        self._waited = 0.0

    def __enter__(self) -> RayCrew:
        try:
            self._connect()
            self._code = code_version()
            has = int(self._ray.cluster_resources().get("CPU", 0))
            if has < 1:
                raise UserError("the Ray cluster has no CPU", where="--ray", fix="add a node to it")
            if self.cpus and self.cpus > has:
                print(f"ray: {has} workers, not {self.cpus}: the cluster has {has} CPUs", file=sys.stderr)
            self.workers = min(self.workers, has)
            self._tool = self._ray.put(self.tool)
            # Spread over the nodes; never restarted by Ray, as we give the lost job out again ourselves.
            self._actor = self._ray.remote(
                num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
            )(_Worker)
            for _ in range(self.workers):
                self._start()
        except BaseException:
            self._shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shutdown()

    def _shutdown(self) -> None:
        if not hasattr(self, "_ray"):
            return
        for actor in (*self._starting.values(), *self._ready):
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        self._ray.shutdown()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        try:
            import ray
        except ImportError as error:
            raise UserError("--ray needs Ray", where="--ray", fix="pip install 'lmlab[ray]'") from error
        told: dict[str, Any] = {"address": self.address, "log_to_driver": False, "logging_level": "ERROR"}
        if self.address == "local":
            told |= {
                "num_cpus": self.cpus or os.cpu_count() or 1,
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
            }
        elif self.address != "auto":
            _refuse_unreachable(self.address)
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**told)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            what = f"no Ray cluster at {self.address}: {str(error).strip().splitlines()[0]}"
            fix = "start one (ray start --head), give its address as HOST:PORT, or use --ray local"
            raise UserError(what, where="--ray", fix=fix) from error
        finally:
            if terminated is not None:
                signal.signal(signal.SIGTERM, terminated)  # Ray has put its own in place
        self._ray: Any = ray  # its stubs leave out `exceptions`

    def _start(self) -> None:
        actor = self._actor.remote(self._tool, os.getcwd())
        self._starting[actor.probe.remote(self.probe, self._code)] = actor

    def _free(self, running: Collection[Any]) -> list[Any]:
        return [actor for actor in self._ready if actor not in running]

    def _give(self, worker: Any, function: Callable[..., Any], job: Any) -> None:
        self._jobs[worker.work.remote(function, job)] = worker

    def _heard(self, running: Collection[Any], stage: str) -> Iterable[tuple[Any, str, Any]]:
        refs = [*self._jobs, *self._starting]
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=1.0)
        self._say_waiting()
        for ref in ready:
            if ref in self._starting:
                self._started(ref)
                continue
            actor = self._jobs.pop(ref)
            try:
                done, what, value = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                with contextlib.suppress(Exception):  # it may be out of reach only, and would keep its CPU
                    self._ray.kill(actor)
                self._ready.remove(actor)
                self._start()
                print("ray: a worker died; its unit is done again", file=sys.stderr)
                yield (
                    actor,
                    "lost",
                    f"a worker of the Ray cluster died, perhaps of a lack of memory: {_line(error)}",
                )
                continue
            yield actor, "tick", done
            yield actor, what, value

    def _started(self, ref: Any) -> None:
        """A worker has answered its probe, or has not lived to."""
        actor = self._starting.pop(ref)
        try:
            what, value = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= MOST_STARTS:
                raise RunFailedError(
                    f"workers of the Ray cluster do not start ({_line(error)}): "
                    "install the same lmlab on all nodes and look at the logs of Ray"
                ) from error
            self._start()
            return
        if what == "failed":
            raise value
        self._failed_starts = 0
        self._ready.append(actor)

    def _say_waiting(self) -> None:
        """Say once that no worker has got a CPU yet."""
        if self._ready or self._waited < 0:
            return
        self._waited = self._waited or time.monotonic()
        if time.monotonic() - self._waited > WAIT_SECONDS:
            print("ray: no CPU of the cluster is free yet; waiting", file=sys.stderr)
            self._waited = -1.0


def _refuse_unreachable(address: str) -> None:
    """Ray itself tries for a minute and logs all the while."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        fix = "start one (ray start --head), give its address as HOST:PORT, or use --ray local"
        raise UserError(f"no Ray cluster at {address}: {error}", where="--ray", fix=fix) from error


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
