"""Causal-LM training as Lightning modules.

The loss of an optimizer step is the sum of its token losses divided by the number of its supervised tokens, over all
micro-batches and all ranks: exact, where Lightning and its peers average averages. How: `training_step` returns a sum
scaled by a constant; when the last backward is over, `configure_gradient_clipping` rescales the gradients by what the
true divisor turned out to be and, in the same pass, clips them. Lightning has by then divided by
``accumulate_grad_batches`` and DDP by the world size, so the factor is
``world_size * accumulate * SCALE / supervised_tokens``.

Besides that of the gradients there is one small all-reduce per optimizer step: of the step's counts and, with them, whether
any rank was asked to stop and, where gradients lie in shares, the squares that make up their norm. (In DDP's buckets the
counts would be fp32, which holds whole numbers up to 2^24, divided by the world size, and gone where a hook compresses
gradients.) What only the device knows, loss and gradient norm, is read once per step, together.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torchmetrics import SumMetric

from lmlab.evaluation.text import MetricConfig
from lmlab.generation.samplers import SamplerConfig
from lmlab.generation.text import TextGenerator
from lmlab.models.head import LossConfig, loss_sum
from lmlab.models.memory import MemoryMeter
from lmlab.models.sharding import sharded_loss_sum, shares
from lmlab.modes import is_sharded
from lmlab.records import PackedBatch, RunFailedError
from lmlab.training.options import OptimConfig
from lmlab.training.strategy import ShardedStrategy

MAX_OVERFLOWS = (
    30  # in a row: a loss scale of 65,536 is down to 1e-4 by then, so the gradient itself is broken
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM sends ahead of a time limit where it is asked to (``--signal=USR1@90``)."""
SCALE = 1024.0  # keeps the summed loss of a batch within fp16's range before the backward pass


@dataclass
class StepTotals:
    """Sums since the last log point, over all ranks; read and reset by the logging callback."""

    loss: float = 0.0
    supervised: float = 0.0
    tokens: float = 0.0
    steps: int = 0
    grad_norm: float = 0.0
    lr: float = 0.0
    context: float = 0.0  # sum over tokens of their document's length


@dataclass
class Validation:
    """What a validation pass is measured by.

    Attributes:
        supervised_bytes: UTF-8 bytes of the whole validation side's trained text, for bits per byte.
        supervised_tokens: of the whole validation side, where a part of it is measured: its bytes are then taken to be
            the same share of the whole as its tokens. None where all of it is.
        prompts, references: validation records that text metrics generate for.
        metrics: name -> text metric.
        generator: continues prompts with the model in training.
        sampler: how it draws for metrics.
        test_bytes: as ``supervised_bytes``, of the test side.
    """

    supervised_bytes: int
    supervised_tokens: int | None = None
    prompts: Sequence[str] = ()
    references: Sequence[str] = ()
    metrics: dict[str, MetricConfig] = field(default_factory=dict)
    generator: TextGenerator | None = None
    sampler: SamplerConfig | None = None
    test_bytes: int = 0


