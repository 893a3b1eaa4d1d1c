"""Which process is which: srun's variables in torchrun's words, and what is refused before anything is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lmlab import ranks
from lmlab.config.compose import CONF, run_app, to_run_config
from lmlab.journal import RunDir, write_json
from lmlab.models.hardware import choose_hardware
from lmlab.records import OF_A_MULTIRUN, UserError
from lmlab.start import start
from tests.integration.conftest import command

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODELIST": "gpu[06-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
}
BATCH_STEP = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
RANK_1: dict[str, Any] = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANK_1, *SRUN, OF_A_MULTIRUN):
        monkeypatch.delenv(name, raising=False)


def run_config(*overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_run_config(compose("train", list(overrides)))


def test_a_task_of_srun_is_a_rank() -> None:
    environ = dict(SRUN)
    assert ranks.adopt_srun(environ)
    made = {name: value for name, value in environ.items() if not name.startswith("SLURM")}
    assert made.pop("MASTER_ADDR") == "gpu07"
    assert int(made.pop("MASTER_PORT")) in ranks.PORTS
    assert made == {"RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "8"}


def test_all_tasks_find_the_same_port_and_other_steps_another() -> None:
    ports = []
    for change in ({}, {"SLURM_PROCID": "0"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "4712"}):
        environ = {**SRUN, **change}
        ranks.adopt_srun(environ)
        ports.append(environ["MASTER_PORT"])
    assert ports[0] == ports[1]
    assert len(set(ports)) == 3


def test_what_is_set_by_hand_stays() -> None:
    environ = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999"}
    assert ranks.adopt_srun(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "999")


@pytest.mark.parametrize(
    "environ",
    [{}, BATCH_STEP, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, {**SRUN, **RANK_1}],
    ids=["no SLURM", "batch step", "step of one task", "torchrun inside a step"],
)
def test_what_is_no_task_of_several_is_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert not ranks.adopt_srun(environ)
    assert environ == before


@pytest.mark.parametrize(("name", "value"), [("SLURM_JOB_ID", None), ("SLURM_STEP_NUM_TASKS", "many")])
def test_broken_variables_are_one_line(name: str, value: str | None) -> None:
    environ = {**SRUN, name: value} if value else {k: v for k, v in SRUN.items() if k != name}
    with pytest.raises(UserError, match=value or name) as caught:
        ranks.adopt_srun(environ)  # pyright: ignore[reportArgumentType]
    assert caught.value.fix


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("a1,b2", "a1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[1-2]-node", "rack1-node"),
        ("a-b.cluster", "a-b.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert ranks.first_host(nodes) == first


def test_another_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config("trainer.devices=2", "trainer.num_nodes=2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="rank 0 without LOCAL_RANK"):
        ranks.require_world(config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    ranks.require_world(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 ranks were started") as caught:
        ranks.require_world(config)
    assert "start 4" in str(caught.value)


def test_a_gpu_that_a_rank_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count alone is pretended: srun gave each task one of the node's GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="sees 1") as caught:
        choose_hardware("gpu", "fp32")
    assert "--gpus-per-node" in str(caught.value)


def test_a_run_of_several_nodes_is_not_started_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ranks.refuse_alone(RunDir(tmp_path), run_config())
    config = run_config("trainer.num_nodes=2", "trainer.devices=4")
    with pytest.raises(UserError, match="one start per node") as caught:
        ranks.refuse_alone(RunDir(tmp_path), config)
    assert "--nnodes 2 --nproc-per-node 4" in str(caught.value)
    assert "srun --kill-on-bad-exit=1 --nodes 2 --ntasks-per-node 4" in str(caught.value)
    monkeypatch.setenv(OF_A_MULTIRUN, "1")
    with pytest.raises(UserError, match="in a multirun"):
        ranks.refuse_alone(RunDir(tmp_path), config)


def test_a_node_that_does_not_see_the_data(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("task: sft\n")
    write_json(run.info, {"prepared": str(tmp_path / "elsewhere")})
    with pytest.raises(UserError, match="does not see the prepared data") as caught:
        ranks.require_here(run)
    assert "LMLAB_CACHE" in str(caught.value)


def test_a_node_that_does_not_see_the_run_says_so(tmp_path: Path) -> None:
    done = command("-m", "lmlab.worker", str(tmp_path / "gone"), **RANK_1)
    assert done.returncode == 2
    assert done.stderr.startswith("error: rank 1 on ")
    assert "a file system that all nodes share" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("environ", [RANK_1, SRUN], ids=["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize(
    "told",
    [[], ["-m", "seed=1,2"], ["-m", "hparams_search=optuna", "seed=1,2"]],
    ids=["run", "multirun", "search"],
)
def test_train_py_is_no_rank(
    environ: dict[str, Any],
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train.py", *told, f"output_root={tmp_path}"])
    assert run_app(start) == 2
    (line,) = capsys.readouterr().err.splitlines()
    who = "one rank of several (RANK)" if environ is RANK_1 else "one task of srun of several (SLURM_PROCID)"
    assert line == (
        f"error: train.py prepares a run once, and here it is {who}: "
        "start train.py by itself, then the ranks with: -m lmlab.worker RUN_DIR"
    )
    assert not list(tmp_path.iterdir())
