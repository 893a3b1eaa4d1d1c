"""Faults provoked for real in whole runs: full disks, numbers that are none, memory that runs out, SLURM's signal, kills."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmlab.journal import Journal, RunDir, read_json
from lmlab.training.checkpoint import newest_checkpoint

from .conftest import ROOT, TINY, begun, command, lines, running, started, wait_for

QUICK = (*TINY, "logger=none")
PLUGIN = """
from typing import Literal
import torch
from lmlab.models.head import LossConfig
from lmlab.registry import losses

CALLS = [0]

@losses.register
class Failing(LossConfig):
    kind: Literal["failing"]
    at: int
    how: str
    rows: int

    def total(self, logits, labels):
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        if logits.requires_grad:
            CALLS[0] += 1
            if self.how == "no_number" and CALLS[0] >= self.at:
                return loss * float("nan")
            if self.how == "inf_once" and CALLS[0] == self.at:
                return loss * float("inf")
        if self.how == "memory" and len(labels) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss
"""


@pytest.fixture
def failing(tmp_path: Path) -> dict[str, Any]:
    """Environment in which the plugin `outside_failing` is found."""
    (tmp_path / "outside_failing.py").write_text(PLUGIN, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def with_failing(how: str, *, at: int = 1, rows: int = 0) -> list[str]:
    given = {"at": at, "how": how, "rows": rows}
    return [
        "plugins=[outside_failing]",
        "loss.kind=failing",
        "~loss.label_smoothing",
        "~loss.z_loss",
        *(f"+loss.{name}={value}" for name, value in given.items()),
    ]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_stops_before_the_update(
    tmp_path: Path, failing: dict[str, Any], devices: int
) -> None:
    told = [
        *QUICK,
        *with_failing("no_number", at=4),
        f"trainer.devices={devices}",
        "checkpoint.every_n_steps=1",
    ]
    done = command("train.py", *told, f"output_root={tmp_path}", "run_name=broken", **failing)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "gradient norm" in line]
    for part in (
        "step 4",
        "records ",
        "lr ",
        "last finite loss",
        "the update was not made",
        "trainer.on_nonfinite=skip",
    ):
        assert part in line
    run = RunDir(tmp_path / "sft" / "broken")
    assert newest_checkpoint(run.checkpoints) == run.checkpoints / "step-00000003"
    assert read_json(run.summary)["status"] == "failed"


@pytest.mark.slow
def test_skipping_has_a_limit(tmp_path: Path, failing: dict[str, Any]) -> None:
    told = [*QUICK, "trainer.on_nonfinite=skip", "trainer.max_steps=8", f"output_root={tmp_path}"]
    once = command("train.py", *told, *with_failing("inf_once", at=3), "run_name=once", **failing)
    assert once.returncode == 0, once.stderr
    assert read_json(RunDir(tmp_path / "sft" / "once").summary)["skipped_steps"] == 1
    always = command(
        "train.py",
        *told,
        *with_failing("no_number", at=3),
        "trainer.max_nonfinite_steps=2",
        "run_name=always",
        **failing,
    )
    assert always.returncode == 1
    assert "step 5" in always.stderr
    assert "trainer.max_nonfinite_steps" in always.stderr


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_auto_batch_halves_until_it_fits(tmp_path: Path, failing: dict[str, Any], devices: int) -> None:
    """A GPU's own error, raised by a plugin: none is here to run out of memory."""
    told = [
        *QUICK, "trainer.max_steps=2", "trainer.batch_size=8", "trainer.val_batch_size=4", "trainer.auto_batch=true",
        f"trainer.devices={devices}", *with_failing("memory", rows=20),
    ]  # fmt: skip
    done = command("train.py", *told, f"output_root={tmp_path}", "run_name=oom", **failing)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / "sft" / "oom")
    assert "beginning again with trainer.batch_size=4 trainer.accumulate_grad_batches=2" in done.stdout
    frozen = run.config.read_text(encoding="utf-8")
    size = int(frozen.split("batch_size: ")[1].split()[0])
    times = int(frozen.split("accumulate_grad_batches: ")[1].split()[0])
    assert size < 8
    assert size * times == 8
    assert [row["step"] for row in lines(run.metrics) if "train/loss" in row] == [1, 2]
    assert not run.lock.exists()
    assert not run.out_of_memory.exists()


@pytest.mark.slow
def test_without_it_memory_is_one_line(tmp_path: Path, failing: dict[str, Any]) -> None:
    told = [*QUICK, "trainer.max_steps=2", *with_failing("memory")]
    done = command("train.py", *told, f"output_root={tmp_path}", "run_name=oom", **failing)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "out of memory" in line
    assert "Traceback" not in done.stderr


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_while_saving_costs_the_checkpoints_and_not_the_run(tmp_path: Path) -> None:
    """Files may grow to 300 KB: enough for every line, too little for a checkpoint or the weights."""

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    told = [
        *QUICK,
        "trainer.max_steps=4",
        "checkpoint.every_n_steps=2",
        f"output_root={tmp_path}",
        "run_name=full",
    ]
    environment = {**os.environ, "LMLAB_CACHE": str(tmp_path / "cache")}
    assert (
        command("train.py", *told[:-1], "run_name=first", LMLAB_CACHE=environment["LMLAB_CACHE"]).returncode
        == 0
    )
    done = subprocess.run(
        [sys.executable, "train.py", *told], cwd=ROOT, env=environment, capture_output=True, text=True,
        preexec_fn=little_room, timeout=300,
    )  # fmt: skip
    run = RunDir(tmp_path / "sft" / "full")
    assert "the checkpoint of step 2 cannot be written" in done.stderr
    assert [row["step"] for row in lines(run.metrics) if "train/loss" in row] == [1, 2, 3, 4], (
        "the run went on"
    )
    assert done.returncode == 1
    assert "the last weights cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(run.checkpoints.glob("*"))
    strict = subprocess.run(
        [sys.executable, "train.py", *told[:-1], "run_name=strict", "checkpoint.on_error=raise"], cwd=ROOT,
        env=environment, capture_output=True, text=True, preexec_fn=little_room, timeout=300,
    )  # fmt: skip
    assert strict.returncode == 1
    assert "the checkpoint of step 2 cannot be written" in strict.stderr
    assert max(row["step"] for row in lines(RunDir(tmp_path / "sft" / "strict").metrics)) == 2


