"""One rank's training session: everything built from a frozen config, trained, and written down."""

from __future__ import annotations

import os
import random
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmlab import announce
from lmlab.config.schema import RunConfig, mixed_precision_instead, world_size
from lmlab.data.prepared import PreparedData
from lmlab.journal import Journal, RunDir, earlier_texts, read_json, write_json
from lmlab.records import STOPPED_CODES, Sample
from lmlab.tracking.transcript import Transcript


class Session:
    """Builds and runs; `close` is called whatever happened.

    Args:
        run: the run's directory, made by start.py.
        config: its frozen config.
        started: monotonic time of the process's start.
    """

    def __init__(self, run: RunDir, config: RunConfig, *, started: float) -> None:
        self.run, self.config = run, config
        self.rank = int(os.environ.get("RANK", "0"))
        self.started = started
        argv = map(str, read_json(run.info).get("argv", []))
        self.transcript = Transcript(run.path if self.rank == 0 else None, title=shlex.join(argv))
        self._remarks: list[str] | None = []  # what is said before the table, to stand in or under it
        self.tracker: Any = None
        self.meter: Any = None
        self.figures: dict[str, Any] = {}
        self.samples: list[Sample] = []
        self._speeds: list[float] = []
        self._peak_gb = 0.0
        self.journal: Journal | None = None
        if self.rank == 0:
            write_json(run.summary, {"status": "running", "exit_code": None})
            self.journal = Journal(run, start_time=started)

    def say(self, text: str) -> None:
        """A line on the first rank's console."""
        if self.rank != 0:
            return
        if self._remarks is not None:
            self._remarks.append(text)
        else:
            self.transcript.say(text)

    # --- the log ------------------------------------------------------------------------------------------------

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """To the journal first, then to the mirror."""
        if self.journal is None:
            return
        self.journal.log(step, values)
        if self.tracker is not None:
            self.tracker.log(step, values)
        if "perf/tokens_per_second" in values:
            self._speeds.append(values["perf/tokens_per_second"])
        # Measured in a phase: neither what was planned nor, on a GPU, the resident set of the process.
        peaks = [v for k, v in values.items() if k.startswith("memory/") and k.endswith("/peak_gb")]
        self._peak_gb = max([self._peak_gb, *peaks])

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """To samples.jsonl and the mirror's table."""
        self.samples = list(samples)
        if self.journal is None:
            return
        for sample in samples:
            self.journal.sample(sample)
        if self.tracker is not None:
            self.tracker.samples(step, samples)

    def log_layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """To layers.jsonl; the mirror gets a picture of all of them at the end."""
        if self.journal is not None:
            self.journal.layers(step, rows)

    # --- training -----------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Build everything, fit, and return the exit code."""
        from lmlab.planning import plan_beside

        with self.transcript.waiting("building the model"):
            built, prepared, hardware, max_steps = self._build()
            resume_from, step = self._resume_from()
            if self.rank == 0:
                if resume_from is None:
                    self.tracker.data(prepared.meta["report"], prepared.examples)
                self._report()  # the data section, to be looked at while the run goes
                # After what that imports: what is in memory now is not planned but measured.
                plan_beside(self.meter, self.config, prepared, built, hardware, max_steps, self.say)
        self._announce(built, prepared, max_steps)
        if self.rank == 0:
            self.log(step, self.meter.read())
        return self._fit(built, prepared, hardware, self.meter, max_steps, resume_from)

    def _build(self) -> tuple[Any, PreparedData, Any, int]:
        """The model with all that is built for it, its data, the hardware, the last step."""
        import numpy as np
        import torch

        from lmlab.assemble import build_for_training
        from lmlab.models.build import hidden_size
        from lmlab.models.hardware import choose_hardware
        from lmlab.models.memory import MemoryMeter, keep_freed_blocks, return_freed_blocks

        config = self.config
        prepared = PreparedData.load(Path(read_json(self.run.info)["prepared"]))
        precision = mixed_precision_instead(config) or config.trainer.precision
        storage = config.quant.kind if config.adapter.freezes_base else None
        hardware = choose_hardware(
            config.trainer.accelerator,
            precision,
            frozen_storage=storage,
            hidden_size=lambda: hidden_size(config.model.hf_config(None)),
        )
        if hardware.device.type == "cpu":
            (return_freed_blocks if config.model.gradient_checkpointing else keep_freed_blocks)()
        if self.rank == 0:  # sums are cut by them, so the last bits depend on it
            info = read_json(self.run.info)
            hardware_here = {**info.get("hardware", {}), "threads": torch.get_num_threads()}
            write_json(self.run.info, {**info, "hardware": hardware_here})
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # the latter two for plugins
            seed((config.seed + self.rank) % 2**32)
        meter = self.meter = MemoryMeter(on_cuda=hardware.device.type == "cuda")
        built = build_for_training(
            self.run, config, hardware, wants_flat=prepared.wants_flat, meter=meter, say=self.say
        )
        self.figures.update(built.figures)
        self._open_tracker()
        max_steps = config.trainer.steps(prepared.meta["report"]["rows"]["train"])
        return built, prepared, hardware, max_steps

    def _announce(self, built: Any, prepared: PreparedData, max_steps: int) -> None:
        """The table, with what was said before it."""
        if self.rank != 0:
            return
        remarks, self._remarks = self._remarks or [], None
        announce.start(
            self.transcript,
            self.run,
            self.config,
            prepared,
            built,
            max_steps,
            self.figures,
            planned_gb=self.meter.planned_gb,
            mirror=self.tracker.mode,
            remarks=remarks,
        )

    def _fit(
        self,
        built: Any,
        prepared: PreparedData,
        hardware: Any,
        meter: Any,
        max_steps: int,
        resume_from: Path | None,
    ) -> int:
        from lmlab.models.flops import step_flops
        from lmlab.training import fit as fitting
        from lmlab.training.callbacks import GracefulStop, RunLog
        from lmlab.training.checkpoint import Checkpoints
        from lmlab.training.console import Progress
        from lmlab.training.datamodule import LMDataModule
        from lmlab.training.layer_log import LayerLog
        from lmlab.training.options import RunTools

        config = self.config
        branches = resume_from is not None and resume_from.absolute().parent != self.run.checkpoints
        module = self._module(built, prepared, meter, max_steps, branches=branches)
        datamodule = LMDataModule(prepared, config.trainer, seed=config.seed, flat=built.flat)
        progress = Progress(self.transcript, max_steps=max_steps, active=self.rank == 0)
        flops = step_flops(built.model, checkpointing=config.model.gradient_checkpointing)
        log = RunLog(config.trainer, log=self.log, progress=progress, flops=flops, meter=meter)
        checkpoints = Checkpoints(
            self.run,
            config.checkpoint,
            save_weights=built.save_weights,
            max_steps=max_steps,
            val_every_n_steps=config.trainer.val_every_n_steps,
            pause=log.pause,
            branches=branches,
        )
        stop = GracefulStop(save=checkpoints.save, say=self.say)
        samples = self._sample_grid(
            built, prepared, meter, max_steps, pause=log.pause, resume_from=resume_from
        )
        tools = RunTools(built.generator, log=self.log, pause=log.pause, max_steps=max_steps)
        logs = {"log": self.log, "log_layers": self.log_layers, "pause": log.pause}
        layers = LayerLog(config.trainer, max_steps=max_steps, **logs)
        extra = [*(callback.build_in(tools) for callback in config.callbacks.values()), layers]
        callbacks = fitting.loop_callbacks(log, samples, checkpoints, stop, max_steps=max_steps, extra=extra)
        trainer = fitting.build_trainer(
            config.trainer,
            hardware,
            max_steps=max_steps,
            callbacks=callbacks,
            root=self.run.path,
            world_size=world_size(config),
        )
        keep = {"checkpoints": checkpoints, "stop": stop, "resume_from": resume_from}
        result = fitting.fit(trainer, module, datamodule, **keep, test="test" in prepared.meta["report"])
        self.figures.update({"steps": result.steps, **meter.errors(), **meter.base()})
        self.figures.update({"best/val_loss": result.best_loss, "best/step": result.best_step})
        self.figures.update({"skipped_steps": module.skipped_steps} if module.skipped_steps else {})
        return 0 if result.signal is None else 128 + result.signal

    def _sample_grid(
        self,
        built: Any,
        prepared: PreparedData,
        meter: Any,
        max_steps: int,
        *,
        pause: Any,
        resume_from: Path | None,
    ) -> Any:
        from lmlab.assemble import sample_prompts
        from lmlab.training.callbacks import SampleGrid

        config = self.config
        return SampleGrid(
            built.generator,
            prompts=sample_prompts(config, prepared, built),
            grid={name: config.samplers[name] for name in config.samples.grid},
            seed=config.samples.seed,
            every_n_steps=config.samples.every_n_steps,
            max_steps=max_steps,
            log=self.log_samples,
            meter=meter,
            pause=pause,
            earlier=earlier_texts(self.run, begun=resume_from) if resume_from is not None else None,
        )

    def _module(
        self, built: Any, prepared: PreparedData, meter: Any, max_steps: int, *, branches: bool
    ) -> Any:
        from lmlab.training.modules import PretrainModule, SFTModule, Validation

        config, meta = self.config, prepared.meta
        asked, val = meta["val_prompts"] if meta["format"] != "text" else [], meta["report"]["val"]
        validation = Validation(
            supervised_bytes=val["supervised_bytes"],
            supervised_tokens=None if config.trainer.max_val_rows is None else val["supervised_tokens"],
            test_bytes=meta["report"].get("test", {}).get("supervised_bytes", 0),
            prompts=[p["prompt"] for p in asked],
            references=[p["response"] for p in asked],
            metrics=config.metrics,
            generator=built.generator,
            sampler=config.sampler,
        )
        kind = PretrainModule if config.task == "pretrain" else SFTModule
        return kind(
            built.model,
            loss=config.loss,
            optim=built.optim,
            max_steps=max_steps,
            validation=validation,
            meter=meter,
            on_nonfinite=config.trainer.on_nonfinite,
            max_nonfinite_steps=config.trainer.max_nonfinite_steps,
            branches=branches,
        )

    def _resume_from(self) -> tuple[Path | None, int]:
        """(the checkpoint to go on from, its step); what was logged after it is forgotten, as it will come again."""
        from lmlab.training.checkpoint import newest_checkpoint, verify_checkpoint

        if self.config.resume is None:
            return None, 0
        if self.config.resume == "auto":
            found = newest_checkpoint(self.run.checkpoints)
            begun = read_json(self.run.info).get("branched_from")
            if found is None and begun:
                found = Path(begun)
            for damaged in sorted(self.run.checkpoints.glob("step-*")):
                if found is None or damaged > found:
                    self.say(f"passed over a damaged checkpoint: {os.path.relpath(damaged)}")
            self.say(
                f"resuming from {os.path.relpath(found)}"
                if found
                else "nothing to resume from: starting at step 0"
            )
        else:
            found = Path(self.config.resume)
            verify_checkpoint(found)
        step = int(read_json(found / "manifest.json")["step"]) if found else 0
        if self.journal is not None:
            self.journal.forget_after(step if found else -1)
        return found, step

    def _open_tracker(self) -> None:
        if self.rank != 0:
            return
        from lmlab.tracking.wandb import WandbTracker

        config, info = self.config, read_json(self.run.info)
        self.tracker = WandbTracker(
            config.logger,
            run_dir=self.run.path,
            run_id=info["wandb_id"],
            settings=config.model_dump(mode="json"),
            tags=[
                f"adapter:{config.adapter.kind}",
                f"quant:{config.quant.kind}",
                f"model:{config.model.label}",
            ],
            job_type=config.task,
            say=self.say,
        )
        if self.tracker.run_id != info["wandb_id"]:  # the one a sweep's agent has drawn
            write_json(self.run.info, {**info, "wandb_id": self.tracker.run_id})

    # --- the end ------------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """summary.json, the mirror's end, report.html, and what to type next; never raises."""
        if self.rank != 0:
            return
        status = "finished" if code == 0 else "interrupted" if code in STOPPED_CODES else "failed"
        latest = dict(self.journal.latest) if self.journal is not None else {}
        summary: dict[str, Any] = {
            "status": status,
            "exit_code": code,
            **({"error": reason} if reason else {}),
            **self.figures,
        }
        summary.update({f"final/{name}": value for name, value in latest.items()})
        if self._speeds:
            summary["perf/tokens_per_second_median"] = statistics.median(self._speeds)
        summary["memory/peak_gb"] = self._peak_gb
        try:
            write_json(self.run.summary, summary)
        except OSError as error:  # a full disk: what was logged and saved before is there
            self.say(f"warning: summary.json cannot be written ({error.strerror})")
        if self.journal is not None:
            self.journal.close()
        remarks, self._remarks = self._remarks or [], None
        for remark in remarks:  # it ended before its table
            self.say(remark)
        announce.samples(self.transcript, self.samples)
        if self.tracker is not None:
            self.tracker.layers()
            self.tracker.summary({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            self.tracker.finish(code)
        self._report()
        announce.end(self.transcript, self.run, status, summary, seconds=time.monotonic() - self.started)
        self.transcript.close()

    def _report(self) -> None:
        try:
            from lmlab.tracking.report import write_report

            write_report(self.run.path)
        except (
            Exception
        ) as error:  # a page that cannot be drawn must not turn a finished run into a failed one
            self.say(f"warning: report.html was not written: {type(error).__name__}: {error}")
