"""Real runs: the command line in a process of its own, or the same path in this process where that is enough."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmlab.journal import RunDir

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("trainer.max_steps=4", "trainer.val_every_n_steps=4", "samples.prompts=1", "samples.grid=[greedy]")
TINY = (
    "data=skills",
    "data.num_records=60",
    "metrics=none",
    "samples.prompts=0",
    "trainer.accelerator=cpu",
    "trainer.memory_plan=false",
)
QUICK = (*TINY, "trainer.max_steps=3", "trainer.val_every_n_steps=3", "logger=none")
ENDLESS = (*TINY, "trainer.max_steps=100000", "trainer.val_every_n_steps=100000")


# --- processes --------------------------------------------------------------------------------------------------------


def command(
    *arguments: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project with this Python; both streams as text."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def begun(*arguments: str, before: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """The same, started only (``before``: by what); the caller waits for it."""
    return subprocess.Popen(
        [*before, sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(
    what: Callable[[], Any], seconds: float = 300, *, of: subprocess.Popen[str] | None = None
) -> Any:
    """What ``what()`` gives as soon as it is true.

    Args:
        of: a process that must not end before.
    """
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        assert of is None or of.poll() is None, of.communicate()
        time.sleep(0.1)
    return found


def started(
    root: Path, *overrides: str, logger: str = "none", **environment: str
) -> tuple[subprocess.Popen[str], RunDir]:
    """A long run by train.py that has logged its first step."""
    told = [*ENDLESS, f"logger={logger}", *overrides, f"output_root={root}", "run_name=run"]
    process = begun("train.py", *told, **environment)
    run = RunDir(root / "sft" / "run")
    wait_for(lambda: trained(run.path), of=process)
    return process, run


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are not gone, and not merely waited for."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def left_behind() -> Iterator[list[psutil.Process]]:
    """What a test adds here is ended after it, should it still run."""
    processes: list[psutil.Process] = []
    yield processes
    for process in running(processes):
        process.kill()


# --- what they write --------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trained(folder: Path) -> bool:
    """Whether a run has logged a training step."""
    file = folder / "metrics.jsonl"
    return file.is_file() and "train/loss" in file.read_text(encoding="utf-8")


def rows_of(root: Path) -> list[dict[str, str]]:
    """results.csv of a sweep."""
    with (root / "results.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDir]:
    """``train(name, *overrides)``: a whole run in this process through compose, prepare and worker; its directory."""
    from hydra import compose, initialize_config_dir

    from lmlab.config.compose import CONF
    from lmlab.start import start

    root = tmp_path_factory.mktemp("outputs")

    def run(name: str, *overrides: str, expect: int = 0) -> RunDir:
        told = [
            f"run_name={name}",
            f"output_root={root}",
            "logger=none",
            "trainer.accelerator=cpu",
            "trainer.memory_plan=false",  # some seconds of a processor, for each configuration
            *overrides,
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", overrides=told)
        assert start(composed, told) == expect
        task = "pretrain" if "task=pretrain" in overrides else "sft"
        return RunDir(root / task / name)

    return run
