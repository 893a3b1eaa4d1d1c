"""Which of a run's processes this one is: torchrun says it in RANK and its kin, srun in variables of its own.

One process per device and one set of words: what srun says is put into torchrun's variables once, at the start, and all
else (torch's process group, Lightning, `models.hardware`) reads those. SLURM's batch step has most of srun's variables
too, so only a step of several tasks makes ranks; and inside such a step torchrun's own word comes first.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping
from pathlib import Path

from lmlab.config.schema import RunConfig, world_size
from lmlab.journal import RunDir, read_json
from lmlab.records import OF_A_MULTIRUN, UserError

HAS_PARENT = "LMLAB_HAS_PARENT"
"""Set for ranks that lmlab started itself: their parent holds the directory's lock and requeues."""
PORTS = range(12_000, 32_000)
"""Below those that systems give away by themselves."""


def is_rank() -> bool:
    """Whether this process is one of several that somebody started together."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def adopt_srun(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Put a task of ``srun`` into torchrun's words; whether it is one.

    Raises:
        UserError: SLURM's variables cannot be read.
    """
    try:
        tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks < 2 or "RANK" in environ or "SLURM_PROCID" not in environ:
            return False
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_NODELIST"]
        job, step = int(environ["SLURM_JOB_ID"]), environ.get("SLURM_STEP_ID", "0")
        words = {
            "RANK": environ["SLURM_PROCID"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "GROUP_RANK": environ.get("SLURM_NODEID", "0"),
            "WORLD_SIZE": str(tasks),
        }
        port = PORTS[(job * 31 + (int(step) if step.isdigit() else 0)) % len(PORTS)]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"a task of srun without {error}"
            if isinstance(error, KeyError)
            else f"SLURM's variables: {error}",
            where="environment",
            fix="start with srun inside an allocation, or with torchrun",
        ) from error
    environ.update(words)
    environ.setdefault("MASTER_ADDR", first_host(nodes))  # where srun puts task 0
    environ.setdefault("MASTER_PORT", str(port))
    return True


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: ``gpu[007-009,12],login`` -> ``gpu007``, ``a,b`` -> ``a``."""
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", nodes).partition(",")[0]


def require_here(run: RunDir) -> None:
    """Refuse a rank whose machine does not see what the first one prepared.

    Raises:
        UserError: no run directory, or no prepared data, on this machine.
    """
    who = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    if not run.config.is_file():
        raise UserError(
            f"{who} sees no config.yaml of a run there",
            where=str(run.path),
            fix="give a run directory on a file system that all nodes share (output_root)",
        )
    prepared = Path(str(read_json(run.info).get("prepared")))
    if not (prepared / "meta.json").is_file():
        raise UserError(
            f"{who} does not see the prepared data",
            where=str(prepared),
            fix="set LMLAB_CACHE to a folder that all nodes share and prepare again with train.py",
        )


def require_world(config: RunConfig) -> None:
    """Refuse another number of ranks than the run was prepared for: its global batch would be another.

    Raises:
        UserError: they differ.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"rank {os.environ['RANK']} without LOCAL_RANK",
            where="environment",
            fix="start with torchrun or srun, which say which of its machine's ranks it is",
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != world_size(config):
        trainer = config.trainer
        raise UserError(
            f"{started} ranks were started, and the run was prepared for trainer.devices={trainer.devices} x "
            f"trainer.num_nodes={trainer.num_nodes}",
            where="WORLD_SIZE",
            fix=f"start {world_size(config)}, or prepare it anew with train.py for {started}",
        )


def refuse_front_door() -> None:
    """train.py prepares, once; the ranks are started with what it prepared.

    Raises:
        UserError: this process is one of several.
    """
    if is_rank() or adopt_srun(dict(os.environ)):
        what = "one rank" if is_rank() else "one task of srun"
        raise UserError(
            f"train.py prepares a run once, and here it is {what} of several",
            where="RANK" if is_rank() else "SLURM_PROCID",
            fix="start train.py by itself, then the ranks with: -m lmlab.worker RUN_DIR",
        )


def how_to_start(run: RunDir, config: RunConfig) -> str:
    """What to type on the nodes of a prepared run."""
    nodes, devices = config.trainer.num_nodes, config.trainer.devices
    told = f"--nnodes {nodes} --nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    return (
        f"on each node: torchrun {told} -m lmlab.worker {run.path}\n"
        f"under SLURM: srun --kill-on-bad-exit=1 --nodes {nodes} --ntasks-per-node {devices} python -m lmlab.worker {run.path}"
    )


def refuse_alone(run: RunDir, config: RunConfig) -> None:
    """A run of several nodes cannot be started by one process.

    Raises:
        UserError: it is one.
    """
    if config.trainer.num_nodes == 1:
        return
    job = OF_A_MULTIRUN in os.environ
    raise UserError(
        f"trainer.num_nodes={config.trainer.num_nodes} "
        + ("in a multirun, whose jobs each have one machine" if job else "needs one start per node"),
        where="trainer.num_nodes",
        fix="use trainer.num_nodes=1" if job else how_to_start(run, config),
    )
