"""Certificates: what a run claims, tried out on its own config in fresh processes.

Resuming: a run that was interrupted and went on is the run that was not. Two runs are made, one whole and one that begins
at a checkpoint of the first, and everything a later step depends on or leaves behind is compared bit for bit: losses and
gradient norms as logged, trained weights, optimizer and schedule, random states, samples. On a GPU kernels that add in
no fixed order may differ in the last bits; what differs is then named with its size.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlab.config.schema import RunConfig
from lmlab.journal import RunDir, write_json
from lmlab.records import RunFailedError

MEASURED = ("time", "perf/", "memory/")
"""Beginnings of what differs between two runs of the same numbers."""
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
"""Parts of a checkpoint."""


def certify_resume(config: RunConfig, folder: Path, *, steps: int, at: int) -> dict[str, Any]:
    """Train ``steps`` steps whole, and again from the checkpoint of step ``at`` in a process of its own.

    Args:
        config: of the run that is certified; its last step, logger, names and places are replaced.
        folder: an empty one, for the two runs.

    Returns:
        ``equal``, ``differences`` (each a line), ``steps``, ``at`` and the versions it holds for.

    Raises:
        UserError: what a start with that config would say.
        RunFailedError: one of the runs failed.
    """
    trainer = config.trainer.model_copy(
        update={
            "max_steps": steps,
            "max_epochs": None,
            "log_every_n_steps": 1,
            "val_every_n_steps": min(config.trainer.val_every_n_steps, at),
        }
    )
    told = {
        "trainer": trainer,
        "checkpoint": config.checkpoint.model_copy(update={"every_n_steps": at, "keep": steps}),
        "logger": config.logger.model_copy(update={"mode": "disabled"}),
        "output_root": str(folder),
        "overwrite": False,
    }
    common = config.model_copy(update=told)
    whole = _train(common.model_copy(update={"run_name": "whole", "resume": None}), folder / "whole")
    start = whole.checkpoints / f"step-{at:08d}"
    again = _train(
        common.model_copy(update={"run_name": "resumed", "resume": str(start)}), folder / "resumed"
    )
    differences = list(compare_runs(whole, again, after=at))
    return {
        "certificate": "resumed = uninterrupted",
        "equal": not differences,
        "differences": differences,
        "steps": steps,
        "at": at,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_held_for(),
    }


def _train(config: RunConfig, folder: Path) -> RunDir:
    """A run of ``config`` in ``folder``, prepared here and trained in a fresh process."""
    from lmlab.start import create_run, plan_run

    plan = plan_run(config, [], folder=folder)
    create_run(plan, [])
    plan.run.release()
    done = run_worker(plan.run, quiet=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailedError(f"the run {config.run_name} of the check ended with {done.returncode}: {last}")
    return plan.run


def run_worker(
    run: RunDir, *, quiet: bool, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Train a run that was made, in a fresh process.

    Args:
        quiet: its output is kept in what is returned instead of shown.
        environment: over this process's own.
    """
    return subprocess.run(
        [sys.executable, "-m", "lmlab.worker", str(run.path)],
        env={**os.environ, **(environment or {})},
        capture_output=quiet,
        text=True,
        check=False,
    )


def compare_runs(
    one: RunDir, other: RunDir, *, after: int = 0, upto: int | None = None, both_fresh: bool = False
) -> Iterator[str]:
    """A line for everything that differs between two runs beyond step ``after``, and in their last checkpoints.

    Args:
        upto: the step at which ``other`` was ended early. What its end added there (a validation, samples) is left out,
            and the checkpoints compared are those of that step, if both have one.
        both_fresh: neither goes on from the other, so of the random states only torch's are compared: Python's own is
            drawn from by libraries that have nothing to do with training (W&B).
    """
    import torch

    for name in ("metrics", "samples", "layers"):
        rows = logged_rows(one, other, name, after=after, upto=upto)
        if rows[0] != rows[1]:
            pairs = zip(*rows, strict=False)
            first = next(
                (f"{a} against {b}" for a, b in pairs if a != b), f"{len(rows[0])} and {len(rows[1])} lines"
            )
            yield f"{name}.jsonl: {first[:300]}"
    last = [sorted(path.name for path in run.checkpoints.glob("step-*")) for run in (one, other)]
    common = common_checkpoint(one, other, upto=upto)
    if common is None:
        if upto is None:
            yield f"the last checkpoints are {' and '.join(names[-1] if names else 'none' for names in last)}"
        return
    paths = [run.checkpoints / common / "state.pt" for run in (one, other)]
    states = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    for state in states if both_fresh else ():
        state["rng"] = [
            {name: rank.get(name) for name in ("torch", "cuda")} for rank in state.get("rng") or []
        ]
    for part in COMPARED:
        yield from _differences(part, states[0].get(part), states[1].get(part))


