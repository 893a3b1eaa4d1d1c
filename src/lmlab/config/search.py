"""The group ``hparams_search``: whether a multirun's points are searched, and how. `lmlab.sweeps` does it.

The classes stand here and not beside that code because a run's config, which lies below it, has them as a field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from lmlab.records import UserError
from lmlab.registry import Config, hparams_searches


class SearchConfig(Config):
    """Base of the ways to choose a multirun's points."""

    kind: str


@hparams_searches.register
class NoSearch(SearchConfig):
    """Every combination of what is listed (with ``-m``), or the one run."""

    # An experiment file may set keys of a search that hparams_search=none on the command line then switches off.
    model_config = ConfigDict(extra="ignore")

    kind: Literal["none"]


class Objective(Config):
    """A figure of a finished run, and which way is better.

    Attributes:
        metric: a key of summary.json; or a name of metrics.jsonl, which stands for its last value (``val/loss``: its best).
    """

    metric: str = Field(min_length=1)
    direction: Literal["minimize", "maximize"]

    def names(self) -> tuple[str, ...]:
        """The keys of summary.json it may have, the first one there counts."""
        return ("best/val_loss",) if self.metric == "val/loss" else (self.metric, f"final/{self.metric}")

    @property
    def logged(self) -> str:
        """Its name in metrics.jsonl, where it can be seen while the run goes on."""
        return "val/loss" if self.metric == "best/val_loss" else self.metric.removeprefix("final/")


@hparams_searches.register
class OptunaSearch(SearchConfig):
    """Points from Optuna, which learns from the ones before.

    Attributes:
        n_trials: of the study, over all its starts.
        timeout: seconds after which no trial begins any more.
        sampler: tpe (tree-structured Parzen estimator), random, grid, nsga2 (for several objectives).
        n_startup_trials: random ones before ``tpe`` learns.
        population_size: trials of a generation of ``nsga2``.
        objectives: several make a Pareto front.
        pruner: what ends a trial that is worse, at the same step, than those before it.
        memory_limit_gb: a point whose memory plan is beyond it is pruned before it starts; null: what the device has.
        study_name: null for the sweep's name.
        storage: a database's URL; null for study.db in the sweep's folder.
    """

    kind: Literal["optuna"]
    n_trials: int = Field(ge=1)
    timeout: float | None = Field(gt=0)
    sampler: Literal["tpe", "random", "grid", "nsga2"]
    seed: int = Field(ge=0, lt=2**32)
    n_startup_trials: int = Field(ge=0)
    population_size: int = Field(ge=2)
    objectives: list[Objective] = Field(min_length=1)
    pruner: Literal["none", "median", "hyperband", "successive_halving"]
    pruner_startup_trials: int = Field(ge=0)
    pruner_warmup_steps: int = Field(ge=0)
    memory_limit_gb: float | None = Field(gt=0)
    study_name: str | None = Field(min_length=1)
    storage: str | None = Field(min_length=1)


def broken_search_rules(search: SearchConfig) -> Iterator[UserError]:
    """Rules over several keys of a search."""
    if not isinstance(search, OptunaSearch):
        return
    metrics = [objective.metric for objective in search.objectives]
    if search.pruner != "none" and len(metrics) > 1:
        yield UserError(
            f"pruner={search.pruner} with {len(metrics)} objectives",
            where="hparams_search.pruner",
            fix="use hparams_search.pruner=none, or one objective: no trial is worse in all before it has ended",
        )
    if len(set(metrics)) < len(metrics):
        yield UserError(
            "the same metric twice", where="hparams_search.objectives", fix="name each metric once"
        )
