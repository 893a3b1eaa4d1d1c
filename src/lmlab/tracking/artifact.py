"""A directory as a W&B artifact of a run: versioned, with aliases, beside the run's metrics.

`wandb` is imported only when a directory is really logged. Offline the artifact is written into the run's ``wandb/`` folder
and goes up with `wandb sync`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lmlab.records import UserError
from lmlab.tracking.wandb import LoggerConfig, has_key


def mode_of(config: LoggerConfig) -> Literal["online", "offline"]:
    """Where an artifact of this run goes.

    Raises:
        UserError: the run is not tracked.
    """
    if config.mode == "disabled" or (config.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        raise UserError(
            "the run is not tracked by W&B (logger.mode=disabled)",
            where="--wandb-artifact",
            fix="leave it out, or train with logger=wandb",
        )
    if config.mode != "auto":
        return "online" if config.mode == "online" else "offline"
    return "online" if has_key() and os.environ.get("WANDB_MODE") not in ("offline", "dryrun") else "offline"


def log_artifact(
    folder: Path,
    *,
    name: str,
    aliases: Sequence[str],
    metadata: Mapping[str, Any],
    config: LoggerConfig,
    run_dir: Path,
    run_id: str,
    say: Callable[[str], None],
) -> None:
    """Log ``folder`` as an artifact of type ``model``, in the W&B run that has ``run_id``.

    Raises:
        UserError: the run is not tracked, a name that W&B does not take, or a service that is away.
    """
    mode = mode_of(config)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str(run_dir / "wandb"))
    import wandb

    try:
        artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
        artifact.add_dir(str(folder))
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=run_dir.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                init_timeout=config.init_timeout,
                console="off",
                disable_git=True,
                save_code=False,
                x_save_requirements=False,
            ),
        )
        logged = run.log_artifact(artifact, aliases=list(aliases))
        if mode == "online":
            logged.wait()
        folder_of_run = Path(run.dir).parent
        run.finish()
    except Exception as error:  # of a name, of a key, of a service that is away: the export itself stands
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the artifact was not logged: {detail}",
            where="--wandb-artifact",
            fix="the export is there; try again",
        ) from error
    told = f"W&B: artifact {name} with aliases {', '.join(aliases)}"
    shown = os.path.relpath(folder_of_run)
    say(told if mode == "online" else f"{told}, offline: upload with `wandb sync {shown}`")
