"""What would fit where a run does not: after an out-of-memory error, smaller configs that learn the same or nearly so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmlab.config.schema import RunConfig, broken_rules
from lmlab.planning import plan_of_config
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.models.memory import MemoryMeter


def alternatives(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """(what to type, the config it gives): smaller in memory, the same in what is learned or near it, and allowed."""
    trainer, found = config.trainer, list[tuple[str, RunConfig]]()

    def changed(words: str, **updates: Any) -> None:
        smaller = config.model_copy(update=updates)
        if not any(broken_rules(smaller)):  # as fsdp over 4 bits would be
            found.append((words, smaller))

    checkpointed = config.model.model_copy(update={"gradient_checkpointing": True})
    size, accumulate = trainer.batch_size, trainer.accumulate_grad_batches
    while size % 2 == 0:
        size, accumulate = size // 2, accumulate * 2
        halved = trainer.model_copy(update={"batch_size": size, "accumulate_grad_batches": accumulate})
        words = f"trainer.batch_size={size} trainer.accumulate_grad_batches={accumulate}"
        changed(words, trainer=halved)
    if not config.model.gradient_checkpointing:
        changed("model.gradient_checkpointing=true", model=checkpointed)
    if config.adapter.kind == "lora" and config.quant.kind not in ("nf4", "fp4"):
        from lmlab.models.quantize import FourBit

        nf4 = FourBit(kind="nf4", double_quant=True)
        changed("quant=nf4", quant=nf4)
        changed("quant=nf4 model.gradient_checkpointing=true", quant=nf4, model=checkpointed)
    return found


def what_fits(
    config: RunConfig, replan: Callable[[RunConfig], float], limit_gb: float
) -> Sequence[tuple[str, float]]:
    """(what to type, planned GB) of the alternatives whose plan is below ``limit_gb``; at most two of them."""
    fitting: list[tuple[str, float]] = []
    for words, changed in alternatives(config):
        planned = replan(changed)
        if planned <= limit_gb:
            fitting.append((words, planned))
            if len(fitting) == 2:
                break
    return fitting


def out_of_memory(config: RunConfig, meter: MemoryMeter | None) -> str:
    """What happened and what would fit, in one line; never raises."""
    try:
        return _out_of_memory(config, meter)
    except Exception as error:  # this is the line about another failure
        advice = "lower trainer.batch_size or data.max_length, or use adapter=qlora"
        return f"{advice} (what would fit could not be planned: {type(error).__name__})"


def _out_of_memory(config: RunConfig, meter: MemoryMeter | None) -> str:
    known = plan_of_config(config)
    base = 0.0 if meter is None else meter.base_gb

    def replan(changed: RunConfig) -> float:
        return base + max(replace(known, config=changed).made().growth_gb().values())

    planned = replan(config)
    where = "" if meter is None or meter.current is None else f" in {meter.current}"
    limit = known.capacity_gb
    if limit is None:
        raise UserError("no such device here")
    told = f"up to {planned:.2f} GB planned{where}, {limit:.2f} GB there"
    fitting = what_fits(config, replan, 0.95 * limit)
    if not fitting:
        return f"{told}: nothing smaller was found to fit, try a smaller model or data.max_length"
    return f"{told}: " + " or ".join(f"{words} ({gigabytes:.2f} GB)" for words, gigabytes in fitting)
