"""Real runs: the command line in a process of its own, or the same path in this process where that is enough."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.journal import RunDir

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("trainer.max_steps=4", "trainer.val_every_n_steps=4", "samples.prompts=1", "samples.grid=[greedy]")


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
