"""Tasks of the lm-evaluation-harness during training, at validations or every n steps; training goes on as if there were none."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lmlab.evaluation.harness import run_suites
from lmlab.modes import is_sharded
from lmlab.training.modules import CausalLMModule
from lmlab.training.options import RunTools


class HarnessTasks(Callback):
    """Runs the tasks at step 0, at validations or every n steps, and at the end; logs ``eval/<task>/<metric>``.

    Args:
        tasks: of `lmlab.evaluation.harness.load_suites`.
        tools: of the run.
        every_n_steps: None for every validation.
        limit: documents of each task, the first ones; None for all.
        batch_size: rows in one forward pass.
    """

    def __init__(
        self,
        tasks: dict[str, Any],
        tools: RunTools,
        *,
        every_n_steps: int | None,
        limit: int | None,
        batch_size: int,
    ) -> None:
        self.tasks, self.tools = tasks, tools
        self.every, self.limit, self.batch_size = every_n_steps, limit, batch_size
        self._done = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a resumed run begins at was measured before it was saved."""
        if trainer.global_step:
            self._done = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At step 0, at the end, and between them if no rhythm of its own is set."""
        step = 0 if trainer.sanity_checking else trainer.global_step
        if step == 0 or step >= self.tools.max_steps or trainer.should_stop or self.every is None:
            self._run(trainer, pl_module, step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """In its own rhythm."""
        if self.every is not None and trainer.global_step % self.every == 0:
            self._run(trainer, pl_module, trainer.global_step)

    def _run(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """On the first rank; of a sharded model on all of them, as each has a part of the weights only."""
        assert isinstance(pl_module, CausalLMModule)
        if step == self._done or not (trainer.is_global_zero or is_sharded(pl_module.model)):
            return
        self._done = step
        generator = self.tools.generator
        with self.tools.pause(), pl_module.meter.phase("eval"):
            found = run_suites(
                generator.model,
                generator.tokenizer,
                self.tasks,
                limit=self.limit,
                batch_size=self.batch_size,
                around=generator.around,
            )
        values = {
            f"eval/{task}/{name}": value for task, each in found.items() for name, value in each.items()
        }
        if trainer.is_global_zero:
            self.tools.log(step, values)
