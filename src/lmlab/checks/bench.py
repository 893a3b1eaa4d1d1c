"""What checks share: the user's config on the bench, its model built once by training's own path, its data, its runs.

Everything is made when first asked for. The model of the checks in this process has no dropout (each of their
comparisons would draw other numbers), and an adapter whose update is still zero is moved off it once that was looked
at: a wrong product with zero is a right one.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.checks.compare import run_worker
from lmlab.config.compose import to_run_config
from lmlab.config.schema import RunConfig, mixed_precision_instead
from lmlab.data.prepared import PreparedData
from lmlab.journal import RunDir
from lmlab.records import Example, RunFailedError

if TYPE_CHECKING:
    import torch

    from lmlab.assemble import BuiltModel
    from lmlab.models.hardware import Hardware
    from lmlab.records import PackedBatch

ALONE = {
    "resume": None,
    "overwrite": False,
    "logger.mode": "disabled",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.auto_batch": False,
    "trainer.memory_plan": False,
    "hparams_search": {"kind": "none"},
}
"""Of every config on the bench: one process that leaves no trace elsewhere, and nothing that is no number."""
ROUNDING = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Relative, by the type that products are made in: what the same sums in another order may be apart.

A sum of n products of unit roundoff u is off by some sqrt(n) u, and a network adds up some tens of those: with u = 6e-8
(fp32), 4e-3 (bf16), 5e-4 (fp16). In fp32 right ones are measured at a thousandth to a hundredth of it, wrong ones above ten
times; for 16 bits the bounds are reasoned, not measured.
"""
DOCUMENTS, TOKENS = 6, 256
"""How many documents the checks of a forward pass take, and of how many tokens at most."""
LOOKED_AT = 16
"""Positions of a document whose logits are compared: a large vocabulary has half a megabyte of them at each."""
STIRRED = 0.02
"""Standard deviation of what an update of zeros is moved to: that of the usual weights."""


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """``config`` with other values at dotted keys, validated as if they had been typed.

    Raises:
        UserError: it cannot be so.
    """
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place[part]
        place[last] = value
    return to_run_config(values)


@dataclass(frozen=True)
class AtStart:
    """Logits of the bench's documents (`Bench.own_logits`) as the model was built.

    Attributes:
        base: before the adapter was put on.
        adapted: with the adapter, before any step.
    """

    base: list[torch.Tensor]
    adapted: list[torch.Tensor]


