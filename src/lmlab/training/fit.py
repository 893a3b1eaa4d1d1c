"""One call that trains: a Lightning Trainer with lmlab's rhythm, and what came out of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lmlab.models.hardware import Hardware
from lmlab.training.callbacks import GracefulStop, StopAtLastStep
from lmlab.training.checkpoint import Checkpoints, FolderCheckpointIO
from lmlab.training.datamodule import LMDataModule
from lmlab.training.modules import CausalLMModule
from lmlab.training.options import TrainerConfig
from lmlab.training.strategy import ShardedStrategy, build_strategy, cluster_environment


@dataclass(frozen=True)
class FitResult:
    """What a fit ended with.

    Attributes:
        steps: optimizer steps done in all.
        best_loss, best_step: of the best validation after step 0, None if there was none.
        signal: the signal that stopped it, else None.
    """

    steps: int
    best_loss: float | None
    best_step: int | None
    signal: int | None


def build_trainer(
    options: TrainerConfig,
    hardware: Hardware,
    *,
    max_steps: int,
    callbacks: Sequence[Callback],
    root: Path,
    world_size: int,
) -> Trainer:
    """The Trainer. Validation: all of it at step 0 (as Lightning's sanity check), every n steps, and at the last."""
    _quiet()
    # Counted in micro-batches; a rhythm beyond the end would be refused by Lightning for finite loaders only.
    every = options.val_every_n_steps * options.accumulate_grad_batches
    strategy = build_strategy(options.strategy, hardware, world_size=world_size)
    trainer = Trainer(
        accelerator="gpu" if hardware.device.type == "cuda" else "cpu",
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=strategy,
        # Sharded weights are gathered in the products' type already.
        precision="32-true" if isinstance(strategy, ShardedStrategy) else hardware.lightning_precision,  # type: ignore[arg-type]
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate_grad_batches,
        gradient_clip_val=options.gradient_clip_val,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        # What a failed save means is for `Checkpoints` to say, on all ranks.
        plugins=[
            FolderCheckpointIO(on_error="warn", mapped=options.strategy == "fsdp"),
            cluster_environment(),
        ],
        default_root_dir=str(root),
        inference_mode=False,  # an inference tensor cached by a layer would break the next training step
    )
    # Lightning's is a blocking broadcast in every micro-batch, of a signal that `GracefulStop` takes before it is seen there.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
    # Its handler broadcasts too, from wherever the signal found the rank: the worker's own is there outside the steps.
    trainer._signal_connector.register_signal_handlers = _nothing
    return trainer


def _nothing() -> None:
    """In the place of what is done elsewhere."""


def _quiet() -> None:
    """Lightning's hints about things that are decided here."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Trying to infer the `batch_size`.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*does not require gradients.*")
    # torch 2.13's new name for it; 2.11 knows the old one alone.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step\\(\\)` before `optimizer.step.*")


def fit(
    trainer: Trainer,
    module: CausalLMModule,
    datamodule: LMDataModule,
    *,
    checkpoints: Checkpoints,
    stop: GracefulStop,
    resume_from: Path | None = None,
    test: bool = False,
) -> FitResult:
    """Train to the end, or until a signal asks to stop; then measure the test side, if ``test``, with the last weights.

    Raises:
        RunFailedError: a failure lmlab understands (a gradient that is not finite).
    """
    trainer.fit(module, datamodule, ckpt_path=str(resume_from) if resume_from else None, weights_only=True)
    if test and stop.signal is None:
        trainer.test(module, datamodule, verbose=False)
    return FitResult(trainer.global_step, checkpoints.best, checkpoints.best_step, stop.signal)


def loop_callbacks(
    log: Callback,
    samples: Callback | None,
    checkpoints: Checkpoints,
    stop: GracefulStop,
    *,
    max_steps: int,
    extra: Sequence[Any],
) -> list[Callback]:
    """In this order: the log first, so that a checkpoint holds what it logged; then what may ask to stop, then what acts on it."""
    return [StopAtLastStep(max_steps), log, stop, *extra, *([samples] if samples else []), checkpoints]
