"""A run from Python, for notebooks: what ``python train.py OVERRIDES`` does, in this process.

    from lmlab.runs import train
    from lmlab.tracking.plots import series

    run = train(["task=pretrain", "trainer.max_steps=100", "logger=none"])
    series(run.metrics, "val/loss")  # {step: value}

The way is train.py's own: the same checks before anything is created, the same directory, the same files. W&B's variables,
random states, signal handlers and streams are afterwards as they were. Trade-off: several runs share one process, so on a
CPU the measured memory of a later one holds what the earlier ones left, and malloc's thresholds stay those of a training;
processes of their own are what ``python train.py -m`` is for. A .env file is not read: the environment is the notebook's.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence

from lmlab import ranks
from lmlab.config.compose import compose_config
from lmlab.config.schema import RunConfig, world_size
from lmlab.records import RunFailedError, UserError
from lmlab.start import create_run, plan_run
from lmlab.tracking.report import RunFiles, read_run


def train(overrides: Sequence[str] = (), *, quiet: bool = False) -> RunFiles:
    """Train one run on one device and read what it left.

    Args:
        overrides: as on the command line, ``["adapter=lora", "trainer.max_steps=100"]``.
        quiet: print nothing on stdout (it still stands in the run's console.log); errors come on stderr as ever.

    Returns:
        The run's files; ``directory`` is what `lmlab.load.load_for_use` and ``model.name_or_path`` take.

    Raises:
        UserError: what is wrong with the overrides, before anything is created, or an option that needs processes of its own.
        RunFailedError: the run ended early, by an error or by Ctrl-C; what it had logged and saved is in its directory.
    """
    ranks.refuse_front_door()
    config = compose_config(overrides)
    _refuse_processes(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_it_was())
        plan = plan_run(config, overrides)
        stack.callback(plan.run.release)
        create_run(plan, overrides)
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        from lmlab.worker import launch

        code = launch(plan.run, plan.config, started=time.monotonic())
    files = read_run(plan.run.path)
    if code:
        reason = files.summary.get("error") or "the run was stopped"
        raise RunFailedError(f"{reason} (exit code {code}, {plan.run.path})")
    return files


def _refuse_processes(config: RunConfig) -> None:
    """Refuse what starts processes, or begins this one again; and a thread that no signal reaches."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "a run needs the main thread, the one that signals reach",
            where="lmlab.runs.train",
            fix="call it there, or run python train.py in a shell",
        )
    wrong = {
        "hparams_search": config.hparams_search.kind != "none",
        "trainer.devices": world_size(config) > 1,
        "trainer.auto_batch": config.trainer.auto_batch,
    }
    for key, is_set in wrong.items():
        if is_set:
            raise UserError(
                f"{key} needs processes of its own",
                where="lmlab.runs.train",
                fix="leave it out, or run python train.py in a shell",
            )


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Random states, and W&B's variables (WANDB_DATA_DIR is this run's folder), are not for what comes after the run."""
    import numpy as np
    import torch

    python, numpy, wandb = random.getstate(), np.random.get_state(), _wandb_variables()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name in _wandb_variables():
            del os.environ[name]
        os.environ.update(wandb)


def _wandb_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
