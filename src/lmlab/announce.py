"""What a run prints: a table, notes and the data at its start, its last samples and what to type next at its end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmlab.config.schema import RunConfig, world_size
from lmlab.data.prepared import PreparedData
from lmlab.journal import RunDir, read_json
from lmlab.records import OF_A_MULTIRUN, STOPPED_CODES, Sample
from lmlab.tracking.terminal import print_data
from lmlab.tracking.transcript import Transcript, print_words
from lmlab.tracking.values import duration, writable

NARROW = 60
"""Columns below which samples are a list, as a table of three columns would break every word."""
COMMAND = 70
"""Characters of a command up to which what it is for stands in a column."""
MIRROR = "W&B: "
"""How lines about the mirror begin; those of the start become a row of the table."""


def start(
    transcript: Transcript,
    run: RunDir,
    config: RunConfig,
    prepared: PreparedData,
    built: Any,
    max_steps: int,
    figures: Mapping[str, Any],
    *,
    planned_gb: Mapping[str, float],
    mirror: str,
    remarks: Sequence[str] = (),
) -> None:
    """One table of what is about to be trained, what is probably not meant, and a look at the data.

    Args:
        built: an `assemble.BuiltModel`.
        figures: its parameters and stored bits.
        planned_gb: planned peak of each phase, in GB; none where there is no plan.
        mirror: the mode of the W&B run.
        remarks: what was said while the run was built.
    """
    said = [remark.removeprefix(MIRROR) for remark in remarks if remark.startswith(MIRROR)]
    rows = [
        *_what(config, prepared, figures),
        ("steps", _steps(config, prepared, max_steps)),
        ("optimizer", f"{built.optim.name}, lr {built.optim.lr:g}, {built.optim.schedule}"),
        *built.policy,
    ]
    if planned_gb:
        worst = max(planned_gb, key=lambda phase: planned_gb[phase])
        rows.append(("plan", f"a peak of {planned_gb[worst]:.2f} GB, in {worst} (trainer.memory_plan)"))
    rows += [("logger", _mirror(mirror, config, said)), ("output", os.path.relpath(run.path))]
    transcript.rows(rows)
    others = [remark for remark in remarks if not remark.startswith(MIRROR)]
    for note in (*others, *(f"note: {note}" for note in notes(config, prepared, max_steps))):
        transcript.say(note, style="yellow" if note.startswith("note: ") else "")
    transcript.say("")
    report, preview = prepared.meta["report"], os.path.relpath(run.mask_preview)
    masked = config.task == "sft"
    transcript.each(lambda each: print_data(each, report, prepared.examples, masked=masked, preview=preview))
    transcript.say("")


def _what(config: RunConfig, prepared: PreparedData, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Task, model, adapter and data, a row each."""
    report = prepared.meta["report"]
    total, trained = figures["model/params_total"], figures["model/params_trainable"]
    return [
        ("task", f"{config.task}, seed {config.seed}"),
        ("model", f"{config.model.label}: {total:,} parameters, {trained:,} trained ({trained / total:.2%})"),
        ("adapter", f"{_adapter(config)} ({figures['model/base_bits_per_param']:.2f} bits per parameter)"),
        (
            "data",
            f"{config.data.kind} as {prepared.meta['format']}: {report['train']['records']:,} + {report['val']['records']:,} validation records, "
            f"{report['tokens']:,} tokens, {report['supervised_tokens'] / max(1, report['tokens']):.0%} trained",
        ),
    ]


def _adapter(config: RunConfig) -> str:
    """What is trained over what."""
    if not config.adapter.freezes_base:
        return f"{config.adapter.kind}: every weight is trained"
    rank = getattr(config.adapter, "rank", None)  # of LoRA; a plugin's adapter need not have one
    over = "the base as it is" if config.quant.kind == "none" else config.quant.kind
    return f"{config.adapter.kind}{f', rank {rank},' if rank else ''} over {over}"


def _steps(config: RunConfig, prepared: PreparedData, max_steps: int) -> str:
    """Steps, and what one of them is made of."""
    trainer, ranks = config.trainer, world_size(config)
    rows = "windows" if prepared.meta["stream"] else "packed rows" if prepared.packed else "examples"
    parts = [f"{trainer.batch_size} at once"]
    if trainer.accumulate_grad_batches > 1:
        parts.append(f"{trainer.accumulate_grad_batches} times")
    if ranks > 1:
        parts.append(f"{ranks} ranks, {'fsdp' if trainer.strategy == 'fsdp' else 'ddp'}")
    made = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    measured, limit = "", trainer.max_val_rows
    if limit is not None and limit < (kept := len(prepared.rows("val"))):
        measured = f" on {limit:,} of {kept:,} rows"
    return f"{max_steps:,} of {trainer.rows_per_step} {rows}{made}, validation every {trainer.val_every_n_steps}{measured}"


def _mirror(mode: str, config: RunConfig, said: Sequence[str]) -> str:
    """Where the run is mirrored; with the reason where that is not what was asked."""
    if said:
        return f"{MIRROR}{'; '.join(said)}"
    return "none" if mode == "disabled" else f"wandb, {mode}, project {config.logger.project}"


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
    if trainer.max_val_rows is None:
        found += _long_validation(config, prepared, max_steps)
    if warmup >= max_steps:
        found.append(
            f"optim.warmup_steps={warmup} is not over in {max_steps} steps: the peak learning rate is never reached"
        )
    return found


