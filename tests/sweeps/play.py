"""Searches whose jobs train nothing: each writes what a run would have written, at once or step by step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lmlab.config.search import OptunaSearch
from lmlab.journal import Journal, RunDir, write_json
from lmlab.sweeps.launcher import Job
from lmlab.sweeps.search import OptunaPoints
from lmlab.sweeps.space import parse_space

SETTINGS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "conf" / "hparams_search" / "optuna.yaml").read_text("utf-8")
)
SPACE = ("optim.lr=tag(log, interval(1e-4, 1e-2))", "adapter.rank=choice(4,8,16)", "trainer.max_steps=20")

Curve = Callable[[Mapping[str, Any]], dict[str, Any]]


def search(**changes: Any) -> OptunaSearch:
    """The settings of optuna.yaml with ``changes``."""
    return OptunaSearch.model_validate({**SETTINGS, **changes})


def points(
    root: Path,
    *space: str,
    overwrite: bool = False,
    steps: tuple[int, int | None] = (1, None),
    **changes: Any,
) -> OptunaPoints:
    """A search of ``space`` in ``root``."""
    return OptunaPoints(
        search(**changes), parse_space(space or SPACE), root, overwrite=overwrite, steps=steps
    )


def values(overrides: list[str]) -> dict[str, Any]:
    """Key -> value of overrides that YAML can read."""
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in overrides)}


def bowl(params: Mapping[str, Any]) -> dict[str, Any]:
    """A loss whose best is near lr=1e-3 and rank=8, and a memory that grows with the rank."""
    import math

    loss = (math.log10(float(params["optim.lr"])) + 3) ** 2 + abs(params["adapter.rank"] - 8) / 8
    return {
        "best/val_loss": loss,
        "final/val/loss": loss + 0.1,
        "memory/peak_gb": 0.1 * params["adapter.rank"],
    }


def begin(chosen: OptunaPoints, number: int) -> Job | None:
    """The job of the next point, with its folder."""
    overrides = chosen.next(number)
    if overrides is None:
        return None
    folder = chosen.root / f"{number}-job"
    folder.mkdir(parents=True, exist_ok=True)
    return Job(number, overrides, "", folder, status="running", run=RunDir(folder))


def end(chosen: OptunaPoints, job: Job, figures: Mapping[str, Any], status: str = "finished") -> None:
    """The job has ended with these figures."""
    assert job.run is not None
    write_json(job.run.summary, {"status": status, "exit_code": 0, **figures})
    job.status = status
    chosen.done(job)


def log(job: Job, **rows: float) -> None:
    """Lines of metrics.jsonl: ``log(job, s5=0.3)`` is val/loss 0.3 at step 5."""
    assert job.run is not None
    journal = Journal(job.run)
    for step, value in rows.items():
        journal.log(int(step[1:]), {"val/loss": value})
    journal.close()


def play(
    chosen: OptunaPoints, curve: Curve = bowl, *, first: int = 0, at_once: int = 1, die_at: int | None = None
) -> int:
    """Run all jobs; how many ran.

    Args:
        first: number of the first job.
        at_once: jobs open at the same time; the oldest ends first.
        die_at: kill this process, by a signal nothing can catch, while that job is open.
    """
    number, running = first, list[Job]()
    while True:
        while len(running) < at_once and (job := begin(chosen, number)) is not None:
            running.append(job)
            if number == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            number += 1
        if not running:
            return number - first
        job = running.pop(0)
        end(chosen, job, curve(values(job.overrides)))
