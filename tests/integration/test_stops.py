"""Runs of two ranks that end early: a parent that is killed, one rank that fails, a signal where no step is."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmlab.journal import RunDir, read_json
from lmlab.training.checkpoint import newest_checkpoint

from .conftest import QUICK, command, running, started, wait_for
from .test_nodes import prepared, tasks_of_srun

pytestmark = pytest.mark.slow
PLUGIN = """
import os
import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback

from lmlab.records import UserError
from lmlab.registry import callbacks
from lmlab.training.options import CallbackConfig

RANK = os.environ.get("RANK")


class Fails(Callback):
    def on_train_batch_end(self, *told):
        if RANK == "1":
            raise UserError("rank 1 does not see its card", where="rank 1", fix="give it one")


class Waits(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_validation_batch_start(self, *told):
        (self.folder / f"validates-{RANK}").touch()
        time.sleep(1000)


@callbacks.register
class Trouble(CallbackConfig):
    kind: Literal["trouble"]
    folder: str | None

    def build(self) -> Any:
        return Fails() if self.folder is None else Waits(self.folder)
"""


@pytest.fixture
def trouble(tmp_path: Path) -> dict[str, Any]:
    """Environment in which the plugin `outside_trouble` is found."""
    (tmp_path / "outside_trouble.py").write_text(PLUGIN, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def with_trouble(folder: Path | None) -> list[str]:
    given = "null" if folder is None else f"'{folder}'"
    return ["plugins=[outside_trouble]", f"+callbacks.mine={{kind: trouble, folder: {given}}}"]


def test_ranks_do_not_outlive_a_parent_that_is_killed(
    tmp_path: Path, left_behind: list[psutil.Process]
) -> None:
    process, run = started(tmp_path, "trainer.devices=2")
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "RANK" in p.environ()]
    left_behind += ranks
    assert sorted(rank.environ()["RANK"] for rank in ranks) == ["0", "1"]
    process.kill()
    process.wait()  # its pipes are the ranks' too, and would be waited for as long
    wait_for(lambda: not running(ranks))
    process.communicate()
    assert read_json(run.summary)["status"] == "interrupted"
    found = newest_checkpoint(run.checkpoints)
    assert found is not None
    assert int(found.name[5:]) == read_json(run.summary)["steps"], "they ended by saving"


def test_the_exit_code_is_that_of_the_rank_that_failed_first(tmp_path: Path, trouble: dict[str, Any]) -> None:
    """The other one loses the connection, or is told to stop: neither is what happened."""
    told = [*QUICK, "trainer.devices=2", *with_trouble(None), f"output_root={tmp_path}", "run_name=run"]
    done = command("train.py", *told, **trouble)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: rank 1 does not see its card (rank 1): give it one" in done.stderr
    summary = read_json(RunDir(tmp_path / "sft" / "run").summary)
    assert (summary["status"], summary["exit_code"]) == ("failed", 2)


def test_a_signal_during_the_first_validation_ends_each_rank(tmp_path: Path, trouble: dict[str, Any]) -> None:
    """One after the other, as signals come: the first must not wait in a collective for the second."""
    told = with_trouble(tmp_path)
    run = prepared(tmp_path, "validating", "trainer.num_nodes=2", *told, **trouble)
    ranks = tasks_of_srun(run, **trouble)
    try:
        for number in (0, 1):
            wait_for(lambda number=number: (tmp_path / f"validates-{number}").exists(), of=ranks[number])
        for rank in reversed(ranks):
            rank.send_signal(signal.SIGTERM)
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 143, errors
    finally:
        for rank in ranks:
            rank.kill()
    summary = read_json(run.summary)
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 143)
    assert not run.lock.exists()
