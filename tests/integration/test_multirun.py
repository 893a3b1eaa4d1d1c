"""Multiruns: what becomes of jobs that finish, fail, are refused, killed or stopped, and of a second start."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmlab.journal import read_json
from lmlab.sweeps.earlier import read_results
from lmlab.sweeps.executors import WorkerTask

from .conftest import TINY, begun, command, rows_of, trained, wait_for

SHORT = ("trainer.max_steps=3", "trainer.val_every_n_steps=3")


# --- whole sweeps -----------------------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {"trainer": {"max_steps": 3, "val_every_n_steps": 3}}
KILLED: dict[str, Any] = {
    "trainer": {"max_steps": 400, "val_every_n_steps": 400},
    "checkpoint": {"every_n_steps": 1},
}
DEFAULTS = {
    "fails": ["override /adapter: none", "override /optim: sgd"],
    "refused": ["override /adapter: none", "override /quant: nf4"],
}
EIGHT: dict[str, dict[str, Any]] = {
    "a": STEPS,
    "b": {"trainer": {**STEPS["trainer"], "devices": 2}},
    "c": {**STEPS, "adapter": {"rank": 2}},
    "fails": {"trainer": {**STEPS["trainer"], "gradient_clip_val": None}, "optim": {"lr": 1e30}},
    "killed": KILLED,
    "refused": STEPS,
    "g": {**STEPS, "seed": 2},
    "h": {"trainer": {**STEPS["trainer"], "devices": 2}, "seed": 2},
}
"""Two jobs of two ranks, one that fails, one that will be killed, one that cannot train, and three others."""


def write_experiment(folder: Path, name: str, values: dict[str, Any]) -> None:
    defaults = "".join(f"  - {line}\n" for line in DEFAULTS.get(name, []))
    head = "# @package _global_\n" + (f"defaults:\n{defaults}" if defaults else "")
    (folder / f"{name}.yaml").write_text(head + yaml.safe_dump(values), encoding="utf-8")


@pytest.mark.slow
def test_eight_jobs_of_which_five_finish_and_a_second_start(tmp_path: Path) -> None:
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    for name, values in EIGHT.items():
        write_experiment(experiments, name, values)
    told = ["--config-dir", str(tmp_path / "conf"), f"experiment={','.join(EIGHT)}", *TINY]
    told += [f"output_root={tmp_path / 'out'}", "run_name=eight", "launcher.jobs=2"]
    root = tmp_path / "out" / "sweeps" / "eight"
    process = begun("train.py", "-m", *told)
    killed = root / "4-experiment=killed"
    wait_for(lambda: list(killed.glob("checkpoints/step-*")), 240)
    os.kill(read_json(killed / ".lock")["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    rows = rows_of(root)
    assert [row["status"].split(":")[0] for row in rows] == [
        "finished", "finished", "finished", "failed", "failed", "refused", "finished", "finished",
    ], out + err  # fmt: skip
    assert process.returncode == 1
    assert "job 3" in err
    assert "gradient norm" in err
    assert "job 4" in err
    assert [row["exit_code"] for row in rows] == ["0", "0", "0", "1", "-9", "2", "0", "0"]
    started = [Path(row["directory"]) for row in rows if row["directory"]]
    assert len(started) == 7
    groups = set()
    for folder in started:
        (file,) = folder.glob("wandb/*offline-run-*/run-*.wandb")
        shown = command("-m", "wandb", "leet", "inspect", "--json", str(file)).stdout.splitlines()
        about = [json.loads(line)["run"] for line in shown if json.loads(line)["type"] == "run"]
        if folder != killed or about:  # what W&B had not written yet dies with a killed process
            groups.add((about[0]["run_group"], about[0]["run_id"]))
    assert {group for group, _ in groups} == {"eight"}
    assert len({run_id for _, run_id in groups}) >= 6
    before = {folder: (folder / "summary.json").stat().st_mtime_ns for folder in started}

    # The killed job goes on where it was, and is short now; the failing one fails again; nothing else is touched.
    short = {**KILLED, "trainer": {"max_steps": 12, "val_every_n_steps": 400}}
    write_experiment(experiments, "killed", short)
    again = command("train.py", "-m", *told, timeout=400)
    assert again.returncode == 1, again.stdout
    rows = rows_of(root)
    expected = ["finished", "finished", "finished", "failed", "finished", "refused", "finished", "finished"]
    assert [row["status"].split(":")[0] for row in rows] == expected, again.stdout + again.stderr
    changed = [
        folder.name for folder in started if (folder / "summary.json").stat().st_mtime_ns != before[folder]
    ]
    assert changed == ["3-experiment=fails", "4-experiment=killed"]
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 12


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
@pytest.mark.slow
def test_a_signal_stops_all_jobs_and_the_same_command_goes_on(tmp_path: Path, number: int, code: int) -> None:
    told = [*TINY, "logger=none", f"output_root={tmp_path}", "run_name=stopped", "optim.lr=1e-3,2e-3,3e-3"]
    told += ["trainer.max_steps=60", "trainer.val_every_n_steps=60", "launcher.jobs=2"]
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    process = begun(
        "train.py", "-m", *told, SLURM_JOB_ID="77", PATH=f"{scontrol.parent}:{os.environ['PATH']}"
    )
    root = tmp_path / "sweeps" / "stopped"
    wait_for(lambda: sum(trained(folder) for folder in root.glob("*-*")) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    requeued = (tmp_path / "called").read_text().split("\n") if (tmp_path / "called").exists() else []
    assert requeued == (["requeue 77", ""] if number == signal.SIGUSR1 else [])
    assert [row["status"] for row in rows_of(root)] == ["interrupted", "interrupted", "not started"]
    said = next(line for line in err.splitlines() if line.startswith("go on with: python train.py "))
    words = shlex.split(said)[5:]
    assert sorted(words) == sorted(["-m", *told])
    again = command("train.py", *words)
    assert again.returncode == 0, again.stderr
    assert [row["status"] for row in rows_of(root)] == ["finished"] * 3
    for folder in root.glob("[0-9]-*"):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 61))
    nothing = command("train.py", "-m", *told)
    assert nothing.returncode == 0
    other = command("train.py", "-m", *told[:-3], "optim.lr=1e-3,5e-3", *told[-2:])
    assert other.returncode == 2
    assert "another sweep" in other.stderr


@pytest.mark.slow
def test_jobs_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    told = [*TINY, "logger=none", f"output_root={tmp_path}", "run_name=orphans", "seed=1,2"]
    process = begun("train.py", "-m", *told, "trainer.max_steps=100000", "trainer.val_every_n_steps=100000")
    folder = tmp_path / "sweeps" / "orphans" / "0-seed=1"
    wait_for(lambda: trained(folder))
    second = command("train.py", "-m", *told, "trainer.max_steps=100000", "trainer.val_every_n_steps=100000")
    assert second.returncode == 2
    assert f"another run is writing here (pid {process.pid}" in second.stderr
    process.kill()
    process.communicate()
    wait_for(lambda: read_json(folder / "summary.json").get("status") == "interrupted", 60)
    assert list(folder.glob("checkpoints/step-*"))


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_to_exactly_its_trials(tmp_path: Path) -> None:
    import optuna

    told = [*TINY, *SHORT, "logger=none", f"output_root={tmp_path}", "run_name=tuned"]
    told += ["hparams_search=optuna", "hparams_search.n_trials=4", "hparams_search.n_startup_trials=2"]
    told += ["optim.lr=tag(log,interval(1e-4,1e-2))", "adapter.rank=choice(2,4)"]
    process = begun("train.py", "-m", *told)
    root = tmp_path / "sweeps" / "tuned"
    finished = "finished"
    wait_for(lambda: read_results(root / "results.csv").get(1, {}).get("status") == finished)
    wait_for(lambda: read_results(root / "results.csv").get(2, {}).get("status") == "running")
    process.kill()
    process.communicate()
    done = command("train.py", "-m", *told)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows_of(root)] == [finished] * 4
    study = optuna.load_study(study_name="tuned", storage=f"sqlite:///{root / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    losses = [read_json(Path(row["directory"]) / "summary.json")["best/val_loss"] for row in rows_of(root)]
    assert [trial.value for trial in study.trials] == losses
    best = yaml.safe_load((root / "best.yaml").read_text(encoding="utf-8"))["best"][0]
    assert best["values"] == {"val/loss": min(losses)}
    assert (root / "report.html").is_file()


@pytest.mark.slow
def test_jobs_print_into_their_own_directories(tmp_path: Path) -> None:
    told = [*TINY, *SHORT, "logger=none", f"output_root={tmp_path}", "run_name=two", "seed=1,2"]
    done = command("train.py", "-m", *told)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "sweeps" / "two"
    for row, seed in zip(rows_of(root), (1, 2), strict=True):
        console = (Path(row["directory"]) / "console.log").read_text(encoding="utf-8")
        assert console.count(f"sft, seed {seed}") == 1
        assert not set(console) & {"\x1b", "\r"}
        assert f"seed={seed}: finished after" in done.stdout
        assert float(row["final/val/loss"]) > 0
    assert "sft, seed" not in done.stdout
    assert not (root / ".lock").exists()


def test_a_foreign_directory_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "mine").mkdir(parents=True)
    (tmp_path / "sweeps" / "mine" / "thesis.tex").touch()
    done = command("train.py", "-m", *TINY, f"output_root={tmp_path}", "run_name=mine", "seed=1,2")
    assert (done.returncode, done.stderr.startswith("error: not a sweep's directory")) == (2, True)
    assert [file.name for file in (tmp_path / "sweeps" / "mine").iterdir()] == ["thesis.tex"]


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_through_submitit(tmp_path: Path) -> None:
    """submitit's stand-in on this machine; SLURM itself cannot be had here."""
    told = [*TINY, *SHORT, "logger=none", f"output_root={tmp_path}", "run_name=queued", "seed=1,2"]
    done = command("train.py", "-m", *told, "launcher=slurm", "launcher.cluster=local", "launcher.jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["status"] for row in rows_of(tmp_path / "sweeps" / "queued")] == ["finished", "finished"]


def test_without_slurm_it_is_one_line(tmp_path: Path) -> None:
    done = command("train.py", "-m", *TINY, f"output_root={tmp_path}", "seed=1,2", "launcher=slurm")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: SLURM cannot be reached")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_queue_that_ends_a_job_early_gets_it_again(train: Any, tmp_path: Path) -> None:
    import threading

    from submitit.helpers import DelayedSubmission

    from lmlab.config.compose import freeze, load_frozen

    run = train("queued-early", *TINY, *SHORT)
    frozen = load_frozen(run.config)
    longer = {"max_steps": 100000, "val_every_n_steps": 100000}
    freeze(
        run, frozen.model_copy(update={"trainer": frozen.trainer.model_copy(update=longer), "resume": "auto"})
    )
    task = WorkerTask(str(run.path))
    thread = threading.Thread(target=task)
    thread.start()
    wait_for(lambda: run.metrics.read_text().count("train/loss") > 5)
    assert isinstance(task.checkpoint(), DelayedSubmission)
    thread.join()
    assert read_json(run.summary)["status"] == "interrupted"
    assert load_frozen(run.config).resume == "auto"
