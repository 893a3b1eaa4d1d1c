"""Where Hydra looks for a sweeper; the work is done by lmlab.sweeps."""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LmlabSweeper(Sweeper):
    """``-m``: expands the sweep and gives each job processes of its own."""

    def __init__(self, params: Any = None) -> None:
        self.params = params  # key -> sweep, of a file under conf/
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.config, self.hydra_context = config, hydra_context

    def sweep(self, arguments: list[str]) -> Any:
        """Run all jobs and leave with their exit code."""
        from lmlab.sweeps.sweeper import sweep

        assert self.hydra_context is not None
        sys.exit(sweep(arguments, config_loader=self.hydra_context.config_loader, master=self.config))


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="lmlab",
    node={"_target_": f"{__name__}.LmlabSweeper", "params": {}},
    provider="lmlab",
)
