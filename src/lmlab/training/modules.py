"""Causal-LM training as Lightning modules.

The loss of an optimizer step is the sum of its token losses divided by the number of its supervised tokens, over all
micro-batches and all ranks: exact, where Lightning and its peers average averages. How: `training_step` returns a sum
scaled by a constant; when the last backward is over, `on_before_optimizer_step` rescales the gradients once by what
the true divisor turned out to be, before clipping. Lightning has by then divided by ``accumulate_grad_batches`` and
DDP by the world size, so the factor is ``world_size * accumulate * SCALE / supervised_tokens``.
"""

from __future__ import annotations

import math
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
from lmlab.records import PackedBatch, RunFailedError
from lmlab.training.options import OptimConfig

MAX_OVERFLOWS = (
    30  # in a row: a loss scale of 65,536 is down to 1e-4 by then, so the gradient itself is broken
)
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
        prompts, references: validation records that text metrics generate for.
        metrics: name -> text metric.
        generator: continues prompts with the model in training.
        sampler: how it draws for metrics.
        test_bytes: as ``supervised_bytes``, of the test side.
    """

    supervised_bytes: int
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
        on_nonfinite: ``stop`` or ``skip`` when a gradient norm is not finite.
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
    ) -> None:
        super().__init__()
        self.model, self.loss, self.optim = model, loss, optim
        self.max_steps, self.validation, self.meter = max_steps, validation, meter
        self.on_nonfinite = on_nonfinite
        self.totals = StepTotals()
        self.measure_memory = False
        self.skipped_steps = self._overflows = 0
        self._window: torch.Tensor | None = (
            None  # [loss sum, supervised, tokens, tokens * context] of this step
        )
        self._val_nll, self._val_tokens = (
            SumMetric().set_dtype(torch.float64),
            SumMetric().set_dtype(torch.float64),
        )
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self.on_metrics: Callable[[dict[str, float]], None] = lambda values: None

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: PackedBatch, batch_index: int) -> torch.Tensor:
        """Scaled loss sum of one micro-batch; see the module docstring for who divides it."""
        if self.measure_memory:
            self.meter.start("forward")
        total = loss_sum(self.model, batch, self.loss)
        counts = torch.tensor(
            [0.0, len(batch.supervised_index), batch.num_tokens, _context_sum(batch)], dtype=torch.float64
        )
        counts = counts.to(self.device, non_blocking=True)
        counts[0] += total.detach()
        self._window = counts if self._window is None else self._window + counts
        return total / SCALE

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Memory phase only."""
        if self.measure_memory:
            self.meter.start("backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the summed gradient by the supervised tokens of the whole step."""
        if self.measure_memory:
            self.meter.start("optimizer")
        assert self._window is not None
        window, self._window = self._window, None
        if self.trainer.world_size > 1:
            dist.all_reduce(window)
        self._last_window = window.tolist()
        batches = self.trainer.world_size * self.trainer.accumulate_grad_batches
        # A step without any supervised token has zeros. The factor is a Python number and not a foreach product, so that
        # the product is made in fp32 whatever the gradients' type: in bf16 the factor alone would be 0.4 % off.
        factor = batches * SCALE / max(1.0, self._last_window[1])
        for parameter in self._trainable:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, remember it, and stop or skip where it is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self._trainable, gradient_clip_val or math.inf)
        loss, supervised, tokens, context = self._last_window
        value = float(norm)
        if not math.isfinite(value):
            self._nonfinite(value, loss / max(1, supervised))
        else:
            self._overflows = 0
        self.totals.loss += loss
        self.totals.supervised += supervised
        self.totals.tokens += tokens
        self.totals.context += context
        self.totals.steps += 1
        self.totals.grad_norm = value
        self.totals.lr = float(
            optimizer.param_groups[0]["lr"]
        )  # the schedule moves on before the batch's last hook

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _nonfinite(self, norm: float, loss: float) -> None:
        step = self.global_step + 1
        self._overflows += 1
        if self._scaler() is not None and math.isfinite(loss) and self._overflows <= MAX_OVERFLOWS:
            self.skipped_steps += (
                1  # an fp16 overflow: the scaler skips this update itself and halves its scale
            )
            return
        if self.on_nonfinite == "stop":
            raise RunFailedError(
                f"gradient norm is {norm} and the loss {loss:.4g} at step {step}, so the update was not made: "
                "lower optim.lr, or trainer.on_nonfinite=skip"
            )
        self.skipped_steps += 1
        for parameter in self._trainable:
            parameter.grad = None

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, stepped once per optimizer step."""
        optimizer = self.optim.build(
            self._trainable, on_cuda=self.device.type == "cuda", scaled=self._scaler() is not None
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.factor(self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- validation ---------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Memory phase only."""
        self.meter.start("eval")

    def validation_step(self, batch: PackedBatch, batch_index: int) -> None:
        """Add up negative log-likelihood and tokens; division comes after all batches of all ranks."""
        self._val_nll.update(loss_sum(self.model, batch).double())
        self._val_tokens.update(float(len(batch.supervised_index)))

    def on_validation_epoch_end(self) -> None:
        """Reduce over ranks, compute, and hand the figures to the log."""
        values = {**self._likelihood("val", self.validation.supervised_bytes), **self.text_metrics()}
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

    def _likelihood(self, side: str, supervised_bytes: int) -> dict[str, float]:
        """Loss (nats per token), perplexity and bits per byte over all batches of all ranks; begins anew."""
        nll, tokens = float(self._val_nll.compute()), float(self._val_tokens.compute())
        self._val_nll.reset()
        self._val_tokens.reset()
        loss = nll / max(1.0, tokens)
        values = {f"{side}/loss": loss, f"{side}/perplexity": math.exp(min(loss, 700.0))}
        if supervised_bytes:
            values[f"{side}/bits_per_byte"] = nll / math.log(2) / supervised_bytes
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
        """Generate for the first validation prompts, each on one rank, and compare with their references."""
        about = self.validation
        if not about.metrics or about.generator is None or about.sampler is None:
            return {}
        values: dict[str, float] = {}
        self.meter.start("generate")
        for name, config in about.metrics.items():
            metric = config.build().to(self.device)
            chosen = range(
                self.global_rank, min(config.max_examples, len(about.prompts)), self.trainer.world_size
            )
            sampler = about.sampler.model_copy(update={"max_new_tokens": config.max_new_tokens})
            texts = about.generator([about.prompts[i] for i in chosen], sampler=sampler, seeds=list(chosen))
            metric.update([text.text for text in texts], [about.references[i] for i in chosen])
            values[f"val/{name}"] = float(metric.compute())
        return values


def _context_sum(batch: PackedBatch) -> float:
    """Sum over tokens of their document's length, for counting attention FLOPs."""
    if batch.cu_seqlens is None:
        return float(batch.num_tokens * batch.input_ids.shape[1])
    return float(batch.cu_seqlens.diff().double().square().sum())