LONG_VALIDATION = 1_000_000
"""Tokens under which a validation is no matter of time on any machine."""


def _long_validation(config: RunConfig, prepared: PreparedData, max_steps: int) -> list[str]:
    """That a validation takes longer than the training between two, which a large corpus makes of a usual share."""
    trainer, report = config.trainer, prepared.meta["report"]
    steps, read = min(trainer.val_every_n_steps, max_steps), report["val"]["tokens"]
    trained = steps * trainer.rows_per_step * report["train"]["tokens"] / report["rows"]["train"]
    if read < LONG_VALIDATION or read < 4 * trained:
        return []
    # As long as the training between two, to one digit; not so few that the figure says nothing.
    kept = len(prepared.rows("val"))
    rows = max(64, int(float(f"{kept * trained / read:.0e}")))
    if rows >= kept:
        return []
    return [
        f"each validation reads {read:,} tokens, {read / trained:,.0f} times what the {steps:,} steps between two train on: "
        f"trainer.max_val_rows={rows} would measure {rows:,} rows spread over them"
    ]


def samples(transcript: Transcript, drawn: Sequence[Sample]) -> None:
    """The newest samples as a table, in a narrow terminal as a list; nothing where there are none."""
    if drawn:
        transcript.say("")
        transcript.each(lambda console: _samples(console, drawn))


def _samples(console: Console, drawn: Sequence[Sample]) -> None:
    title = f"samples at step {drawn[0].step}"

    def shown(text: str) -> str:
        return writable(_clip(text), console.encoding)

    if console.width < NARROW:
        console.print(Text(title, "italic"), highlight=False)
        for sample in drawn:
            print_words(console, shown(sample.prompt), style="bold", indent=2)
            print_words(console, f"{sample.sampler}: {shown(sample.text)}", indent=2)
        return
    table = Table(title=title, show_lines=True)
    for column in ("prompt", "sampler", "text"):
        table.add_column(column, overflow="fold")
    for sample in drawn:
        table.add_row(*(Text(shown(text)) for text in (sample.prompt, sample.sampler, sample.text)))
    console.print(table, highlight=False)


def end(
    transcript: Transcript, run: RunDir, status: str, summary: Mapping[str, Any], *, seconds: float
) -> None:
    """How it ended, what was made, and what to type next."""
    best, step = summary.get("best/val_loss"), summary.get("best/step")
    said = [] if best is None else [f"best val/loss {best:.4f} at step {step}"]
    peak = summary.get("memory/peak_gb") or 0.0
    said += [*([f"peak memory {peak:.2f} GB"] if peak else []), duration(seconds)]
    transcript.say("")
    transcript.say(f"{status}: {', '.join(said)}", style="bold green" if status == "finished" else "bold red")
    where = shlex.quote(os.path.relpath(run.path))
    made = next((name for name in ("adapter", "model") if (run.path / name).exists()), None)
    if made is not None:
        best_too = f" (best: {where}/best/{made})" if (run.best / made).exists() else ""
        transcript.verbatim(f"weights: {where}/{made}{best_too}")
    if run.report.exists():
        transcript.verbatim(f"report: {where}/report.html")
    commands = next_commands(run, where, is_made=made is not None, code=summary.get("exit_code"))
    if commands:
        transcript.say("")
        transcript.say("what to type next:", style="bold")
    column = max([len(command) for _, command in commands if len(command) <= COMMAND], default=0)
    for what, command in commands:
        transcript.verbatim(f"  {command.ljust(column)}  # {what}")


def next_commands(run: RunDir, where: str, *, is_made: bool, code: Any) -> list[tuple[str, str]]:
    """(what for, command) for this very run; one that was stopped, or failed with a checkpoint, is gone on with.

    Args:
        where: the run's directory, quoted for a shell.
        is_made: whether there are weights to use.
    """
    commands = []
    saved = code in STOPPED_CODES or (code not in (0, 2) and any(run.checkpoints.glob("step-*")))
    if saved and OF_A_MULTIRUN not in os.environ:  # there the sweep's own command goes on with its jobs
        commands.append(("go on from the last checkpoint", _resume_command(run)))
    if is_made and (run.path / "model").exists():
        tune = f"python train.py model=pretrained model.name_or_path={where}"
        commands.append(("fine-tune it", f"{tune} data=jsonl data.path=FILE"))
    if is_made:
        commands += [
            ("write a text", f"python scripts/generate.py {where} --prompt '...'"),
            ("talk to it", f"python scripts/chat.py {where}"),
            ("measure it", f"python scripts/evaluate.py {where} --data val"),
            (
                "take it elsewhere",
                f"python scripts/export.py {where} --to {shlex.quote(f'exports/{run.path.name}')}",
            ),
            ("compare it with other runs", f"python scripts/report.py {where} RUN..."),
        ]
    return commands


def _resume_command(run: RunDir) -> str:
    """The command line that began the run, with ``resume=auto``; its name is said, as a drawn one would be another."""
    info = read_json(run.info)
    flags, told = ([str(word) for word in info.get(key, [])] for key in ("flags", "argv"))
    named = ("run_name=", "resume=", "overwrite=")
    kept = [word for word in told[1:] if not word.lstrip("+").startswith(named)]
    return shlex.join(["python", "train.py", *flags, *kept, f"run_name={run.path.name}", "resume=auto"])


def _clip(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
