"""The end of a search: its best trial, or the trials none of which another beats, as a table and as best.yaml."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmlab.journal import beside
from lmlab.sweeps.search import STUDY, OptunaPoints

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEST = "best.yaml"


def best_trials(points: OptunaPoints) -> list[FrozenTrial]:
    """The finished trial with the best value, the earliest of equals; of several objectives the Pareto front."""
    study = points.study
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if not complete:
        return []
    if len(points.search.objectives) == 1:
        sign = -1 if points.search.objectives[0].direction == "maximize" else 1
        return [min(complete, key=lambda trial: (sign * trial.values[0], trial.number))]
    return sorted(study.best_trials, key=lambda trial: trial.values)


def show_best(points: OptunaPoints, console: Console) -> None:
    """Print what the search has found and how to look at the study, and write best.yaml."""
    counts = Counter(trial.state.name.lower() for trial in points.study.get_trials(deepcopy=False))
    told = ", ".join(f"{count} {_WORDS.get(state, state)}" for state, count in sorted(counts.items()))
    best = best_trials(points)
    if best:
        _write(points, best, told)
        console.print(_table(points, best, told), highlight=False)
        console.print(
            f"best: {os.path.relpath(points.root / BEST)}", markup=False, highlight=False, soft_wrap=True
        )
    else:
        console.print(f"search {points.study.study_name}: {told or 'no trial'}", highlight=False)
    console.print(
        f"study: optuna-dashboard {shlex.quote(_shown(points))}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


_WORDS = {"complete": "finished", "fail": "failed", "running": "open"}


def _shown(points: OptunaPoints) -> str:
    """The storage as a person types it: relative to here, no password."""
    if points.search.storage is None:
        return f"sqlite:///{os.path.relpath(points.root / STUDY)}"
    from sqlalchemy.engine import make_url

    return make_url(points.search.storage).render_as_string(hide_password=True)


def _overrides(trial: FrozenTrial) -> list[str]:
    return list(trial.user_attrs.get("overrides", ()))


def _table(points: OptunaPoints, best: Sequence[FrozenTrial], told: str) -> Table:
    what = "best trial" if len(points.search.objectives) == 1 else "trials that no other beats in everything"
    table = Table(title=f"{points.study.study_name}: {what} ({told})", box=SIMPLE, title_justify="left")
    table.add_column("trial", justify="right", no_wrap=True)
    for objective in points.search.objectives:
        table.add_column(objective.metric, justify="right", no_wrap=True)
    table.add_column("python train.py", overflow="fold")
    for trial in best:
        values = [f"{value:.6g}" for value in trial.values]
        table.add_row(str(trial.number), *values, Text(shlex.join(_overrides(trial))))
    return table


def _write(points: OptunaPoints, best: Sequence[FrozenTrial], told: str) -> None:
    import yaml

    metrics = [objective.metric for objective in points.search.objectives]
    content: dict[str, Any] = {
        "study": points.study.study_name,
        "trials": told,
        "objectives": [objective.model_dump() for objective in points.search.objectives],
        "best": [
            {
                "trial": trial.number,
                "values": dict(zip(metrics, trial.values, strict=True)),
                "overrides": _overrides(trial),
                "directory": trial.user_attrs.get("directory"),
            }
            for trial in best
        ],
    }
    path = points.root / BEST
    temporary = beside(path, "tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    temporary.replace(path)
