"""`scripts/reproduce.py`: a run made again is equal; what was changed since is refused, said or found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.journal import RunDir, read_json, write_json
from lmlab.records import UserError
from lmlab.reproduce import reproduce
from tests.integration.conftest import QUICK, command

Train = Callable[..., RunDir]
SMALL = (
    "metrics=none",
    "samples.prompts=1",
    "samples.grid=[top_p_temperature]",
    "trainer.batch_size=2",
    "trainer.max_steps=6",
    "trainer.val_every_n_steps=3",
    "checkpoint.every_n_steps=2",
    "checkpoint.keep=9",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("records") / "data.jsonl"
    rows = [{"instruction": f"Add {i} and 1", "input": "", "output": str(i + 1)} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def run(train: Train, data: Path) -> RunDir:
    told = ["data=jsonl", f"data.path='{data}'", "adapter=lora", "adapter.dropout=0.1"]
    return train("original", *SMALL, *told)


def copy_of(run: RunDir, folder: Path) -> RunDir:
    return RunDir(shutil.copytree(run.path, folder / run.path.name))


@pytest.mark.slow
def test_a_run_is_equal_bit_for_bit_to_itself_made_again(run: RunDir, tmp_path: Path) -> None:
    said: list[str] = []
    found = reproduce(run, to=tmp_path, say=said.append)
    assert (found.equal, found.differences, found.setting, said) == (True, [], [], [])
    assert found.made.path.parent == tmp_path
    assert found.made.path.name.startswith("original-reproduced-")
    assert {metric.name for metric in found.metrics} >= {"train/loss", "val/loss", "layers/update_ratio"}
    assert all(metric.equal for metric in found.metrics)
    assert found.samples == (3, 3)
    assert found.weights == "step-00000006"
    kept = read_json(found.write())
    assert (kept["equal"], kept["weights"], kept["steps"]) == (
        True,
        {"compared": "step-00000006", "equal": True},
        None,
    )
    assert not (found.made.path / "wandb").exists()
    assert read_json(found.made.info)["data_hash"] == read_json(run.info)["data_hash"]


@pytest.mark.slow
def test_its_beginning_and_what_is_another_now(run: RunDir, tmp_path: Path) -> None:
    """Four of six steps, on a machine of another kind; step 4 has a checkpoint and no validation of its own."""
    copied = copy_of(run, tmp_path)
    info = read_json(copied.info)
    info["versions"]["torch"], info["git_commit"], info["hardware"]["machine"] = "1.0", "0123", "abacus"
    write_json(copied.info, info)
    said: list[str] = []
    found = reproduce(copied, steps=4, say=said.append)
    assert found.made.path.parent == tmp_path
    assert [line.split(", now")[0] for line in said] == [
        "note: git_commit was 0123",
        "note: versions.torch was 1.0",
        "note: hardware.machine was abacus",
    ]
    assert (found.equal, found.steps, found.weights) == (True, 4, "step-00000004")
    assert next(metric for metric in found.metrics if metric.name == "train/loss").points == 4
    assert read_json(found.made.summary)["steps"] == 4


@pytest.mark.slow
def test_a_changed_number_is_found(run: RunDir, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    rows = [json.loads(line) for line in copied.metrics.read_text().splitlines()]
    for row in rows:
        if row["step"] == 2 and "train/loss" in row:
            row["train/loss"] *= 1.01
    copied.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("scripts/reproduce.py", str(copied.path), "--steps", "3", "--to", str(tmp_path / "again"))
    assert done.returncode == 1, done.stdout + done.stderr
    (made,) = (tmp_path / "again").iterdir()
    kept = read_json(RunDir(made).reproduction)
    assert not kept["equal"]
    assert [line.split(":")[0] for line in kept["differences"]] == ["metrics.jsonl"]
    wrong = [metric for metric in kept["metrics"] if not metric["equal"]]
    assert [(metric["name"], metric["step"]) for metric in wrong] == [("train/loss", 2)]
    assert wrong[0]["largest"] == pytest.approx(0.01 / 1.01)
    assert "not reproduced" in done.stdout
    assert "no checkpoint of that step" in done.stdout


def test_changed_data_is_refused_before_anything_is_made(run: RunDir, data: Path, tmp_path: Path) -> None:
    before = data.read_text()
    try:
        data.write_text(before.replace("Add 7 and 1", "Add 7 and one"))
        done = command("scripts/reproduce.py", str(run.path), "--to", str(tmp_path))
    finally:
        data.write_text(before)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert "the data is not what this run was trained on" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_branch_is_made_again_while_its_trunk_is_there(
    train: Train, run: RunDir, data: Path, tmp_path: Path
) -> None:
    trunk = copy_of(run, tmp_path)
    told = ["data=jsonl", f"data.path='{data}'", "adapter=lora", "adapter.dropout=0.1", "optim.lr=0.002"]
    branch = train("branch", *SMALL, *told, f"resume={trunk.checkpoints / 'step-00000004'}")
    found = reproduce(branch, to=tmp_path)
    assert (found.equal, found.weights) == (True, "step-00000006")
    assert next(metric for metric in found.metrics if metric.name == "train/loss").points == 2
    with pytest.raises(UserError, match=r"began at step 4 .*give 5 or more"):
        reproduce(branch, to=tmp_path, steps=4)
    shutil.rmtree(trunk.path)
    with pytest.raises(UserError, match="the checkpoint this run branched from is gone"):
        reproduce(branch, to=tmp_path)


def test_what_is_no_run_or_logged_nothing(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable config"):
        reproduce(RunDir(tmp_path / "nowhere"))
    copied = copy_of(run, tmp_path)
    with pytest.raises(UserError, match=r"--steps 0 .*give 1 or more"):
        reproduce(copied, steps=0)
    copied.metrics.write_text('{"step": 0, "val/loss": 2.0}\n{"step": 1, "train/lo')
    with pytest.raises(UserError, match="nothing to compare"):
        reproduce(copied)
    copied.info.unlink()
    with pytest.raises(UserError, match=r"no readable run\.json"):
        reproduce(copied)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.slow
def test_a_job_of_a_multirun_and_a_run_that_was_stopped(tmp_path: Path) -> None:
    done = command(
        "train.py", "-m", *QUICK, f"output_root={tmp_path}", "run_name=sweep", "adapter=none,qlora"
    )
    assert done.returncode == 0, done.stderr
    jobs = sorted(path for path in (tmp_path / "sweeps" / "sweep").iterdir() if path.is_dir())
    for job in jobs:
        again = command("scripts/reproduce.py", str(job), "--to", str(tmp_path / "again"))
        assert again.returncode == 0, again.stdout + again.stderr
        assert "reproduced: equal bit for bit" in again.stdout
    # As if it had been killed after its second step.
    stopped = RunDir(jobs[0])
    write_json(stopped.summary, {"status": "running", "exit_code": None})
    rows = [line for line in stopped.metrics.read_text().splitlines() if json.loads(line)["step"] <= 2]
    stopped.metrics.write_text("\n".join(rows) + "\n")
    again = command("scripts/reproduce.py", str(stopped.path), "--to", str(tmp_path / "again"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the first 2 steps" in again.stdout
