"""A W&B workspace for lmlab's runs, as code: loss, memory by phase, speed, samples, and what a sweep varied.

Built with W&B's own library (wandb-workspaces, the extra ``lmlab[workspaces]``) and imported only when asked for. A
panel names metrics as metrics.jsonl has them; what a run does not log stays empty in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lmlab.records import RunFailedError, UserError
from lmlab.tracking.plots import PHASES

STEP = "trainer/step"
QUALITY = ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "val/exact_match")
OPTIMIZATION = ("train/grad_norm", "train/lr")
LEVELS = ("memory/rss_gb", "memory/vram_allocated_gb", "memory/vram_reserved_gb")
BEST = "best/val_loss"
COSTS = ("model/params_trainable", "memory/peak_gb", "perf/tokens_per_second_median")
VARIED = ("adapter.kind", "quant.kind", "adapter.rank", "optim.lr", "seed")
"""Keys of the config that runs are compared by where no sweep says which."""


def build_workspace(project: str, *, entity: str, varied: Sequence[str] = VARIED) -> Any:
    """The workspace, not saved.

    Args:
        varied: keys of the config, dotted, that stand beside the outcome in the parallel coordinates.

    Returns:
        A `wandb_workspaces.workspaces.Workspace`.

    Raises:
        UserError: W&B's library for it is not installed.
    """
    workspaces, panels = _library()
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="lmlab",
        sections=[
            workspaces.Section(name=name, panels=made, is_open=True)
            for name, made in {**_curves(panels), **_comparisons(panels, varied)}.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def _curves(panels: Any) -> dict[str, list[Any]]:
    """Section -> its panels, of single runs."""

    def lines(*names: str, x: str = STEP, title: str | None = None) -> Any:
        return panels.LinePlot(title=title or names[0], x=x, y=list(names))

    def by_phase(kind: str, title: str) -> Any:
        return panels.BarPlot(
            title=title, metrics=[f"memory/{phase}/{kind}" for phase in PHASES], orientation="v"
        )

    against = [lines("val/loss", x=x, title=f"val/loss against {x}") for x in ("train/tokens", "train/flops")]
    return {
        "Loss": [lines(name) for name in (*QUALITY, *OPTIMIZATION)] + against,
        "Memory by phase": [
            by_phase("peak_gb", "peak by phase, GB"),
            by_phase("planned_gb", "planned by phase, GB"),
            lines(*LEVELS, title="memory now, GB"),
        ],
        "Speed": [
            lines("perf/tokens_per_second"),
            panels.BarPlot(title="median tokens/s", metrics=["perf/tokens_per_second_median"]),
        ],
    }


def _comparisons(panels: Any, varied: Sequence[str]) -> dict[str, list[Any]]:
    """Section -> its panels, of runs side by side."""
    columns = [
        *(panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key)) for key in varied),
        *(panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric(name)) for name in COSTS),
        panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric(BEST)),
    ]
    scatter = panels.ScatterPlot(
        title="best val/loss against peak memory",
        x=panels.SummaryMetric("memory/peak_gb"),
        y=panels.SummaryMetric(BEST),
    )
    return {
        "Samples": [
            panels.WeavePanelSummaryTable(table_name="samples"),
            panels.WeavePanelSummaryTable(table_name="data/examples"),
            panels.MediaBrowser(title="trained spans", media_keys=["data/mask_preview"]),
        ],
        "Sweep": [
            panels.ParallelCoordinatesPlot(
                title="what was varied, what it cost, what it gave", columns=columns
            ),
            panels.ParameterImportancePlot(with_respect_to=BEST),
            scatter,
            panels.RunComparer(diff_only="split"),
        ],
    }


def workspace_spec(workspace: Any) -> dict[str, Any]:
    """What is sent to W&B when the workspace is saved, as plain JSON values."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def save_workspace(workspace: Any) -> str:
    """Save it as a new view of the project; its address.

    Raises:
        RunFailedError: W&B cannot be reached or does not take it.
    """
    try:
        return str(workspace.save().url)
    except Exception as error:  # whatever W&B raises: the network, the key, a project that is not there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunFailedError(f"W&B did not take the workspace: {reason}") from error


def default_entity() -> str:
    """The user or team that W&B takes if none is named.

    Raises:
        RunFailedError: W&B cannot be asked.
    """
    import wandb

    try:
        entity = wandb.Api().default_entity
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunFailedError(f"W&B cannot be asked for your entity: {reason}") from error
    if not entity:
        raise RunFailedError("W&B names no entity of yours: give one with --entity")
    return str(entity)


def swept_keys(file: Path) -> list[str]:
    """The parameters of a sweep file.

    Raises:
        UserError: it is none.
    """
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            "cannot read the sweep file", where=str(file), fix="one of conf/sweep, or your own"
        ) from error
    parameters = told.get("parameters") if isinstance(told, dict) else None
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(
            "no parameters in it", where=str(file), fix="give a sweep file, as those in conf/sweep"
        )
    return [str(name) for name in parameters]


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            "W&B's library for workspaces is not installed",
            where="wandb-workspaces",
            fix="pip install 'lmlab[workspaces]'",
        ) from error
    return workspaces, panels
