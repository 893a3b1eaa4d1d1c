"""Config classes of the training loop: optimizer, trainer, checkpoints, samples, callbacks. No Lightning here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lmlab.registry import Config, callbacks, optimizers

if TYPE_CHECKING:
    import torch

    from lmlab.generation.text import TextGenerator


class OptimConfig(Config):
    """Optimizer and schedule; the schedule counts optimizer steps.

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled, on matrices only (not on norms, biases and embeddings' gains).
        warmup_steps: linear from 0 to lr.
        schedule: after the warmup: constant, linear or cosine down to ``min_lr_ratio * lr`` at the last step.
    """

    name: str
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    schedule: Literal["cosine", "linear", "constant"]
    min_lr_ratio: float = Field(ge=0, le=1)

    def build(
        self, parameters: Iterable[torch.nn.Parameter], *, on_cuda: bool, scaled: bool
    ) -> torch.optim.Optimizer:
        """The optimizer over parameter groups with and without weight decay.

        Args:
            scaled: gradients carry an fp16 loss scale that must be taken out before they are clipped.
        """
        raise NotImplementedError

    def groups(self, parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not (as in GPT-2 and nanoGPT)."""
        trained = [p for p in parameters if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def factor(self, max_steps: int) -> Callable[[int], float]:
        """``step -> share of the peak lr`` for the update after ``step`` updates are done."""
        warmup, low = self.warmup_steps, self.min_lr_ratio

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if self.schedule == "constant":
                return 1.0
            progress = min(1.0, (step - warmup + 1) / max(1, max_steps - warmup))  # 1 at the last update
            if self.schedule == "linear":
                return 1.0 - (1.0 - low) * progress
            return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))

        return share


@optimizers.register
class AdamW(OptimConfig):
    """AdamW (arXiv 1711.05101): torch's own, or bitsandbytes' with 8-bit states, paged to CPU memory if asked."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"]
    betas: list[float] = Field(min_length=2, max_length=2)
    eps: float = Field(gt=0)

    def build(
        self, parameters: Iterable[torch.nn.Parameter], *, on_cuda: bool, scaled: bool
    ) -> torch.optim.Optimizer:
        arguments: dict[str, Any] = {"lr": self.lr, "betas": (self.betas[0], self.betas[1]), "eps": self.eps}
        if self.name == "adamw":
            import torch

            # A fused optimizer unscales on its own, after clipping would have seen the scaled gradients.
            return torch.optim.AdamW(self.groups(parameters), fused=not scaled, **arguments)
        import bitsandbytes.optim as bnb_optim

        kind = bnb_optim.PagedAdamW8bit if self.name == "paged_adamw8bit" and on_cuda else bnb_optim.AdamW8bit
        return kind(self.groups(parameters), **arguments)


@optimizers.register
class Sgd(OptimConfig):
    """Plain stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    momentum: float = Field(ge=0, lt=1)

    def build(
        self, parameters: Iterable[torch.nn.Parameter], *, on_cuda: bool, scaled: bool
    ) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(self.groups(parameters), lr=self.lr, momentum=self.momentum)