class Bench:
    """A config and what the checks make of it.

    Args:
        config: as the user gives it; it is never changed.
        folder: an empty one, for runs and saved weights.
        steps, at: of the runs that are trained: optimizer steps, and the one after which the resumed one begins.
        say: told what takes time.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        steps: int = 4,
        at: int = 2,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.given, self.folder, self.steps, self.at, self.say = config, folder, steps, at, say
        self.config = changed(config, {**ALONE, "output_root": str(folder), "trainer.compile": False})
        self._built: BuiltModel | None = None
        self._at_start: AtStart | None = None
        self._standard = ""
        self._runs: dict[str, RunDir] = {}

    # --- the model in this process --------------------------------------------------------------------------------

    @cached_property
    def run(self) -> RunDir:
        """A run's directory, as train.py makes it; the preflight is its own.

        Raises:
            UserError: what a start with that config would say.
        """
        return self._made("bench", self.config)

    @cached_property
    def prepared(self) -> PreparedData:
        """The config's data."""
        from lmlab.journal import read_json

        return PreparedData.load(Path(read_json(self.run.info)["prepared"]))

    @cached_property
    def hardware(self) -> Hardware:
        """As a run of the config chooses it."""
        from lmlab.models.build import hidden_size
        from lmlab.models.hardware import choose_hardware

        config = self.config
        return choose_hardware(
            config.trainer.accelerator,
            mixed_precision_instead(config) or config.trainer.precision,
            frozen_storage=config.quant.kind if config.adapter.freezes_base else None,
            hidden_size=lambda: hidden_size(config.model.hf_config(None)),
        )

    @property
    def rounding(self) -> float:
        """What sums in another order may be apart here; see `ROUNDING`."""
        return ROUNDING[self.hardware.precision]

    @property
    def built(self) -> BuiltModel:
        """The model, by training's own path, without dropout."""
        if self._built is None:
            self._build()
        assert self._built is not None
        return self._built

    @property
    def at_start(self) -> AtStart:
        """The logits before anything was moved."""
        assert self.built
        assert self._at_start is not None
        return self._at_start

    @property
    def standard(self) -> str:
        """The attention the model came with, which keeps no documents apart in a row."""
        assert self.built
        return self._standard

    def _build(self) -> None:
        from lmlab.assemble import build_for_training
        from lmlab.checks.callbacks import without_dropout
        from lmlab.models.memory import MemoryMeter

        began, before = time.monotonic(), list[Any]()

        def look(base: Any) -> None:
            self._standard = str(base.config._attn_implementation)
            before.extend(self.own_logits(base, document) for document in self.documents)

        config = self.config.model_copy(update={"adapter": _Watched(self.config.adapter, look)})
        self._built = build_for_training(
            self.run,
            config,
            self.hardware,
            wants_flat=self.prepared.wants_flat,
            meter=MemoryMeter(on_cuda=self.hardware.device.type == "cuda"),
            say=lambda text: None,
        )
        model = self._built.model
        without_dropout(model)
        self._at_start = AtStart(before, [self.own_logits(model, document) for document in self.documents])
        _stir(model, seed=self.config.seed)
        self.say(f"the model was built in {time.monotonic() - began:.1f} s")

    def release(self) -> None:
        """Forget the model, to have its memory for runs."""
        self._built = self._at_start = None
        gc.collect()
        if self.hardware.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def own_logits(self, model: Any, document: Example, at: torch.Tensor | None = None) -> torch.Tensor:
        """The model's own fp32 logits ``[n, vocab]`` of one document alone, in the attention it came with, not training.

        Args:
            at: positions; None for the last `LOOKED_AT` that are supervised.
        """
        import dataclasses

        import torch

        from lmlab.data.packing import collate_padded
        from lmlab.models.attention import attention
        from lmlab.models.head import own_logits
        from lmlab.modes import evaluating

        batch = collate_padded([document])
        positions = batch.supervised_index[-LOOKED_AT:] if at is None else at
        batch = dataclasses.replace(batch, supervised_index=positions)
        with torch.no_grad(), evaluating(model), attention(model, self._standard), self.hardware.computing():
            return own_logits(model, batch.to(self.hardware.device)).logits

    def gradient(self, batch: PackedBatch, attn: str, divisor: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss sum of a batch, and the gradient of that sum over ``divisor``, by training's own head and loss.

        Args:
            attn: the attention it runs under.
        """
        from lmlab.models.attention import attention
        from lmlab.models.head import loss_sum

        model = self.built.model
        model.zero_grad(set_to_none=True)
        with attention(model, attn):
            with self.hardware.computing():
                total = loss_sum(model, batch.to(self.hardware.device), self.config.loss)
            (total / divisor).backward()
        return float(total.detach()), self.taken_gradients()

    def taken_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients that lie on the trained parameters, in fp64 on the CPU; none lie there afterwards."""
        found = {}
        for name, parameter in self.built.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                found[name] = parameter.grad.detach().double().cpu()
                parameter.grad = None
        return found

    @cached_property
    def documents(self) -> list[Example]:
        """Documents of the training side, of different lengths, each with something to predict."""
        rows = self.prepared.rows("train")
        found: list[Example] = []
        for index in range(len(rows)):
            row = rows[index]
            parts = zip(row.input_ids.split(row.lengths), row.labels.split(row.lengths), strict=True)
            for ids, labels in parts:
                # Cut at the left: of a record the response stays.
                keep = TOKENS - 31 * len(found)
                ids, labels = ids[-keep:], labels[-keep:]
                if len(ids) > 1 and bool((labels >= 0).any()):
                    found.append(Example(ids, labels, (len(ids),)))
                if len(found) == DOCUMENTS:
                    return found
        while 0 < len(found) < 3:
            found.append(found[0])
        return found

    # --- runs in processes of their own ---------------------------------------------------------------------------

    def trained(self, runs: Mapping[str, RunConfig]) -> list[RunDir]:
        """Train these configs, each once under its name whoever asks, two at a time where no GPU is shared.

        On a CPU all of them have half of its threads: how sums are cut, and so their last bits, depends on their number.

        Raises:
            UserError: what a start would say.
            RunFailedError: one of them failed.
        """
        import torch

        new = {name: self._made(name, config) for name, config in runs.items() if name not in self._runs}
        on_cpu = not torch.cuda.is_available() or self.config.trainer.accelerator == "cpu"
        threads = max(1, (os.cpu_count() or 1) // 2)
        environment = {"OMP_NUM_THREADS": str(threads)} if on_cpu else {}

        def train(name: str) -> None:
            done = run_worker(new[name], quiet=True, environment=environment)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RunFailedError(f"the run '{name}' ended with {done.returncode}: {last}")

        with ThreadPoolExecutor(2 if on_cpu else 1) as pool:
            list(pool.map(train, new))
        self._runs.update(new)
        return [self._runs[name] for name in runs]

    def _made(self, name: str, config: RunConfig) -> RunDir:
        from lmlab.start import create_run, plan_run

        plan = plan_run(config.model_copy(update={"run_name": name}), [], folder=self.folder / name)
        create_run(plan, [])
        plan.run.release()
        return plan.run


class _Watched:
    """An adapter's config, and a look at the base just before the adapter is put on."""

    def __init__(self, inner: Any, look: Callable[[Any], None]) -> None:
        self._inner, self._look = inner, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def apply(self, model: Any, **told: Any) -> Any:
        self._look(model)
        return self._inner.apply(model, **told)


def _stir(model: Any, *, seed: int) -> None:
    """Move every trained parameter that is all zeros, as LoRA's B at the start."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator) * STIRRED
                parameter.copy_(noise.to(parameter))
