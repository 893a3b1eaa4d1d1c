"""Runs of several processes: DDP over gloo, multiruns, signals, a run that fails."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmlab.journal import RunDir, read_json
from tests.integration.conftest import QUICK, ROOT, command, lines, rows_of, started

# fp32 sums in another order, 3 optimizer steps: 1e-7 measured.
RELATIVE = 1e-5


@pytest.mark.parametrize("adapter", ["none", pytest.param("qlora", marks=pytest.mark.slow)])
def test_two_ranks_give_the_weights_of_one_process(adapter: str, tmp_path: Path) -> None:
    told = [*QUICK, f"adapter={adapter}", "optim=sgd", f"output_root={tmp_path}"]
    one = command("train.py", *told, "run_name=one", "trainer.batch_size=4")
    two = command("train.py", *told, "run_name=two", "trainer.batch_size=2", "trainer.devices=2")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    kind = "model/model.safetensors" if adapter == "none" else "adapter/adapter_model.safetensors"
    a, b = (load_file(tmp_path / "sft" / name / kind) for name in ("one", "two"))
    top = sum(float((a[k] - b[k]).double().square().sum()) for k in a)
    assert (top / sum(float(a[k].double().square().sum()) for k in a)) ** 0.5 < RELATIVE
    losses = [
        [r for r in lines(tmp_path / "sft" / name / "metrics.jsonl") if "val/loss" in r]
        for name in ("one", "two")
    ]
    for first, second in zip(*losses, strict=True):
        assert first["val/loss"] == pytest.approx(second["val/loss"], rel=1e-6)
    assert [r["step"] for r in lines(tmp_path / "sft" / "two" / "metrics.jsonl") if "train/loss" in r] == [
        1,
        2,
        3,
    ]


@pytest.mark.slow
def test_a_multirun_is_one_process_one_directory_and_one_wandb_run_per_job(tmp_path: Path) -> None:
    told = [o for o in QUICK if o != "logger=none"]
    done = command(
        "train.py", "-m", *told, f"output_root={tmp_path}", "adapter=none,lora,qlora", "quant=none,nf4"
    )
    assert done.returncode == 0, done.stderr
    (root,) = (tmp_path / "sweeps").iterdir()
    rows = rows_of(root)
    assert [row["status"].split(":")[0] for row in rows] == [
        "finished",
        "refused",
        "finished",
        "finished",
        "refused",
        "finished",
    ]
    folders = [RunDir(row["directory"]) for row in rows if row["directory"]]
    assert len({run.path for run in folders}) == 4
    groups, ids = set(), set()
    for run in folders:
        (file,) = run.path.glob("wandb/*offline-run-*/run-*.wandb")
        shown = command("-m", "wandb", "leet", "inspect", "--json", str(file))
        about = next(
            json.loads(line)["run"] for line in shown.stdout.splitlines() if json.loads(line)["type"] == "run"
        )
        groups.add(about["run_group"])
        ids.add(about["run_id"])
        assert any(json.loads(line)["type"] == "exit" for line in shown.stdout.splitlines())
    assert groups == {root.name}
    assert len(ids) == 4
    assert not (ROOT / "multirun").exists()
    assert "jobs" in done.stdout
    assert "quant=nf4, or quant=none" in done.stdout


@pytest.mark.slow
def test_a_failing_job_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    # Of the two learning rates the second blows the loss up to a gradient that is not finite.
    told = [*QUICK, "adapter=none", "optim=sgd", "trainer.gradient_clip_val=null", "optim.lr=0.01,1e30"]
    done = command("train.py", "-m", *told, f"output_root={tmp_path}")
    assert done.returncode == 1
    (root,) = (tmp_path / "sweeps").iterdir()
    rows = rows_of(root)
    assert [row["status"] for row in rows] == ["finished", "failed"]
    summary = read_json(RunDir(rows[1]["directory"]).summary)
    assert summary["status"] == "failed"
    assert "gradient norm" in summary["error"]
    assert "job 1" in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_with_its_code(tmp_path: Path, number: int, code: int) -> None:
    process, run = started(tmp_path, "logger.mode=offline", logger="wandb")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    summary = read_json(run.summary)
    assert summary["status"] == "interrupted"
    (checkpoint,) = run.checkpoints.iterdir()
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert state["global_step"] == summary["steps"]
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert not run.lock.exists()


def test_one_line_and_exit_two_for_a_user_error() -> None:
    done = command("train.py", "adapter=qlora", "quant=nf5")
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "error: no option 'nf5' (quant): did you mean 'nf4'? one of bf16, fp16, fp4, int4, int8, nf4, none"
    )


def test_help_and_cfg_answer_without_the_heavy_libraries() -> None:
    shown = command("-X", "importtime", "train.py", "--help")
    assert shown.returncode == 0
    assert "adapter=qlora quant=nf4" in shown.stdout
    assert not [
        line
        for line in shown.stderr.splitlines()
        if line.split("|")[-1].strip() in ("torch", "transformers", "lightning")
    ]
    config = command("train.py", "adapter=qlora", "--cfg", "job")
    assert "kind: nf4" in config.stdout


@pytest.mark.slow
def test_a_dead_wandb_server_costs_seconds_and_no_number(tmp_path: Path) -> None:
    began = time.monotonic()
    done = command(
        "train.py",
        *[o for o in QUICK if o != "logger=none"],
        "logger.mode=online",
        "run_name=dead",
        f"output_root={tmp_path}",
        WANDB_MODE="online",
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="0123456789abcdef0123456789abcdef01234567",
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 240  # W&B itself would try for much longer
    assert "so this run is recorded offline" in done.stdout
    run = RunDir(tmp_path / "sft" / "dead")
    assert [r["step"] for r in lines(run.metrics) if "train/loss" in r] == [1, 2, 3]
    assert list(run.path.glob("wandb/offline-run-*/run-*.wandb"))
