"""A run from Python is the run of the command line."""

from __future__ import annotations

import builtins
import errno
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmlab.config.compose import compose_config
from lmlab.journal import read_json
from lmlab.records import RunFailedError, UserError
from lmlab.runs import train
from lmlab.tracking.plots import series
from tests.integration.conftest import QUICK


def test_a_config_is_composed_as_on_the_command_line() -> None:
    config = compose_config(["adapter=qlora", "optim.lr=2e-3"])
    assert (config.adapter.kind, config.quant.kind, config.optim.lr) == ("qlora", "nf4", 2e-3)
    with pytest.raises(UserError, match="did you mean"):
        compose_config(["optim.lrr=2e-3"])


def of_the_process() -> list[Any]:
    """What a run may set for all of the process, and has to give back."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    drawn = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
    return [handlers, sys.stdout, sys.stderr, *drawn]


def test_trains_and_reads_what_the_run_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train([*QUICK, f"output_root={tmp_path}", "run_name=one"], quiet=True)
    assert not capsys.readouterr().out
    assert run.directory == tmp_path / "sft" / "one"
    assert run.summary["status"] == "finished"
    assert set(series(run.metrics, "val/loss")) == {0, 3}
    assert max(row["time"] for row in run.metrics) < 300, "the log counts from the run's own start"
    assert not (run.directory / ".lock").exists()
    with pytest.raises(UserError, match="already exists"):
        train([*QUICK, f"output_root={tmp_path}", "run_name=one"])


@pytest.mark.slow
def test_leaves_the_process_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()  # what rich takes for Jupyter, where it writes to no stream
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir=my conf"])
    before = of_the_process()
    run = train([*QUICK, f"output_root={tmp_path}", "run_name=six"], quiet=True)
    assert of_the_process() == before
    assert not capsys.readouterr().out
    assert run.run["flags"] == ["--config-dir", "my conf"]
    assert "\nfinished: best val/loss" in (run.directory / "console.log").read_text(encoding="utf-8")


def test_a_run_that_fails_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmlab import session

    def broken(self: session.Session) -> int:
        os.environ["WANDB_DATA_DIR"] = str(self.run.path)
        raise RunFailedError("the loss is gone at step 1")

    monkeypatch.setattr(session.Session, "train", broken)
    with pytest.raises(RunFailedError, match=r"the loss is gone at step 1 \(exit code 1, .*/two\)"):
        train([*QUICK, f"output_root={tmp_path}", "run_name=two"])
    assert "error: the loss is gone at step 1" in capsys.readouterr().err
    assert "WANDB_DATA_DIR" not in os.environ


def test_ctrl_c_outside_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning makes exit code 1 of it, and has every further one ignored for as long as the process lives."""
    from lmlab.training.callbacks import RunLog

    def interrupted(self: RunLog, *args: Any) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(RunLog, "on_validation_start", interrupted)
    with pytest.raises(RunFailedError, match=r"stopped by Ctrl-C \(exit code 130"):
        train([*QUICK, f"output_root={tmp_path}", "run_name=three"], quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert read_json(tmp_path / "sft/three/summary.json")["status"] == "interrupted"


TWICE = """
import os, signal, sys, time
from lmlab.records import RunFailedError
from lmlab.runs import train
from lmlab.training.callbacks import RunLog

def twice(*args):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.1)  # within a second it is taken for the same one
    os.kill(os.getpid(), signal.SIGINT)

RunLog.on_train_batch_start = twice
try:
    train(sys.argv[1:], quiet=True)
except RunFailedError as error:
    print(error)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_and_not_the_notebook(tmp_path: Path) -> None:
    told = [*QUICK, f"output_root={tmp_path}", "run_name=four"]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *told], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    said, given_back = done.stdout.splitlines()
    assert said.startswith("stopped by Ctrl-C (exit code 130")
    assert given_back == "True"


def test_a_start_that_fails_gives_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmlab import start

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(start, "freeze", full)
    with pytest.raises(OSError, match="No space"):
        train([*QUICK, f"output_root={tmp_path}", "run_name=five"])
    assert (tmp_path / "sft/five/run.json").exists()
    assert not (tmp_path / "sft/five/.lock").exists()


def test_another_thread_is_refused(tmp_path: Path) -> None:
    """Signals reach the main thread alone, and only it may say what is done with them."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(train, [*QUICK, f"output_root={tmp_path}"])
        with pytest.raises(UserError, match="needs the main thread"):
            result.result()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.devices=2", "trainer.devices"),
        ("trainer.auto_batch=true", "trainer.auto_batch"),
        ("hparams_search=optuna", "hparams_search"),
    ],
)
def test_what_needs_processes_of_its_own_is_refused(override: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{key} needs processes of its own"):
        train([*QUICK, f"output_root={tmp_path}", override])
    assert not list(tmp_path.iterdir())
