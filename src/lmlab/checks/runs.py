"""Invariances of whole runs: trained by `lmlab.worker` in fresh processes, a few steps each, and compared.

Their configs are the user's own with another end and rhythm; what else is changed is said at each check.
"""

from __future__ import annotations

import datetime
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.checks.bench import ALONE, Bench, changed
from lmlab.checks.compare import Difference, differences, metric_agreement
from lmlab.checks.sizes import largest
from lmlab.checks.table import Part, SkippedError, check
from lmlab.config.schema import RunConfig, mixed_precision_instead
from lmlab.journal import RunDir, versions_of, write_json

if TYPE_CHECKING:
    import torch

NEW_TOKENS = 8
"""Of each sample: that text is generated is what matters, not how much of it."""
RELATIVE_WEIGHTS, RELATIVE_METRICS = 1e-5, 1e-4
"""Of two ranks against one process in fp32: sums over the same rows, added up in another order, for a few steps of SGD.

Measured for the tiny model: 1e-7. A norm, the root of a sum of squares that have these differences, gets ten times more.
"""


VAL_BATCHES = 4
"""Of a validation: how many there are is not what is checked, but two ranks should have two each."""


def _rhythm(bench: Bench) -> dict[str, Any]:
    """Few steps, each logged, with a checkpoint in between and short validations."""
    config = bench.given
    return {
        **ALONE,
        "output_root": str(bench.folder),
        "trainer.max_steps": bench.steps,
        "trainer.max_epochs": None,
        "trainer.log_every_n_steps": 1,
        "trainer.val_every_n_steps": min(config.trainer.val_every_n_steps, bench.at),
        "trainer.max_val_rows": min(
            VAL_BATCHES * config.trainer.val_batch_size, config.trainer.max_val_rows or sys.maxsize
        ),
        "checkpoint.every_n_steps": bench.at,
        "checkpoint.keep": bench.steps,
    }


def _whole(bench: Bench) -> RunConfig:
    """The run that others are held against: samples at every step, one sampler that draws among them."""
    config = bench.given
    short = {
        f"samplers.{name}.max_new_tokens": min(NEW_TOKENS, sampler.max_new_tokens)
        for name, sampler in config.samplers.items()
    }
    drawing = [name for name, sampler in config.samplers.items() if sampler.draws]
    grid = list(config.samples.grid)
    if drawing and not set(grid) & set(drawing):
        grid.append(drawing[-1])
    prompts = config.samples.prompts
    return changed(
        config,
        {
            **_rhythm(bench),
            **short,
            "samples.every_n_steps": 1,
            "samples.grid": grid,
            "samples.prompts": min(2, prompts) or 2 if isinstance(prompts, int) else prompts[:2] or 2,
        },
    )


@check("sampling", "sampling on = off", trains=True)
def sampling(bench: Bench) -> Iterator[Part]:
    """A run with samples at every step and one without any: losses, weights and random states bit for bit."""
    quiet = changed(bench.given, {**_rhythm(bench), "samples.prompts": 0})
    on, off = bench.trained({"whole": _whole(bench), "quiet": quiet})
    texts = [run.samples.read_text(encoding="utf-8") if run.samples.exists() else "" for run in (on, off)]
    if not texts[0] or texts[1]:
        yield Part("samples", math.inf, detail="one run should have them and the other not")
    found = list(differences(off, on, both_fresh=True, logs=("metrics", "layers")))
    yield _exact("metrics, weights, optimizer and random states", found)


@check("resume", "resumed = uninterrupted", trains=True)
def resume(bench: Bench) -> Iterator[Part]:
    """A whole run and one that begins at a checkpoint of it, in a process of its own: everything bit for bit."""
    yield _exact(
        f"everything logged after step {bench.at}, weights, optimizer, schedule, random states",
        resume_differences(bench),
    )


def resume_differences(bench: Bench) -> list[Difference]:
    """What differs between an uninterrupted run and one that was resumed; both are trained if they were not yet."""
    config = _whole(bench)
    (whole,) = bench.trained({"whole": config})
    start = whole.checkpoints / f"step-{bench.at:08d}"
    (again,) = bench.trained({"resumed": config.model_copy(update={"resume": str(start)})})
    return list(differences(whole, again, after=bench.at))