def common_checkpoint(one: RunDir, other: RunDir, *, upto: int | None = None) -> str | None:
    """The checkpoint that both runs end in (both have of step ``upto``), None if there is none."""
    names = [{path.name for path in run.checkpoints.glob("step-*")} for run in (one, other)]
    if upto is not None:
        wanted = f"step-{upto:08d}"
        return wanted if wanted in names[0] & names[1] else None
    last = {max(found, default="") for found in names}
    return (last.pop() or None) if len(last) == 1 else None


def logged_rows(
    one: RunDir, other: RunDir, name: str, *, after: int, upto: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of ``name``.jsonl of two runs that can be compared, without what is measured; see `compare_runs`."""
    mine, its = (list(_numbers(getattr(run, name), after, upto)) for run in (one, other))
    if upto is not None:
        known = {_identity(row) for row in mine}
        its = [row for row in its if row["step"] < upto or _identity(row) in known]
    return mine, its


def _numbers(file: Path, after: int, upto: int | None) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
        try:
            row = {name: value for name, value in json.loads(line).items() if not name.startswith(MEASURED)}
            compared = after < row["step"] <= (math.inf if upto is None else upto)
        except (ValueError, AttributeError, KeyError, TypeError):  # torn by a kill, so not there
            continue
        if compared and row.keys() != {"step"}:  # every start measures what loading took
            yield row


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a line is about, whatever its numbers are."""
    return (row["step"], *sorted(row), row.get("prompt_id"), row.get("sampler"), row.get("layer"))


@dataclass(frozen=True)
class Agreement:
    """How far one metric of two runs agrees.

    Attributes:
        points: log points that both have.
        missing: those that one of them lacks.
        largest: relative difference, 0.0 if all are equal bit for bit; infinite where one is a number and one is not.
        step: where that is.
    """

    name: str
    points: int
    missing: int
    largest: float
    step: int | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs and nothing is missing."""
        return not self.missing and self.largest == 0.0


def metric_agreement(one: RunDir, other: RunDir, *, after: int, upto: int | None = None) -> list[Agreement]:
    """Every metric of two runs' metrics.jsonl, in the order of the first; for the arguments see `compare_runs`."""
    rows = logged_rows(one, other, "metrics", after=after, upto=upto)
    names = dict.fromkeys(name for side in rows for row in side for name in row if name != "step")
    found = []
    for name in names:
        mine, its = ({row["step"]: row[name] for row in side if name in row} for side in rows)
        apart = {step: _apart(mine[step], its[step]) for step in mine if step in its}
        worst = max(apart, key=lambda step: apart[step], default=None)
        largest = 0.0 if worst is None else apart[worst]
        missing = len(mine.keys() ^ its.keys())
        found.append(Agreement(name, len(apart), missing, largest, worst if largest else None))
    return found


def _apart(one: Any, other: Any) -> float:
    """Relative difference of two logged values."""
    if one == other:
        return 0.0
    if not all(isinstance(value, int | float) for value in (one, other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


def _differences(path: str, one: Any, other: Any) -> Iterator[str]:
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            yield from _differences(f"{path}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{index}]", a, b)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"{path}: {tuple(one.shape)} {one.dtype} against {tuple(other.shape)} {other.dtype}"
        elif not torch.equal(one, other):
            yield f"{path}: apart by up to {(one.double() - other.double()).abs().max():.3g}"
    elif one != other:
        yield f"{path}: {str(one)[:80]} against {str(other)[:80]}"


def _held_for() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "lightning")}
    return {"versions": versions, "gpu": gpu, "cpus": os.cpu_count()}


def write_certificate(run: RunDir, certificate: dict[str, Any]) -> Path:
    """Beside the run's other files."""
    write_json(run.resume_certificate, certificate)
    return run.resume_certificate