def test_lines_wait_for_room_and_none_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    book = Journal(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for step in range(60):
            limit = 700 if 5 <= step < 40 else hard if hard != resource.RLIM_INFINITY else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            book.log(step, {"train/loss": step / 7})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    book.close()
    assert [row["step"] for row in lines(run.metrics)] == list(range(60))
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1


# --- signals and kills ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_slurm_s_signal_saves_and_requeues(tmp_path: Path, devices: int) -> None:
    """The job's own script calls train.py with resume=auto: the same command goes on after the requeue."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    scontrol.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process, run = started(
        tmp_path, "resume=auto", f"trainer.devices={devices}", SLURM_JOB_ID="77", PATH=path
    )
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:  # as slurmstepd does; the launcher then passes it on to its ranks once more
        if each.pid == process.pid or "lmlab.worker" in " ".join(each.cmdline()):
            each.send_signal(signal.SIGUSR1)
    out, errors = process.communicate(timeout=90)
    assert process.returncode == 138, errors
    assert (tmp_path / "called").read_text().split() == ["requeue", "77"]
    assert "job 77 is requeued" in out
    summary = read_json(run.summary)
    assert summary["status"] == "interrupted"
    found = newest_checkpoint(run.checkpoints)
    assert found is not None
    assert int(found.name[5:]) == summary["steps"]


@pytest.mark.slow
def test_a_whole_run_killed_while_it_saves_goes_on(tmp_path: Path) -> None:
    """Six times kill -9 while a checkpoint is being made; every time the same command goes on, no step lost or doubled."""
    reached = 0
    for _ in range(6):
        process, run = started(tmp_path, "checkpoint.every_n_steps=1", "checkpoint.keep=2", "resume=auto")
        # The first is no loss if it is not whole.
        wait_for(partial(newest_checkpoint, run.checkpoints), of=process)
        deadline = time.monotonic() + 60
        while not list(run.checkpoints.glob(".step-*.tmp")):
            assert time.monotonic() < deadline
        process.kill()
        process.communicate()
        assert newest_checkpoint(run.checkpoints) is not None
    steps = [row["step"] for row in lines(run.metrics) if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert max(steps) > reached
    assert len(list(run.checkpoints.glob(".step-*.tmp"))) <= 1, "leftovers of earlier kills are gone"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    process, _ = started(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)  # within a second it is taken for the same one
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), errors
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_nobody_reads_the_output_any_more(tmp_path: Path) -> None:
    """`python train.py | head -1`: the run ends as it would have, without a word about the pipe."""
    told = [*QUICK, "trainer.max_steps=3", f"output_root={tmp_path}", "run_name=piped"]
    process = begun("train.py", *told)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert read_json(RunDir(tmp_path / "sft" / "piped").summary)["status"] == "finished"


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_soon(tmp_path: Path) -> None:
    process, run = started(tmp_path, "trainer.devices=2")
    ranks = psutil.Process(process.pid).children(recursive=True)
    second = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
    second.kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 15
    assert process.returncode not in (0, 2)
    assert "rank 1" in errors
    assert read_json(run.summary)["status"] == "failed"
    assert not running(ranks)


@pytest.mark.slow
def test_two_runs_of_two_ranks_at_once_do_not_share_a_port(tmp_path: Path) -> None:
    told = [*QUICK, "trainer.max_steps=2", "trainer.devices=2", f"output_root={tmp_path}"]
    runs = [begun("train.py", *told, f"run_name=run{index}") for index in range(2)]
    for process in runs:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


# --- places and data --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bare_locale_and_a_path_with_blanks_and_umlauts(tmp_path: Path) -> None:
    root = tmp_path / "\u00e4 b \u4e2d"
    root.mkdir()
    rows = [{"instruction": f"Sag {i}: \u00e9", "output": f"\u4e2d\u6587 {i}"} for i in range(60)]
    file = root / "d\u00e4ten.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    bare = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    told = ["data=jsonl", f'data.path="{file}"', "metrics=none", "trainer.accelerator=cpu", "trainer.memory_plan=false",
            "trainer.max_steps=2", "samples.prompts=2", "logger.mode=offline", f'output_root="{root}"', "run_name=run"]  # fmt: skip
    done = command("train.py", *told, **bare)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(root / "sft" / "run")
    assert "\u4e2d\u6587" in run.mask_preview.read_text(encoding="utf-8")
    assert read_json(run.summary)["status"] == "finished"


@pytest.mark.slow
def test_data_that_changed_since_is_refused_at_resume(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = ["data=jsonl", f"data.path={file}", *QUICK[2:], f"output_root={tmp_path}", "run_name=run"]
    assert command("train.py", *told, "trainer.max_steps=1").returncode == 0
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(rows[0] | {"output": "More."}) + "\n")
    done = command("train.py", *told, "trainer.max_steps=2", "resume=auto")
    assert done.returncode == 2
    assert "the data has changed" in done.stderr