@check("ddp", "2 ranks (gloo) = 1 process", trains=True)
def ddp(bench: Bench) -> Iterator[Part]:
    """Two ranks on this machine's CPU against one process with the same rows per step: metrics and weights.

    In fp32, by plain SGD (an adaptive step makes a sign of a gradient's last bits) and without dropout, whose random
    numbers are each rank's own.
    """
    config = bench.given
    if config.trainer.strategy == "fsdp":
        raise SkippedError(
            "trainer.strategy=fsdp cuts the weights; ranks with the whole model are what is checked"
        )
    common = {
        **_rhythm(bench),
        "trainer.accelerator": "cpu",
        "trainer.precision": "fp32",
        "trainer.compile": False,
        "trainer.batch_size": max(1, config.trainer.batch_size // 2),
        "trainer.gradient_clip_val": 1.0,
        "trainer.layer_stats": False,
        "checkpoint.every_n_steps": None,
        "checkpoint.keep": 1,
        "samples.prompts": 0,
        "metrics": {},
        "optim": SGD,
        "plugins": [*config.plugins, "lmlab.checks.callbacks"],
        "callbacks": {"without_dropout": {"kind": "without_dropout"}},
        # Mixed 16-bit training of the base on a GPU is fp32 here.
        **({"quant": {"kind": "none"}} if mixed_precision_instead(config) else {}),
    }
    one = {"trainer.accumulate_grad_batches": 2}
    two = {"trainer.accumulate_grad_batches": 1, "trainer.devices": 2, "trainer.strategy": "ddp"}
    runs = bench.trained(
        {
            "one": changed(config, {**common, **one}),
            "two": changed(config, {**common, **two}),
        }
    )
    rows = [each for each in metric_agreement(*runs, after=-1) if each.name.startswith(("train/", "val/"))]
    worst = max(rows, key=lambda each: (each.missing > 0, each.largest))
    size = math.inf if worst.missing else worst.largest
    at_step = "" if worst.step is None else f", furthest apart at step {worst.step}"
    yield Part("logged losses and gradient norms", size, RELATIVE_METRICS, f"{worst.name}{at_step}")
    yield Part("trained weights", _distance(*(_weights(run) for run in runs)), RELATIVE_WEIGHTS)


SGD = {
    "name": "sgd",
    "lr": 0.5,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "warmup_steps": 0,
    "schedule": "constant",
    "min_lr_ratio": 1.0,
}
"""With clipping at 1 each step moves the weights by half a unit, far more than their rounding."""


def _exact(what: str, found: list[Difference]) -> Part:
    worst = largest(each.size for each in found)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Part(what, worst, detail=f"{found[0].text[:160]}{more}" if found else "")


def _weights(run: RunDir) -> dict[str, torch.Tensor]:
    """The trained weights of a run's last checkpoint."""
    import torch

    newest = max(run.checkpoints.glob("step-*"))
    return torch.load(newest / "state.pt", map_location="cpu", weights_only=True)["state_dict"]


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance over all tensors together."""
    if one.keys() != other.keys():
        return math.inf
    gap = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    size = sum(float(value.double().square().sum()) for value in one.values())
    return math.sqrt(gap / size) if size else math.inf


# --- certificates beside a run --------------------------------------------------------------------------------------


def resume_certificate(bench: Bench) -> dict[str, Any]:
    """What was found by `resume`, as it stands in a run's resume_certificate.json."""
    found = [difference.text for difference in resume_differences(bench)]
    return {
        "certificate": "resumed = uninterrupted",
        "equal": not found,
        "differences": found,
        "steps": bench.steps,
        "at": bench.at,
        **held_for(),
    }


def held_for() -> dict[str, Any]:
    """When and on what it was found."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = versions_of("torch", "transformers", "peft", "lightning")
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": now, "versions": versions, "gpu": gpu, "cpus": os.cpu_count()}


def write_resume_certificate(run: RunDir, bench: Bench) -> Path:
    """Beside the run's other files; the runs it is about must have been trained."""
    write_json(run.resume_certificate, resume_certificate(bench))
    return run.resume_certificate
