"""The W&B sweeps of conf/sweep, as `wandb sweep` and `wandb agent` handle them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
from wandb.sdk.launch.sweeps import utils as agent

from lmlab.config.compose import CONF, to_run_config
from lmlab.journal import RunDir, read_json
from tests.integration.conftest import ROOT, command
from tests.integration.test_wandb_service import QUICK, offline_records
from tests.tracking.wandb_server import WandbServer

FILES = sorted(CONF.glob("sweep/*.yaml"))
METHODS = ("bayes", "grid", "random")


def loaded(file: Path) -> dict[str, Any]:
    config = agent.load_sweep_config(str(file))
    assert config is not None
    return config


def a_point(config: Mapping[str, Any]) -> dict[str, Any]:
    """One value of every parameter, as an agent would be given."""
    told = config["parameters"].items()
    return {name: p["values"][-1] if "values" in p else (p["min"] * p["max"]) ** 0.5 for name, p in told}


def expanded(config: Mapping[str, Any], values: Mapping[str, Any], *more: str) -> list[str]:
    """The command line that W&B's agent makes of a sweep's command, with ``more`` before the parameters."""
    parts = agent.create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})
    parts |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [config["program"]]}
    line: list[str] = []
    for chunk in agent.create_sweep_command(list(config["command"])):
        name = chunk[2:-1] if chunk.startswith("${") else None
        line += [*(more if name == "args_no_hyphens" else ()), *(parts[name] if name else [chunk])]
    return line


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_file_is_one_for_wandb_and_a_run_for_lmlab(file: Path) -> None:
    from hydra import compose, initialize_config_dir

    config = loaded(file)
    assert config["method"] in METHODS
    assert config["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert _validate_config_and_fill_distribution(config)["parameters"].keys() == config["parameters"].keys()
    for parameter in config["parameters"].values():
        assert parameter.keys() in ({"values"}, {"distribution", "min", "max"})
        assert "values" in parameter or config["method"] != "grid"
    line = expanded(config, a_point(config))
    assert line[:3] == ["/usr/bin/env", sys.executable, "train.py"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run_config = to_run_config(compose("train", line[3:]))
    values = run_config.model_dump()
    for name, value in a_point(config).items():
        found: Any = values
        for part in name.split("."):
            found = found[part]
        assert (found["kind"] if isinstance(found, dict) else found) == value


@pytest.mark.slow
def test_the_agents_command_is_one_run_under_the_agents_id(tmp_path: Path) -> None:
    config = loaded(CONF / "sweep" / "grid_adapters.yaml")
    values = {"adapter": "qlora", "seed": 2}
    parameters = tmp_path / "config.yaml"
    parameters.write_text(
        yaml.safe_dump({"wandb_version": 1, **{n: {"value": v} for n, v in values.items()}})
    )
    line = expanded(config, values, *QUICK, "logger.mode=offline", f"output_root={tmp_path}")
    done = command(
        *line[2:],
        WANDB_SWEEP_ID="sweep0",
        WANDB_RUN_ID="agents01",
        WANDB_SWEEP_PARAM_PATH=str(parameters),
        WANDB_PROJECT="swept",
        WANDB_ENTITY="tester",
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "sft").iterdir()
    run = RunDir(folder)
    (made,) = {p.parent for p in run.path.glob("wandb/**/run-*.wandb")}
    records = offline_records(made)
    about = next(r["run"] for r in records if r["type"] == "run")
    assert (about["run_id"], about["sweep_id"]) == ("agents01", "sweep0")
    assert (about["project"], about["entity"]) == ("swept", "tester")
    assert read_json(run.info)["wandb_id"] == "agents01"
    frozen = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    assert (frozen["adapter"]["kind"], frozen["quant"]["kind"], frozen["seed"]) == ("qlora", "nf4", 2)
    assert frozen["logger"]["project"] == "swept"
    mirrored = json.dumps([r for r in records if r["type"] in ("run", "config")])
    assert "adapter.rank" in mirrored  # W&B keeps "qlora" under adapter, the rest stands beside it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bayes_lr", "ddp"])
def test_wandb_sweep_and_wandb_agent_run_it(tmp_path: Path, name: str) -> None:
    """W&B's own two commands against a local server: created from the file, two runs drawn, two runs made."""
    config = loaded(CONF / "sweep" / f"{name}.yaml")
    told = list(config["command"])
    told[-1:-1] = [*QUICK, f"output_root={tmp_path / 'out'}"]  # small; all else is the file's
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({**config, "command": told}), encoding="utf-8")
    point = a_point(config)
    drawn = {"drawn0001": point, "drawn0002": {**point, "optim.lr": 0.002}}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the agent asks for `python`
    with WandbServer() as server:
        environment = server.environment(PATH=path, WANDB_DIR=str(tmp_path), HOME=str(tmp_path))
        created = command("-m", "wandb", "sweep", "--project", "swept", str(file), **environment)
        assert created.returncode == 0, created.stderr
        assert yaml.safe_load(server.sweeps["sweep0"])["parameters"] == config["parameters"]
        server.offer(list(drawn.items()))
        done = command(
            "-m", "wandb", "agent", "--count", "2", "tester/swept/sweep0", timeout=900, **environment
        )
        assert done.returncode == 0, done.stderr
        assert server.runs.keys() == drawn.keys(), done.stderr
        for run_id, values in drawn.items():
            run = server.runs[run_id]
            assert run.exit_code == 0
            assert run.about["sweep"] == "sweep0"
            assert run.about["project"] == "swept"
            assert run.config["optim"]["lr"] == values["optim.lr"]
            assert run.summary["val/loss"] > 0
            assert run.config["trainer"]["devices"] == (2 if name == "ddp" else 1)
    folders = [RunDir(path) for path in (tmp_path / "out" / "sft").iterdir()]
    assert {read_json(run.info)["wandb_id"] for run in folders} == drawn.keys()
    assert {read_json(run.summary)["status"] for run in folders} == {"finished"}
    assert all(len(list(run.path.glob("wandb/**/run-*.wandb"))) == 1 for run in folders)


@pytest.mark.slow
def test_the_jobs_of_a_multirun_are_not_the_agents_run(tmp_path: Path) -> None:
    done = command(
        "train.py",
        "-m",
        *QUICK,
        "logger.mode=offline",
        f"output_root={tmp_path}",
        "seed=1,2",
        WANDB_SWEEP_ID="sweep0",
        WANDB_RUN_ID="agents01",
    )
    assert done.returncode == 0, done.stderr
    made = {p.parent for p in tmp_path.glob("sweeps/*/*/wandb/**/run-*.wandb")}
    runs = [next(r["run"] for r in offline_records(folder) if r["type"] == "run") for folder in made]
    assert len({run["run_id"] for run in runs} - {"agents01"}) == 2
    assert not any(run.get("sweep_id") for run in runs)


def test_the_files_are_found_from_the_root() -> None:
    assert {file.stem for file in FILES} >= {"bayes_lr", "grid_adapters", "ddp"}
    assert CONF.parent / "train.py" == ROOT / "train.py"
