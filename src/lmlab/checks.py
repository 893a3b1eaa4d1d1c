"""Certificates: what a run claims, tried out on its own config in fresh processes.

Resuming: a run that was interrupted and went on is the run that was not. Two runs are made, one whole and one that begins
at a checkpoint of the first, and everything a later step depends on or leaves behind is compared bit for bit: losses and
gradient norms as logged, trained weights, optimizer and schedule, random states, samples. On a GPU kernels that add in
no fixed order may differ in the last bits; what differs is then named with its size.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmlab.config.schema import RunConfig
from lmlab.journal import RunDir, write_json
from lmlab.records import RunFailedError

MEASURED = ("time", "perf/", "memory/")
"""Beginnings of what differs between two runs of the same numbers."""


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
    done = subprocess.run(
        [sys.executable, "-m", "lmlab.worker", str(plan.run.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailedError(f"the run {config.run_name} of the check ended with {done.returncode}: {last}")
    return plan.run


def compare_runs(one: RunDir, other: RunDir, *, after: int = 0) -> Iterator[str]:
    """A line for everything that differs between two runs beyond step ``after``, and in their last checkpoints."""
    import torch

    for name in ("metrics", "samples"):
        rows = [list(_numbers(getattr(run, name), after)) for run in (one, other)]
        if rows[0] != rows[1]:
            pairs = zip(*rows, strict=False)
            first = next(
                (f"{a} against {b}" for a, b in pairs if a != b), f"{len(rows[0])} and {len(rows[1])} lines"
            )
            yield f"{name}.jsonl: {first[:300]}"
    last = [max(run.checkpoints.glob("step-*")) for run in (one, other)]
    if last[0].name != last[1].name:
        yield f"the last checkpoints are {last[0].name} and {last[1].name}"
        return
    states = [torch.load(path / "state.pt", map_location="cpu", weights_only=True) for path in last]
    compared = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step")
    for part in compared:
        yield from _differences(part, states[0].get(part), states[1].get(part))


def _numbers(file: Path, after: int) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = {name: value for name, value in json.loads(line).items() if not name.startswith(MEASURED)}
        if row["step"] > after and row.keys() != {"step"}:  # every start measures what loading took
            yield row


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
