"""Jobs, their table, and what each is given of the machine."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmlab.config.schema import LocalLauncher, SlurmLauncher
from lmlab.journal import RunDir, write_json
from lmlab.sweeps.earlier import has_finished, overrides_of, read_results
from lmlab.sweeps.executors import LocalProcesses, Slurm
from lmlab.sweeps.jobs import GridPoints, Job, label_of, row_of
from lmlab.tracking.results import write_results


def test_gpus_are_shared_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real child processes that print what they were given; the names of the GPUs are made up."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-7")
    places = LocalProcesses(at_once=4)
    fake = tmp_path / "lmlab"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "worker.py").write_text(
        "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    class Devices:
        accelerator = "auto"

        def __init__(self, devices: int) -> None:
            self.devices = devices

    class Config:
        def __init__(self, devices: int) -> None:
            self.trainer = Devices(devices)

    def start(number: int, devices: int) -> Any:
        folder = tmp_path / str(number)
        folder.mkdir()
        job = Job(number, [], "", folder, run=RunDir(folder))
        return places.start(job, Config(devices))  # type: ignore[arg-type]

    def ended(handle: Any) -> None:
        deadline = time.monotonic() + 60
        while handle.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    handles = [start(0, 1), start(1, 2), start(2, 1), start(3, 2)]
    for handle in handles:
        ended(handle)
    assert [(tmp_path / str(n) / "console.log").read_text().strip() for n in range(4)] == [
        "3", "5,GPU-7", "3", "5,GPU-7",
    ]  # fmt: skip
    ended(start(4, 1))
    assert (tmp_path / "4" / "console.log").read_text().strip() == "3"  # all free again


def test_labels_and_names_are_of_what_varies() -> None:
    points = GridPoints([["a=1", "b.c=2", "d=x"], ["a=1", "b.c=3", "d=x"]])
    assert points.keys == ("b.c",)
    assert [label_of(points.next(n) or [], points.keys) for n in (0, 1)] == ["b.c=2", "b.c=3"]
    assert points.next(2) is None
    assert label_of(["a=1"], GridPoints([["a=1"]]).keys) == "run"


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    jobs = [
        Job(0, ["a=1", "b=x y"], "a=1", tmp_path / "0"),
        Job(1, [], "run", tmp_path / "1", status='refused: no, "so"\nnot'),
    ]
    write_results(tmp_path, [row_of(job) for job in jobs])
    rows = read_results(tmp_path / "results.csv")
    assert [rows[n]["status"] for n in (0, 1)] == ["waiting", 'refused: no, "so"\nnot']
    assert overrides_of(rows[0]) == ["a=1", "b=x y"]
    assert read_results(tmp_path / "none.csv") == {}


def test_the_launcher_s_options_are_checked() -> None:
    with pytest.raises(ValueError):
        LocalLauncher(kind="local", jobs=0)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """submitit's own side of a queue whose sbatch takes the script and runs nothing: no SLURM can be had here."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (
        ("srun", "exit 1"),
        ("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 77'),
        ("sacct", "printf 'JobID|State|NodeList\\n78|RUNNING|gpu1\\n79|TIMEOUT|gpu1\\n'"),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return Slurm(
        SlurmLauncher(
            kind="slurm", jobs=2, partition="gpu", account=None, time_minutes=90, cpus_per_task=4,
            memory_gb=32, parameters={"slurm_qos": "low"}, cluster="slurm",
        ),
        tmp_path / "submitit",
    )  # fmt: skip


def test_what_a_queue_is_asked_for(queue: Slurm, tmp_path: Path) -> None:
    job = Job(0, [], "", tmp_path, run=RunDir(tmp_path))
    trainer = SimpleNamespace(accelerator="gpu", devices=2, num_nodes=1)
    queue.start(job, SimpleNamespace(trainer=trainer))  # type: ignore[arg-type]
    script = (tmp_path / "script").read_text(encoding="utf-8")
    for line in (
        "partition=gpu",
        "qos=low",
        "time=90",
        "gpus-per-node=2",
        "cpus-per-task=4",
        "signal=USR2@90",
    ):
        assert f"#SBATCH --{line}" in script
    assert (tmp_path / ".submitted").read_text() == "77"


@pytest.mark.parametrize(
    ("number", "host", "kept"), [("78", "gpu1", True), ("79", "gpu1", False), ("79", None, True)]
)
def test_the_lock_of_a_job_that_the_queue_has_ended(
    queue: Slurm, tmp_path: Path, number: str, host: str | None, kept: bool
) -> None:
    """Its node cannot be asked whether the process lives; one of this machine is looked at by its number."""
    job, run = Job(0, [], "", tmp_path), RunDir(tmp_path)
    (tmp_path / ".submitted").write_text(number)
    write_json(run.lock, {"host": host or socket.gethostname(), "pid": os.getppid()})
    handle = queue.adopt(job)
    assert (handle is not None) == (number == "78")
    assert run.lock.exists() == kept


@pytest.mark.parametrize(("age", "adopted"), [(10.0, True), (86_400.0, False)])
def test_a_job_that_the_queue_has_forgotten(queue: Slurm, tmp_path: Path, age: float, adopted: bool) -> None:
    """sacct names a new one after a while, and one of last month no more: that one would be waited for for ever."""
    job, run = Job(0, [], "", tmp_path), RunDir(tmp_path)
    note = tmp_path / ".submitted"
    note.write_text("80")
    then = time.time() - age
    os.utime(note, (then, then))
    write_json(run.lock, {"host": "gpu1", "pid": 1})
    assert (queue.adopt(job) is not None) == adopted
    assert run.holder() == "pid 1 on gpu1"  # it may live: whoever waits says so, and for how long


@pytest.mark.parametrize(
    ("row", "summary", "done"),
    [
        ("running", "finished", True),
        ("interrupted", "finished", True),
        ("interrupted", "interrupted", False),
        ("failed", "finished", False),
    ],
)
def test_a_run_that_finished_after_its_launcher(tmp_path: Path, row: str, summary: str, done: bool) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("seed: 1\n", encoding="utf-8")
    write_json(run.info, {"argv": ["train.py", "seed=1"]})
    write_json(run.summary, {"status": summary})
    assert has_finished(Job(0, ["seed=1"], "", tmp_path), {"status": row}) == done
