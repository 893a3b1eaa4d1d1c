"""The W&B workspace: what its specification names, and how it is saved."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lmlab.config.compose import CONF
from lmlab.records import UserError
from lmlab.tracking.workspace import VARIED, build_workspace, swept_keys, workspace_spec
from tests.integration.conftest import command
from tests.tracking.wandb_server import WandbServer

PHASES = ("load", "forward", "backward", "optimizer", "eval", "generate")
METRICS = {  # design.md, section 5, and what summary.json has besides
    *("train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/flops"),
    *("val/loss", "val/perplexity", "val/bits_per_byte", "val/exact_match"),
    *("perf/tokens_per_second", "perf/tokens_per_second_median"),
    *(f"memory/{phase}/{kind}" for phase in PHASES for kind in ("peak_gb", "planned_gb")),
    *("memory/vram_allocated_gb", "memory/vram_reserved_gb", "memory/rss_gb", "memory/peak_gb"),
    *("model/params_trainable", "best/val_loss"),
}
MEDIA = {"samples", "data/examples", "data/mask_preview"}


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in strings(inner)]
    return [value] if isinstance(value, str) else []


def panels_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {s["name"]: s["panels"] for s in spec["section"]["panelBankConfig"]["sections"]}


def test_every_name_in_it_is_one_that_runs_log() -> None:
    spec = workspace_spec(build_workspace("p", entity="e"))
    named = {re.sub(r"^(summary|summary_metrics|history)[:.]", "", text) for text in strings(panels_of(spec))}
    metrics = {text for text in named if re.fullmatch(r"[a-z]+(/[a-z_]+)+", text)}
    assert metrics - {"trainer/step"} <= METRICS | MEDIA
    assert metrics >= METRICS - {"model/params_trainable"}
    assert panels_of(spec).keys() == {"Loss", "Memory by phase", "Speed", "Samples", "Sweep"}
    assert "samples" in json.dumps(panels_of(spec)["Samples"])


def test_the_parallel_coordinates_stand_for_what_was_varied() -> None:
    keys = swept_keys(CONF / "sweep" / "bayes_lr.yaml")
    assert keys == ["optim.lr", "adapter.rank", "adapter.alpha"]
    spec = workspace_spec(build_workspace("p", entity="e", varied=keys))
    (plot,) = [p for p in panels_of(spec)["Sweep"] if p["viewType"] == "Parallel Coordinates Plot"]
    columns = [column["accessor"] for column in plot["config"]["columns"]]
    assert columns[:3] == ["config:optim.value.lr", "config:adapter.value.rank", "config:adapter.value.alpha"]
    assert columns[-1] == "summary:best/val_loss"
    for key in VARIED:
        group, _, name = key.partition(".")
        assert (CONF / group).is_dir() or not name


@pytest.mark.parametrize("text", [None, "[]", "parameters: {}", "a: ["])
def test_what_is_no_sweep_file_is_said(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "sweep.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"sweep\.yaml"):
        swept_keys(file)


def test_without_the_library_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'lmlab\[workspaces\]'"):
        build_workspace("p", entity="e")


def test_the_script_saves_it_or_writes_it(tmp_path: Path) -> None:
    script = str(CONF.parent / "scripts" / "workspace.py")
    with WandbServer() as server:
        online = server.environment(HOME=str(tmp_path))
        saved = command(script, "mine", cwd=tmp_path, **online)
        assert saved.returncode == 0, saved.stderr
        assert saved.stdout.splitlines()[-1].startswith(f"workspace: {server.url}/tester/mine?nw=")
        (view,) = server.views
        assert (view["entityName"], view["projectName"]) == ("tester", "mine")
        spec = json.loads(view["spec"])
    assert panels_of(spec).keys() == {"Loss", "Memory by phase", "Speed", "Samples", "Sweep"}
    written = command(script, "mine", cwd=tmp_path, HOME=str(tmp_path))
    assert written.returncode == 0, written.stderr
    assert "set WANDB_API_KEY" in written.stdout
    local = json.loads((tmp_path / "mine-workspace.json").read_text(encoding="utf-8"))
    assert panels_of(local).keys() == panels_of(spec).keys()


@pytest.mark.slow
def test_a_service_that_is_away_is_one_line(tmp_path: Path) -> None:
    with WandbServer() as server:
        online = server.environment(HOME=str(tmp_path))
    script = str(CONF.parent / "scripts" / "workspace.py")
    refused = command(script, "mine", "--entity", "e", cwd=tmp_path, **online)  # nobody listens any more
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: W&B did not take the workspace: ")
    assert "Traceback" not in refused.stderr
