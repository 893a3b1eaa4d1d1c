"""Hydra's ``-m`` without Hydra's launcher: the sweep is expanded here and every job runs in processes of its own.

Hydra's basic sweeper runs jobs in one process (CUDA memory, environment and W&B runs leak from job to job) and, with a
DDP launcher inside, each rank starts the whole sweep again (Lightning issue 11300). Here a job is composed, checked
and frozen, and then is nothing but a run directory for `lmlab.worker`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lmlab.records import UserError


def expand(arguments: Sequence[str], config_loader: Any) -> list[list[str]]:
    """Every combination of the swept overrides (Hydra's grammar: lists, choice(), range(), glob()), in order.

    Raises:
        UserError: an ``interval()``, which has no finite set of values.
    """
    from hydra.core.override_parser.types import Transformer

    parser = OverridesParser.create(config_loader=config_loader)
    axes: list[list[str]] = []
    for override in parser.parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_interval_sweep():
            raise UserError(
                f"{override.input_line} has no list of values", where=key, fix="use choice(...) or range(...)"
            )
        if override.is_sweep_override():
            axes.append(
                [f"{key}={value}" for value in override.sweep_string_iterator()]
                if not override.is_choice_sweep()
                else [f"{key}={value}" for value in override.sweep_iterator(transformer=Transformer.encode)]
            )
        else:
            axes.append([str(override.input_line)])
    return [list(combination) for combination in itertools.product(*axes)]


class LmlabSweeper(Sweeper):
    """Expands the sweep and hands the jobs to `lmlab.sweeps.launcher`; src/hydra_plugins only makes Hydra find it."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.config, self.hydra_context = config, hydra_context

    def sweep(self, arguments: list[str]) -> Any:
        """Run all jobs; exits with 1 if one failed."""
        import sys

        from lmlab.sweeps.launcher import run_jobs

        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        jobs = expand(arguments, loader)
        code = run_jobs(
            jobs,
            compose=lambda overrides: loader.load_sweep_config(self.config, overrides),
            arguments=arguments,
        )
        sys.exit(code)


def register() -> None:
    """Make ``hydra/sweeper: lmlab`` known to Hydra's config store."""
    ConfigStore.instance().store(
        group="hydra/sweeper", name="lmlab", node={"_target_": f"{__name__}.LmlabSweeper"}, provider="lmlab"
    )
