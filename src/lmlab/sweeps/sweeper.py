"""Hydra's ``-m`` without Hydra's launcher: the sweep is expanded here and every job runs in processes of its own.

Hydra's basic sweeper runs jobs in one process (CUDA memory, environment and W&B runs leak from job to job) and, with a
DDP launcher inside, each rank starts the whole sweep again (Lightning issue 11300). Here a job is composed, checked
and frozen, and then is nothing but a run directory for `lmlab.worker`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from lmlab.records import UserError
from lmlab.sweeps.jobs import GridPoints, key_of


def expand(arguments: Sequence[str], config_loader: Any) -> list[list[str]]:
    """Every combination of the swept overrides (Hydra's grammar: lists, choice(), range(), glob()), in order.

    Raises:
        UserError: an ``interval()``, which has no finite set of values.
    """
    from hydra.core.override_parser.types import Transformer

    parser = OverridesParser.create(config_loader=config_loader)
    axes: list[list[str]] = []
    for override in parser.parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_interval_sweep():
            raise UserError(
                f"{override.input_line} has no list of values", where=key, fix="use choice(...) or range(...)"
            )
        if override.is_sweep_override():
            axes.append(
                [f"{key}={value}" for value in override.sweep_string_iterator()]
                if not override.is_choice_sweep()
                else [f"{key}={value}" for value in override.sweep_iterator(transformer=Transformer.encode)]
            )
        else:
            axes.append([str(override.input_line)])
    return [list(combination) for combination in itertools.product(*axes)]


def sweep(arguments: Sequence[str], *, config_loader: Any, master: Any) -> int:
    """Expand ``arguments`` and run every job; the exit code.

    Args:
        config_loader: Hydra's, which composes each job.
        master: the config of the command line without the swept values.
    """
    from lmlab.sweeps.launcher import run_jobs
    from lmlab.worker import requeue

    jobs = expand([*_params(arguments, master), *arguments], config_loader)
    points = GridPoints(jobs)
    return requeue(
        run_jobs(
            points,
            compose=lambda overrides: config_loader.load_sweep_config(master, overrides),
            first=jobs[0],
        )
    )


def _params(arguments: Sequence[str], master: Any) -> list[str]:
    """What ``hydra.sweeper.params`` of an experiment file sweeps, unless the command line says otherwise."""
    told = {key_of(argument) for argument in arguments}
    params = master.hydra.sweeper.params or {}
    return [f"{key}={value}" for key, value in params.items() if key not in told]