class CausalLMModule(LightningModule):
    """A causal LM (plain, quantized or adapted) under token-exact loss.

    Args:
        model: what is trained; its frozen part never enters a checkpoint.
        loss, optim: how.
        max_steps: optimizer steps of the run, for the schedule.
        validation: what validation measures.
        meter: memory by phase.
        on_nonfinite: ``stop`` or ``skip`` when the loss or the gradient norm is not finite.
        max_nonfinite_steps: skipped updates after which the next one stops the run.
        branches: it begins at another run's checkpoint, under its own learning rate, decay and betas.
    """

    strict_loading = False  # type: ignore[assignment]  # checkpoints hold the trained weights only

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        loss: LossConfig,
        optim: OptimConfig,
        max_steps: int,
        validation: Validation,
        meter: MemoryMeter,
        on_nonfinite: str = "stop",
        max_nonfinite_steps: int = 10,
        branches: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.optim = model, loss, optim
        self.max_steps, self.validation, self.meter = max_steps, validation, meter
        self.on_nonfinite, self.max_nonfinite_steps = on_nonfinite, max_nonfinite_steps
        self.branches = branches
        self._finite_loss = math.nan  # nats per token, of the last step that had one
        self.totals = StepTotals()
        self.clipped_by = 1.0  # what the last step's gradient was divided by, for its length alone
        self.measure_memory = False
        self.skipped_steps = self.nonfinite_steps = self._overflows = 0
        # Of this step so far: the loss sum, which the device knows, and what is known here without asking it.
        self._loss_sum: torch.Tensor | None = None
        self._counts = [0.0, 0.0, 0.0]  # supervised, tokens, tokens * context
        # Of this process, and of any rank at the end of the last step; 0 for none. See `callbacks.GracefulStop`.
        self.caught_signal = self.agreed_signal = 0
        self._val_nll, self._val_tokens = (
            SumMetric().set_dtype(torch.float64),
            SumMetric().set_dtype(torch.float64),
        )
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self.on_metrics: Callable[[dict[str, float]], None] = lambda values: None

    def configure_model(self) -> None:
        """Where the strategy shards, parameters are others from here on."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(self.model)
            self._trainable = [p for p in self.model.parameters() if p.requires_grad]

    def _total(self, batch: PackedBatch, *loss: LossConfig) -> torch.Tensor:
        return (sharded_loss_sum if is_sharded(self.model) else loss_sum)(self.model, batch, *loss)

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_index: int) -> torch.Tensor:
        """Scaled loss sum of one micro-batch; see the module docstring for who divides it."""
        if self.measure_memory:
            self.meter.start("forward")
        total = self._total(batch, self.loss)
        of_batch = (len(batch.supervised_index), batch.num_tokens, _context_sum(batch))
        self._counts = [count + more for count, more in zip(self._counts, of_batch, strict=True)]
        loss_sum_ = total.detach().double()
        self._loss_sum = loss_sum_ if self._loss_sum is None else self._loss_sum + loss_sum_
        return total / SCALE

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Memory phase only."""
        if self.measure_memory:
            self.meter.start("backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Memory phase only; the gradient is divided where its norm is taken, so that it is passed over once."""
        if self.measure_memory:
            self.meter.start("optimizer")

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Divide by the supervised tokens of the whole step, clip by the global norm; stop or skip if it is not finite."""
        gradients = shares(p.grad for p in self._trainable if p.grad is not None)
        loss_sum, raw, supervised, tokens, context = self._over_ranks(
            torch.nn.utils.get_total_norm(gradients)
        )
        batches = self.trainer.world_size * self.trainer.accumulate_grad_batches
        # A step without any supervised token has zeros.
        factor = batches * SCALE / max(1.0, supervised)
        norm = raw * factor
        if math.isfinite(norm) and math.isfinite(loss_sum):
            self._overflows = 0
            self._finite_loss = loss_sum / max(1.0, supervised)
            limit = math.inf if gradient_clip_val is None else gradient_clip_val
            self.clipped_by = max(1.0, (norm + 1e-6) / limit)  # as torch's clip_grad_norm_
            _scale(gradients, factor / self.clipped_by)
        else:
            self._nonfinite(norm, loss_sum / max(1, supervised), float(optimizer.param_groups[0]["lr"]))
        self.totals.loss += loss_sum
        self.totals.supervised += supervised
        self.totals.tokens += tokens
        self.totals.context += context
        self.totals.steps += 1
        self.totals.grad_norm = norm
        self.totals.lr = float(
            optimizer.param_groups[0]["lr"]
        )  # the schedule moves on before the batch's last hook

    def _over_ranks(self, norm: torch.Tensor) -> tuple[float, float, float, float, float]:
        """Loss sum, gradient norm, supervised tokens, tokens and context of the step over all ranks; begins anew.

        Args:
            norm: of this rank's gradients, which are everybody's or, of a sharded model, its share of them.
        """
        loss, (supervised, tokens, context) = self._loss_sum, self._counts
        assert loss is not None
        self._loss_sum, self._counts = None, [0.0, 0.0, 0.0]
        if self.trainer.world_size == 1:
            self.agreed_signal = self.caught_signal
            total, norm_ = torch.stack([loss, norm.to(loss)]).tolist()
            return total, norm_, supervised, tokens, context
        asked = [float(self.caught_signal == number) for number in STOP_SIGNALS]
        window = torch.tensor([0.0, 0.0, supervised, tokens, context, *asked], dtype=torch.float64)
        window = window.to(loss.device, non_blocking=True)
        in_shares = is_sharded(self.model)
        window[0] = loss
        if in_shares:
            window[1] = norm.double().square()
        dist.all_reduce(window)
        window[1] = window[1].sqrt() if in_shares else norm
        total, norm_, supervised, tokens, context, *askers = window.tolist()
        self.agreed_signal = next((n for n, count in zip(STOP_SIGNALS, askers, strict=True) if count), 0)
        return total, norm_, supervised, tokens, context

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _nonfinite(self, norm: float, loss: float, lr: float) -> None:
        """No update: the gradients are the same on every rank, so all of them decide alike."""
        step = self.global_step + 1
        self._overflows += 1
        if self._scaler() is not None and math.isfinite(loss) and self._overflows <= MAX_OVERFLOWS:
            self.skipped_steps += (
                1  # an fp16 overflow: the scaler skips this update itself and halves its scale
            )
            return
        self.nonfinite_steps += 1
        allowed = self.max_nonfinite_steps if self.on_nonfinite == "skip" else 0
        records = self.trainer.datamodule.records_of_step(step - 1)  # type: ignore[attr-defined]
        shown = ", ".join(records[:8]) + (f" and {len(records) - 8} more" if len(records) > 8 else "")
        what = (
            f"the gradient norm is {norm:g} and the loss {loss:.4g} at step {step} (records {shown}; lr {lr:.3g}; "
            f"last finite loss {self._finite_loss:.4g})"
        )
        if self.nonfinite_steps > allowed:
            raise RunFailedError(
                f"{what}, so the update was not made: lower optim.lr, or "
                + ("raise trainer.max_nonfinite_steps" if allowed else "trainer.on_nonfinite=skip"),
                everywhere=True,
                facts={"nonfinite/step": step, "nonfinite/records": records},
            )
        if self.global_rank == 0:
            print(f"warning: {what}: skipped ({self.nonfinite_steps} of {allowed})", file=sys.stderr)
        self.skipped_steps += 1
        for parameter in self._trainable:
            parameter.grad = None

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, stepped once per optimizer step."""
        optimizer = self.optim.build(
            self._trainable, on_cuda=self.device.type == "cuda", scaled=self._scaler() is not None
        )
        self._options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.factor(self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A branch has the other run's optimizer state by now, with that run's options; give it its own."""
        if not self.branches:
            return
        optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [options["lr"] for options in self._options]
        rates = [rate * self.optim.factor(self.max_steps)(schedule.last_epoch) for rate in schedule.base_lrs]
        for group, options, rate in zip(optimizer.param_groups, self._options, rates, strict=True):
            group.update(options, initial_lr=options["lr"], lr=rate)

    # --- validation ---------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Memory phase only."""
        self.meter.start("eval")

    def validation_step(self, batch: PackedBatch, batch_index: int) -> None:
        """Add up negative log-likelihood and tokens; division comes after all batches of all ranks."""
        self._val_nll.update(self._total(batch).double())
        self._val_tokens.update(float(len(batch.supervised_index)))

    def on_validation_epoch_end(self) -> None:
        """Reduce over ranks, compute, and hand the figures to the log."""
        about = self.validation
        found = self._likelihood("val", about.supervised_bytes, of_tokens=about.supervised_tokens)
        values = {**found, **self.text_metrics()}
        self.meter.start(None)
        for name, value in values.items():
            self.log(
                name, value, rank_zero_only=False, sync_dist=False
            )  # so that Lightning's own callbacks can monitor it
        self.on_metrics(values)

    def on_test_start(self) -> None:
        """Memory phase only."""
        self.meter.start("eval")

    def test_step(self, batch: PackedBatch, batch_index: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_index)

    def on_test_epoch_end(self) -> None:
        """The figures of the test side, measured once."""
        values = self._likelihood("test", self.validation.test_bytes)
        self.meter.start(None)
        self.on_metrics(values)

    def _likelihood(
        self, side: str, supervised_bytes: int, *, of_tokens: int | None = None
    ) -> dict[str, float]:
        """Loss (nats per token), perplexity and bits per byte over all batches of all ranks; begins anew."""
        nll, tokens = float(self._val_nll.compute()), float(self._val_tokens.compute())
        self._val_nll.reset()
        self._val_tokens.reset()
        loss = nll / max(1.0, tokens)
        values = {f"{side}/loss": loss, f"{side}/perplexity": math.exp(min(loss, 700.0))}
        measured_bytes = supervised_bytes * (tokens / of_tokens if of_tokens else 1.0)
        if measured_bytes:
            values[f"{side}/bits_per_byte"] = nll / math.log(2) / measured_bytes
        return values

    def text_metrics(self) -> dict[str, float]:
        """Metrics of generated text; none unless a subclass has them."""
        return {}

    # --- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The trained weights only; of a full model all of it."""
        if all(p.requires_grad for p in self.model.parameters()):
            return super().state_dict(*args, **kwargs)
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


class PretrainModule(CausalLMModule):
    """Every token is trained; validation is likelihood alone."""


class SFTModule(CausalLMModule):
    """The response is trained, the prompt masked; validation can also generate and compare texts."""

    def text_metrics(self) -> dict[str, float]:
        """Generate for the first validation prompts, each on one rank, and compare with their references.

        A sharded model generates all of them on all ranks, which measure a part each.
        """
        about = self.validation
        if not about.metrics or about.generator is None or about.sampler is None:
            return {}
        values: dict[str, float] = {}
        self.meter.start("generate")
        for name, config in about.metrics.items():
            metric = config.build().to(self.device)
            count = min(config.max_examples, len(about.prompts))
            mine = range(self.global_rank, count, self.trainer.world_size)
            chosen = range(count) if is_sharded(self.model) else mine
            sampler = about.sampler.model_copy(update={"max_new_tokens": config.max_new_tokens})
            texts = about.generator([about.prompts[i] for i in chosen], sampler=sampler, seeds=list(chosen))
            own = [
                (text.text, about.references[i]) for i, text in zip(chosen, texts, strict=True) if i in mine
            ]
            metric.update([text for text, _ in own], [reference for _, reference in own])
            found = metric.compute()
            named = found if isinstance(found, dict) else {name: found}
            values.update({f"val/{key}": float(value) for key, value in named.items()})
        return values


def _scale(gradients: list[torch.Tensor], factor: float) -> None:
    """Multiply in place, with the product made in fp32 whatever the gradients' type."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        torch._foreach_mul_(gradients, factor)
        return
    for gradient in gradients:  # on a CPU foreach rounds the factor to bf16 first: up to 0.4 % off
        gradient.mul_(factor)


def _context_sum(batch: PackedBatch) -> float:
    """Sum over tokens of their document's length, for counting attention FLOPs."""
    if batch.cu_seqlens is None:
        return float(batch.num_tokens * batch.input_ids.shape[1])
    return float(batch.cu_seqlens.diff().double().square().sum())
