"""A run made again from what it left behind, run.json and config.yaml, and compared with what it logged and saved.

What it is made from is compared first: data and tokenizer must be those of the run; another commit, version or machine
is said and tried. On the same machine and versions a CPU gives every number again, bit for bit; elsewhere the table
says how far they are apart, and where.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.checks import (
    COMPARED,
    Agreement,
    common_checkpoint,
    compare_runs,
    logged_rows,
    metric_agreement,
    run_worker,
)
from lmlab.config.compose import fingerprint, load_frozen
from lmlab.config.schema import RunConfig, world_size
from lmlab.journal import RunDir, read_json, slug, write_json
from lmlab.records import RunFailedError, UserError

if TYPE_CHECKING:
    from lmlab.start import Plan

FROM = ("git_commit", "git_diff_hash", "versions", "hardware")
"""Of run.json: what the numbers depend on besides config, data and tokenizer."""


@dataclass(frozen=True)
class Reproduction:
    """A run and the run that was made again from it.

    Attributes:
        made: the new run's directory.
        steps: after which step it was ended, None if it was made whole.
        setting: a line for each thing that is another now.
        metrics: how far each metric agrees.
        samples: (lines compared, lines that are equal).
        weights: the checkpoint that was compared, None if there was none to compare.
        differences: a line for everything that differs, none if the run was reproduced.
    """

    run: RunDir
    made: RunDir
    steps: int | None
    setting: list[str]
    metrics: list[Agreement]
    samples: tuple[int, int]
    weights: str | None
    differences: list[str]

    @property
    def equal(self) -> bool:
        """Bit for bit, in all that could be compared."""
        return not self.differences

    @property
    def weights_equal(self) -> bool | None:
        """Whether weights, optimizer, schedule and random states are; None if there was no checkpoint to compare."""
        return None if self.weights is None else not any(d.startswith(COMPARED) for d in self.differences)

    def write(self) -> Path:
        """Put it into the new run's directory as reproduction.json."""
        about = {
            "run": str(self.run.path),
            "equal": self.equal,
            "differences": self.differences,
            "steps": self.steps,
            "setting": self.setting,
            "metrics": [{**asdict(metric), "equal": metric.equal} for metric in self.metrics],
            "samples": {"compared": self.samples[0], "equal": self.samples[1]},
            "weights": {
                "compared": self.weights,
                "equal": self.weights_equal,
            },
        }
        write_json(self.made.reproduction, about)
        return self.made.reproduction


def reproduce(
    run: RunDir, *, to: Path | None = None, steps: int | None = None, say: Callable[[str], None] = print
) -> Reproduction:
    """Train ``run`` again, in a new directory and fresh processes, and compare.

    A run that did not finish is made again up to the last step it logged.

    Args:
        to: where the new directory goes; beside the run's own if None.
        steps: end after so many, under the same schedule.
        say: told what is another now, before the training.

    Raises:
        UserError: not a run, nothing to compare, or its data, its tokenizer or the checkpoint it branched from is
            another or gone.
        RunFailedError: the new run failed.
    """
    from lmlab.start import create_run, plan_run

    config, info = load_frozen(run.config), read_json(run.info)
    if "data_hash" not in info:
        raise UserError("no readable run.json", where=str(run.path), fix="give a run directory")
    trunk, after = _branched_from(info)
    upto = _last_step(run, after, steps)
    folder = (
        to or run.path.parent
    ) / f"{slug(run.path.name, max_length=100)}-reproduced-{secrets.token_hex(3)}"
    again = _again(config, trunk, upto).model_copy(update={"run_name": folder.name})
    plan = plan_run(again, [], folder=folder)
    _require_same(plan, info, run)
    threads = _use_threads(info) if world_size(config) == 1 else {}
    create_run(plan, [str(run.path)])
    plan.run.release()
    setting = list(_other_setting(config, info, read_json(plan.run.info)))
    for line in setting:
        say(f"note: {line}")
    done = run_worker(plan.run, quiet=False, environment=threads)
    if done.returncode:
        raise RunFailedError(f"the new run ended with exit code {done.returncode} ({plan.run.path})")
    mine, its = logged_rows(run, plan.run, "samples", after=after, upto=upto)
    return Reproduction(
        run,
        plan.run,
        upto,
        setting,
        metric_agreement(run, plan.run, after=after, upto=upto),
        (max(len(mine), len(its)), sum(a == b for a, b in zip(mine, its, strict=False))),
        common_checkpoint(run, plan.run, upto=upto),
        list(compare_runs(run, plan.run, after=after, upto=upto, both_fresh=True)),
    )


def _branched_from(info: Mapping[str, Any]) -> tuple[str | None, int]:
    """(the checkpoint of another run that this one began at, its step); (None, -1): it began at step 0, which counts too."""
    begun = info.get("branched_from")
    if begun is None:
        return None, -1
    manifest = read_json(Path(begun) / "manifest.json")
    if "step" not in manifest:
        raise UserError(
            "the checkpoint this run branched from is gone", where=str(begun), fix="put it back where it was"
        )
    return str(begun), int(manifest["step"])


def _last_step(run: RunDir, after: int, steps: int | None) -> int | None:
    """After which step to end, None for the run's own end."""
    logged = [row["step"] for row in logged_rows(run, run, "metrics", after=after)[0]]
    last = max(logged, default=0)
    if last <= max(0, after):
        raise UserError("nothing to compare: it logged no step", where=str(run.path), fix="give another run")
    if steps is not None and steps <= max(0, after):
        what = f"--steps {steps}" + (f" of a run that began at step {after}" if after > 0 else "")
        raise UserError(what, where="command line", fix=f"give {max(0, after) + 1} or more")
    finished = read_json(run.summary).get("status") == "finished"
    if finished and (steps is None or steps >= last):
        return None
    return last if steps is None else min(steps, last)


def _again(config: RunConfig, trunk: str | None, upto: int | None) -> RunConfig:
    """The run's config without W&B, and ended after ``upto`` under the same schedule."""
    from lmlab.training.options import StopAfterConfig

    told: dict[str, Any] = {
        "resume": trunk,
        "overwrite": False,
        "logger": config.logger.model_copy(update={"mode": "disabled"}),
    }
    if upto is not None:
        stop = StopAfterConfig(kind="stop_after", steps=upto)
        told["callbacks"] = {**config.callbacks, "stop_after": stop}
    return config.model_copy(update=told)


def _require_same(plan: Plan, info: Mapping[str, Any], run: RunDir) -> None:
    for what, now in (("data", plan.prepared.folder.name), ("tokenizer", plan.tokenizer_hash)):
        if info.get(f"{what}_hash") != now:
            raise UserError(
                f"the {what} is not what this run was trained on (was {str(info.get(f'{what}_hash'))[:12]}, now {now[:12]})",
                where=str(run.path),
                fix="put it back as it was",
            )


def _use_threads(info: Mapping[str, Any]) -> dict[str, str]:
    """Sums are cut by threads: as many here as there, and in the new process."""
    import torch

    threads = (info.get("hardware") or {}).get("threads")
    if not isinstance(threads, int) or threads < 1:
        return {}
    torch.set_num_threads(threads)
    return {"OMP_NUM_THREADS": str(threads)}


def _other_setting(config: RunConfig, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing in run.json that is another now."""
    if was.get("config_hash") != fingerprint(config):
        yield "config.yaml is another than at the start of the run"
    for name in FROM:
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    yield f"{name}.{key} was {old.get(key)}, now {new.get(key)}"
        elif old != new:
            yield f"{name} was {old}, now {new}"
