"""Whether a point can be trained at all, as far as the memory plan says, before anything of it starts."""

from __future__ import annotations

import sys

from lmlab.config.schema import RunConfig
from lmlab.data.prepare import prepare
from lmlab.planning import STEPS_LOOKED_AT, plan_of_config, workload_of_data
from lmlab.records import RefusedError
from lmlab.start import prepare_tokenizer


def refuse_too_large(config: RunConfig, limit_gb: float | None) -> None:
    """Refuse what is planned to need more memory than there is; what cannot be planned passes.

    A plan of full rows (data.max_length) is above what most data need. So only where that one does not fit are the data
    prepared, as the run itself would do next, and their largest micro-batch planned.

    Args:
        limit_gb: null for what the device has; without it ``trainer.memory_plan=false`` skips the plan.

    Raises:
        RefusedError: with what is planned and what is there.
    """
    if limit_gb is None and not config.trainer.memory_plan:
        return
    try:
        too_large = _too_large(config, limit_gb)
    except (
        Exception
    ) as error:  # a plan is no reason not to train; what is wrong with the config the job itself says
        print(f"warning: no memory plan of this point: {type(error).__name__}: {error}", file=sys.stderr)
        return
    if too_large is not None:
        raise RefusedError(too_large, where="memory plan")


def _too_large(config: RunConfig, limit_gb: float | None) -> str | None:
    planned = plan_of_config(config)
    there = planned.capacity_gb if limit_gb is None else limit_gb
    if there is None or planned.made().total_gb <= there:
        return None
    _, encoder, _ = prepare_tokenizer(config)
    data = prepare(config.data, encoder, task=config.task)
    steps = config.trainer.max_steps or STEPS_LOOKED_AT
    made = planned.made(workload_of_data(config, data, flat=planned.workload.flat, max_steps=steps))
    if made.total_gb <= there:
        return None
    return f"{made.total_gb:.2f} GB planned in {made.worst}, {there:.2f} GB there"
