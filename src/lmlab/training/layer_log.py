"""Per layer, at every validation: how far its weight has moved, in how many directions, under what gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lmlab.models.layers import TrackedLayers, averages
from lmlab.training.modules import CausalLMModule
from lmlab.training.options import TrainerConfig

LogMetrics = Callable[[int, Mapping[str, float]], None]
LogLayers = Callable[[int, Sequence[Mapping[str, Any]]], None]


class LayerLog(Callback):
    """Reads `TrackedLayers` at the end of each step after which a validation comes, that of an early stop too.

    Gradients are those of that step, over all ranks and before clipping: where nothing else is trained, the root of
    their squares' sum is ``train/grad_norm``. Nothing is read at step 0, where no layer has moved. Goes after whatever may
    ask for a stop in this step.

    Args:
        options: whether at all, and when validations are due.
        max_steps: the last step is read too.
        log: ``(step, averages)``, on rank 0 only.
        log_layers: ``(step, a row for each layer)``, on rank 0 only.
        pause: entered while reading (the log's clock stands still).
    """

    def __init__(
        self,
        options: TrainerConfig,
        *,
        max_steps: int,
        log: LogMetrics,
        log_layers: LogLayers,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.options, self.max_steps = options, max_steps
        self.log_metrics, self.log_layers, self._pause = log, log_layers, pause
        self._layers: TrackedLayers | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What updates are measured against: the weights before those of a checkpoint come in."""
        assert isinstance(pl_module, CausalLMModule)
        if stage == "fit" and self.options.layer_stats and (trainer.is_global_zero or _is_sharded(trainer)):
            self._layers = TrackedLayers(pl_module.model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a resumed run begins at was read before it was saved."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Here and not at the validation itself: before that Lightning lets the gradients go."""
        assert isinstance(pl_module, CausalLMModule)
        step = trainer.global_step
        if self._layers is None or step == self._step:
            return
        self._step = step
        stops = trainer.should_stop and trainer.limit_val_batches != 0  # a signal's stop validates nothing
        if step % self.options.val_every_n_steps != 0 and step < self.max_steps and not stops:
            return
        pl_module.meter.start(None)  # what is read here is no part of the optimizer's memory
        with self._pause():
            figures = self._layers.read(grad_scale=pl_module.clipped_by)
            if trainer.is_global_zero and figures:
                self.log_layers(step, [asdict(row) for row in figures])
                self.log_metrics(step, averages(figures))


def _is_sharded(trainer: Trainer) -> bool:
    return isinstance(trainer.strategy, ModelParallelStrategy)