class TrainerConfig(Config):
    """The loop. Lengths count optimizer steps.

    Attributes:
        max_steps: where training ends; null if max_epochs says it.
        max_epochs: passes over the training rows, turned into steps at the start; null if max_steps says it.
        batch_size: examples (or packed rows, or windows) per device and micro-batch.
        strategy: of several ranks: ``ddp`` (and ``auto``) has the model whole on each, ``fsdp`` a share of it.
        max_val_rows: a validation measures this many rows, spread evenly over the validation side and always the same;
            null for all of it. Bits per byte are then taken over a proportional share of its bytes. A run frozen before
            there was this key measures all.
        precision: of matrix products; weights that are trained stay fp32.
        on_nonfinite: a loss or gradient that is not finite stops the run before the update, or that update is skipped.
        max_nonfinite_steps: of updates skipped so, the run stops at the next.
        auto_batch: when memory runs out, begin again from the last checkpoint with half the micro-batch and twice the
            accumulation: the global batch stays.
        memory_plan: plan the peak memory of each phase before the first step (some seconds, once per configuration).
        layer_stats: at validations, measure each layer's update and gradient (see `lmlab.models.layers`).
    """

    max_steps: int | None = Field(ge=1)
    max_epochs: float | None = Field(gt=0)
    batch_size: int = Field(ge=1)
    accumulate_grad_batches: int = Field(ge=1)
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: int = Field(ge=1)
    num_nodes: int = Field(ge=1)
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    gradient_clip_val: float | None = Field(gt=0)
    val_every_n_steps: int = Field(ge=1)
    val_batch_size: int = Field(ge=1)
    max_val_rows: int | None = Field(default=None, ge=1)
    log_every_n_steps: int | None = Field(ge=1)
    num_workers: int = Field(ge=0)
    compile: bool
    on_nonfinite: Literal["stop", "skip"]
    max_nonfinite_steps: int = Field(ge=1)
    auto_batch: bool
    memory_plan: bool
    layer_stats: bool

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all devices."""
        return self.batch_size * self.accumulate_grad_batches * self.devices * self.num_nodes

    def steps(self, num_rows: int) -> int:
        """Optimizer steps of the run over ``num_rows`` training rows."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_epochs is not None  # the schema holds that one of the two is given
        return max(1, math.ceil(self.max_epochs * num_rows / self.rows_per_step))

    def log_due(self, step: int) -> bool:
        """Whether step ``step`` (1 is the first) is a log point: each of the first 100, then each tenth."""
        every = self.log_every_n_steps or (1 if step <= 100 else 10)
        return step % every == 0


class CheckpointConfig(Config):
    """Resumable checkpoints.

    Attributes:
        every_n_steps: besides the last step's; null for the last only.
        keep: how many of the newest are kept.
        on_error: a disk that takes no checkpoint is a warning, and the run goes on with what was saved before, or its end.
    """

    every_n_steps: int | None = Field(ge=1)
    keep: int = Field(ge=1)
    on_error: Literal["warn", "raise"]


class SamplesConfig(Config):
    """Texts generated while training.

    Attributes:
        prompts: how many from the validation set, or the prompts themselves.
        grid: names of samplers (conf/sampler), each tried on each prompt.
        every_n_steps: besides step 0 and the end; null means at every validation.
        seed: of the samplers; apart from the training seed, the same at every step.
    """

    prompts: Annotated[int, Field(ge=0)] | list[str]
    grid: list[str]
    every_n_steps: int | None = Field(ge=1)
    seed: int


@dataclass(frozen=True)
class RunTools:
    """What a callback may need of the run it is built for.

    Attributes:
        generator: continues prompts with the model in training; has it and its tokenizer.
        log: ``(step, metrics)`` to metrics.jsonl and W&B, on rank 0.
        pause: time spent inside does not count as training time.
        max_steps: optimizer steps of the run.
    """

    generator: TextGenerator
    log: Callable[[int, Mapping[str, float]], None]
    pause: Callable[[], AbstractContextManager[None]]
    max_steps: int


class CallbackConfig(Config):
    """Builds one Lightning callback."""

    kind: str

    def check(self) -> None:
        """Called before anything of the run is made.

        Raises:
            UserError: the callback could not work.
        """

    def build(self) -> Any:
        """The callback."""
        raise NotImplementedError

    def build_in(self, tools: RunTools) -> Any:
        """The callback of a run, for one that needs more of it than Lightning tells."""
        return self.build()


@callbacks.register
class StopAfterConfig(CallbackConfig):
    """End after the first ``steps`` steps of a longer schedule, with a validation and a checkpoint."""

    kind: Literal["stop_after"]
    steps: int = Field(ge=1)

    def build(self) -> Any:
        from lightning.pytorch.callbacks import LambdaCallback

        def stop(trainer: Any, *_: Any) -> None:
            if trainer.global_step >= self.steps:
                trainer.should_stop = True

        return LambdaCallback(on_train_batch_end=stop)


@callbacks.register
class EarlyStoppingConfig(CallbackConfig):
    """Stop when the monitored validation metric has not improved for ``patience`` validations.

    Attributes:
        monitor: a validation metric's name.
        min_delta: what counts as an improvement.
    """

    kind: Literal["early_stopping"]
    monitor: str
    mode: Literal["min", "max"]
    patience: int = Field(ge=1)
    min_delta: float = Field(ge=0)

    def build(self) -> Any:
        from lightning.pytorch.callbacks import EarlyStopping

        return EarlyStopping(
            self.monitor, mode=self.mode, patience=self.patience, min_delta=self.min_delta, verbose=False
        )
