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
        self.params = params
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


class TokenizerSweeper(LmlabSweeper):
    """``-m`` of scripts/train_tokenizer.py: no runs, but a page that compares the tokenizers."""

    def sweep(self, arguments: list[str]) -> Any:
        """Train and measure all of them and leave with the exit code."""
        from lmlab.tokenizer_lab.compare import compare

        assert self.hydra_context is not None
        sys.exit(compare(arguments, config_loader=self.hydra_context.config_loader, master=self.config))


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="lmlab",
    # Sweeps of an experiment file: {optim.lr: "1e-3,1e-4"}, as they would stand on the command line.
    node={"_target_": f"{__name__}.LmlabSweeper", "params": {}},
    provider="lmlab",
)
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="lmlab_tokenizers",
    node={"_target_": f"{__name__}.TokenizerSweeper", "params": {}},
    provider="lmlab",
)
