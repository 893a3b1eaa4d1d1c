"""What happens around the steps: the log, the sample grid, a clean stop.

Metrics do not go through ``self.log`` while training (half a millisecond a call): sums stay on the device's side of
the step and are read once per log point, then written to the journal, the mirror and the console directly.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lmlab.evaluation.diversity import text_figures
from lmlab.generation.samplers import SamplerConfig
from lmlab.generation.text import GeneratedText, TextGenerator
from lmlab.models.flops import StepFlops
from lmlab.models.memory import MemoryMeter
from lmlab.modes import is_sharded
from lmlab.records import Sample
from lmlab.training.console import Progress
from lmlab.training.modules import STOP_SIGNALS, CausalLMModule, StepTotals
from lmlab.training.options import TrainerConfig

LogMetrics = Callable[[int, Mapping[str, float]], None]
LogSamples = Callable[[int, Sequence[Sample]], None]


class RunLog(Callback):
    """Reads the step's totals at log points and hands all metrics on.

    Args:
        options: when a log point is due.
        log: ``(step, metrics)``, on rank 0 only.
        progress: the bar or the plain lines.
        flops: for ``train/flops``.
    """

    def __init__(
        self,
        options: TrainerConfig,
        *,
        log: LogMetrics,
        progress: Progress,
        flops: StepFlops,
        meter: MemoryMeter,
    ) -> None:
        self.options, self.log_metrics, self.progress = options, log, progress
        self.flops, self.meter = flops, meter
        self._module: CausalLMModule | None = None
        self.tokens = self.flops_done = 0.0
        self._clock = self._paused = 0.0
        self._pause_began: float | None = None
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        """Running totals, those since the last log point too, which a resumed run goes on from."""
        assert self._module is not None
        return {
            "tokens": self.tokens,
            "flops": self.flops_done,
            "open": asdict(self._module.totals),
            "nonfinite": self._module.nonfinite_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        assert self._module is not None
        self.tokens, self.flops_done = state_dict["tokens"], state_dict["flops"]
        self._module.totals = StepTotals(**state_dict["open"])
        self._module.nonfinite_steps = state_dict.get("nonfinite", 0)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here (samples, checkpoints) does not count as training time."""
        began = time.monotonic()
        try:
            yield
        finally:
            if (
                self._pause_began is None
            ):  # else a validation is going on, whose whole time is left out already
                self._paused += time.monotonic() - began

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the validation metrics from the module, also those of step 0."""
        assert isinstance(pl_module, CausalLMModule)
        self._module = pl_module
        pl_module.on_metrics = lambda values: self._validated(trainer, values)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock of tokens per second starts here."""
        self._clock, self._paused, self._pause_began = time.monotonic(), 0.0, None
        self._step = trainer.global_step
        self.progress.start(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Memory by phase is measured in steps that are logged."""
        assert isinstance(pl_module, CausalLMModule)
        if self._pause_began is not None:
            self._paused += time.monotonic() - self._pause_began
            self._pause_began = None
        pl_module.measure_memory = self.options.log_due(trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """At the end of a logged optimizer step, write its line."""
        assert isinstance(pl_module, CausalLMModule)
        step = trainer.global_step
        if step == self._step:
            return  # a micro-batch within the step
        self._step = step
        self.progress.advance(step)
        if not (self.options.log_due(step) or step >= pl_module.max_steps):
            return
        self.meter.start(None)
        totals, pl_module.totals = pl_module.totals, StepTotals()
        seconds = max(1e-9, time.monotonic() - self._clock - self._paused)
        self.tokens += totals.tokens
        self.flops_done += self.flops.of(
            totals.tokens, totals.supervised, totals.context / max(1.0, totals.tokens)
        )
        if trainer.is_global_zero:
            values = {
                "train/loss": totals.loss / max(1.0, totals.supervised),
                "train/grad_norm": totals.grad_norm,
                "train/lr": totals.lr,
                "train/tokens": self.tokens,
                "train/flops": self.flops_done,
                "perf/tokens_per_second": totals.tokens / seconds,
                **self.meter.read(),
            }
            self.log_metrics(step, values)
            self.progress.step(step, values)
        self._clock, self._paused = time.monotonic(), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation, with what hangs on it, does not count as training time."""
        self._pause_began = time.monotonic()

    def _validated(self, trainer: Trainer, values: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        values = {**values, **{k: v for k, v in self.meter.read().items() if k.startswith("memory/")}}
        step = 0 if trainer.sanity_checking else trainer.global_step
        self.log_metrics(step, values)
        self.progress.validated(step, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, or it would swallow the error line."""
        self.progress.stop()


class SampleGrid(Callback):
    """Fixed prompts x samplers, with fixed seeds, at step 0, at validations or every n steps, and at the end.

    Texts come from generators of their own, so training goes on exactly as if nothing had been sampled.

    Args:
        generator: continues prompts with the model in training.
        prompts: ``(shown, full)``: what a person reads and what the model is given.
        grid: sampler name -> sampler.
        log: ``(step, samples)``, on rank 0 only.
        earlier: ``(prompt_id, shown prompt, sampler name) -> text`` of the step before, for a run that goes on.
    """

    def __init__(
        self,
        generator: TextGenerator,
        *,
        prompts: Sequence[tuple[str, str]],
        grid: Mapping[str, SamplerConfig],
        seed: int,
        every_n_steps: int | None,
        max_steps: int,
        log: LogSamples,
        meter: MemoryMeter,
        pause: Callable[[], AbstractContextManager[None]],
        earlier: Mapping[tuple[int, str, str], str] | None = None,
    ) -> None:
        self._earlier = dict(earlier or {})
        self.generator, self.prompts, self.grid, self.seed = generator, prompts, grid, seed
        self.every, self.max_steps, self.log_samples, self.meter = every_n_steps, max_steps, log, meter
        self._sampled, self._pause = -1, pause

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a resumed run begins at was sampled before it was saved."""
        if trainer.global_step:
            self._sampled = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At step 0, at the end, and between them if no rhythm of their own is set."""
        step = 0 if trainer.sanity_checking else trainer.global_step
        if step == 0 or step >= self.max_steps or trainer.should_stop or self.every is None:
            self._sample(trainer, pl_module, step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """In the rhythm of ``samples.every_n_steps``."""
        step = trainer.global_step
        if self.every is not None and step % self.every == 0:
            self._sample(trainer, pl_module, step)

    def _sample(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """On the first rank; of a sharded model on all of them, as each has a part of the weights only."""
        assert isinstance(pl_module, CausalLMModule)
        mine = trainer.is_global_zero or is_sharded(pl_module.model)
        if step == self._sampled or not mine or not self.prompts:
            return
        self._sampled = step
        samples: list[Sample] = []
        with self._pause(), self.meter.phase("generate"):
            for name, sampler in self.grid.items():
                seeds = [self.seed + index for index in range(len(self.prompts))]
                prompts = [full for _, full in self.prompts]
                texts = self.generator(prompts, sampler=sampler, seeds=seeds, entropy=True)
                for index, text in enumerate(texts):
                    samples.append(self._sample_of(step, index, name, seeds[index], text))
        if trainer.is_global_zero:
            self.log_samples(step, samples)

    def _sample_of(self, step: int, index: int, sampler: str, seed: int, text: GeneratedText) -> Sample:
        """A text with its figures, which becomes the earlier one of the next step."""
        shown = self.prompts[index][0]
        earlier = self._earlier.get((index, shown, sampler))
        self._earlier[index, shown, sampler] = text.text
        figures = text_figures(text.text, earlier=earlier, mean_entropy=text.mean_entropy)
        return Sample(
            step, index, shown, sampler, seed, text.text, text.new_tokens, text.stop_reason, extra=figures
        )


REPEATED_SECONDS = 1.0
"""Within this a signal is the same one again: SLURM tells every process of a job, and the launcher passes it on as well."""


class GracefulStop(Callback):
    """SIGTERM, Ctrl-C or SLURM's SIGUSR1 end the run after the current optimizer step, on all ranks together; a second one at once.

    Attributes:
        signal: the one that stopped the run, on every rank, else None.
    """

    def __init__(self, *, save: Callable[[Trainer], None], say: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._say = say
        self._save, self._step, self._caught_at = save, -1, 0.0
        self._old: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the handlers over from Lightning, whose own would end with exit code 0 and save nothing."""

        assert isinstance(pl_module, CausalLMModule)

        def handle(number: int, frame: Any) -> None:
            now = time.monotonic()
            if not pl_module.caught_signal:
                pl_module.caught_signal, self._caught_at = number, now
            elif now - self._caught_at > REPEATED_SECONDS:
                if number == signal.SIGINT and trainer.world_size == 1:
                    raise KeyboardInterrupt  # the run's end, and not that of a process which may be a notebook's
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        for number in STOP_SIGNALS:
            self._old[number] = signal.signal(number, handle)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After an optimizer step, stop if the ranks have agreed to: the step's own all-reduce has asked them."""
        assert isinstance(pl_module, CausalLMModule)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if trainer.world_size == 1:
            pl_module.agreed_signal = pl_module.caught_signal  # also what came since the step's end
        if pl_module.agreed_signal:
            self.signal = pl_module.agreed_signal
            self._say(
                f"{signal.Signals(self.signal).name}: stopping after step {self._step}, saving a checkpoint"
            )
            trainer.limit_val_batches = 0  # stopping must be quick: no validation on the way out
            trainer.should_stop = True
            self._save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the handlers back."""
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}


class StopAtLastStep(Callback):
    """Ask for the stop one step early enough that Lightning still validates: its loop then does so on its own."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """See the class."""
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True
