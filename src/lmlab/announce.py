"""What a run prints: a table and notes at its start, its last samples and what to type next at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmlab.config.schema import RunConfig, world_size
from lmlab.data.prepared import PreparedData
from lmlab.journal import RunDir
from lmlab.records import Sample
from lmlab.tracking.terminal import print_data


def start(
    console: Console,
    run: RunDir,
    config: RunConfig,
    prepared: PreparedData,
    built: Any,
    max_steps: int,
    figures: Mapping[str, Any],
) -> None:
    """One table of what is about to be trained, what is probably not meant, and a look at the data.

    Args:
        built: an `assemble.BuiltModel`.
        figures: its parameters and stored bits.
    """
    report = prepared.meta["report"]
    trained = figures["model/params_trainable"] / figures["model/params_total"]
    rows = [
        ("task", f"{config.task}, seed {config.seed}"),
        (
            "model",
            f"{config.model.label}: {figures['model/params_total']:,} parameters, {figures['model/params_trainable']:,} trained ({trained:.2%})",
        ),
        (
            "adapter",
            f"{config.adapter.kind} over {config.quant.kind} ({figures['model/base_bits_per_param']:.2f} bits per parameter)",
        ),
        (
            "data",
            f"{config.data.kind} as {prepared.meta['format']}: {report['train']['records']:,} + {report['val']['records']:,} validation records, "
            f"{report['tokens']:,} tokens, {report['supervised_tokens'] / max(1, report['tokens']):.0%} trained",
        ),
        (
            "steps",
            f"{max_steps} of {config.trainer.rows_per_step} {'windows' if prepared.meta['stream'] else 'packed rows' if prepared.packed else 'examples'}"
            + (
                f" ({world_size(config)} ranks, {'fsdp' if config.trainer.strategy == 'fsdp' else 'ddp'})"
                if world_size(config) > 1
                else ""
            ),
        ),
        ("optimizer", f"{built.optim.name}, lr {built.optim.lr:g}, {built.optim.schedule}"),
        *built.policy,
        ("output", os.path.relpath(run.path)),
    ]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", min_width=8)  # as wide as that of the data block below it
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False)
    for note in notes(config, prepared, max_steps):
        _say(console, f"note: {note}")
    preview = os.path.relpath(run.mask_preview)
    print_data(console, report, prepared.examples, masked=config.task == "sft", preview=preview)


def notes(config: RunConfig, prepared: PreparedData, max_steps: int) -> list[str]:
    """Settings that are allowed and probably not meant."""
    trainer, warmup, found = config.trainer, config.optim.warmup_steps, list[str]()
    rows = prepared.meta["report"]["rows"]["train"]
    if trainer.rows_per_step > rows:
        found.append(f"a step of {trainer.rows_per_step} rows sees the {rows} training rows more than once")
    if config.data.packing and prepared.meta["stream"]:
        found.append("data.packing=true changes nothing here: windows of a text stream are always full")
    if config.data.kind == "shards":
        found.append(
            "data.val_fraction is that of the shards: their validation side was drawn when they were made"
        )
    if warmup >= max_steps:
        found.append(
            f"optim.warmup_steps={warmup} is not over in {max_steps} steps: the peak learning rate is never reached"
        )
    return found


def samples(console: Console, drawn: Sequence[Sample]) -> None:
    """The newest samples as a table; nothing where there are none."""
    if not drawn:
        return
    table = Table(title=f"samples at step {drawn[0].step}", show_lines=True)
    for column in ("prompt", "sampler", "text"):
        table.add_column(column, overflow="fold")
    for sample in drawn:
        table.add_row(*(Text(_clip(t)) for t in (sample.prompt, sample.sampler, sample.text)))
    console.print(table, highlight=False)


def end(console: Console, run: RunDir, status: str, summary: Mapping[str, Any]) -> None:
    """How it ended, what was made, and what to type next."""
    best, step = summary.get("best/val_loss"), summary.get("best/step")
    if best is not None:
        peak = summary["memory/peak_gb"]
        _say(console, f"{status}: best val/loss {best:.4f} at step {step}, peak memory {peak:.2f} GB")
    where = os.path.relpath(run.path)
    made = next((name for name in ("adapter", "model") if (run.path / name).exists()), None)
    if made is not None:
        best_too = f" (best: {where}/best/{made})" if (run.best / made).exists() else ""
        _say(console, f"weights: {where}/{made}{best_too}")
        _say(console, f"try it: python scripts/generate.py {where} --prompt '...'")
    if run.report.exists():
        _say(console, f"report: {where}/report.html")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clip(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
