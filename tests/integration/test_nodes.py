"""Several nodes: two network namespaces under torchrun, and SLURM by its variables; the losses are those of one machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmlab.journal import RunDir, read_json
from tests.integration.conftest import QUICK, begun, command, lines

TOLD = (*QUICK, "adapter=lora", "optim=sgd", "trainer.batch_size=2")
RELATIVE = 1e-6
SBATCH: dict[str, Any] = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
"""What a batch script sees; SLURM_NTASKS_PER_NODE is not always there, and Lightning's own guess ends without it."""


def losses(run: RunDir) -> list[float]:
    return [row[name] for row in lines(run.metrics) for name in ("train/loss", "val/loss") if name in row]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none is left behind."""
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def prepared(root: Path, name: str, *told: str, **environment: Any) -> RunDir:
    """train.py of a run of several nodes: its directory, and what to type."""
    done = command("train.py", *TOLD, *told, f"run_name={name}", f"output_root={root}", **environment)
    assert done.returncode == 0, done.stderr
    run = RunDir(root / "sft" / name)
    assert (
        f"srun --kill-on-bad-exit=1 --nodes 2 --ntasks-per-node 1 python -m lmlab.worker {run.path}"
        in done.stdout
    )
    assert re.search(r"torchrun --nnodes 2 --nproc-per-node 1 .* -m lmlab\.worker ", done.stdout)
    assert not run.lock.exists()
    assert not run.metrics.exists()
    return run


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    root = tmp_path_factory.mktemp("one")
    done = command("train.py", *TOLD, "trainer.devices=2", "run_name=one", f"output_root={root}")
    assert done.returncode == 0, done.stderr
    return RunDir(root / "sft" / "one")


# --- two nodes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes() -> Iterator[list[list[str]]]:
    """What to put before a command to run it on each of two nodes: namespaces with an address each, joined by a cable."""
    names = [f"lmlab-{os.getpid()}-{end}" for end in "ab"]
    ends = [f"v{end}{os.getpid()}"[:15] for end in "ab"]
    steps = [["ip", "netns", "add", name] for name in names]
    steps.append(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        inside = ["ip", "-n", name]
        steps += [
            ["ip", "link", "set", end, "netns", name],
            [*inside, "link", "set", end, "name", "node0"],
            [*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "node0"],
            [*inside, "link", "set", "node0", "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        if shutil.which("ip") is None:
            pytest.skip("no `ip` here, so no network namespaces")
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_under_torchrun(
    nodes: list[list[str]], one_machine: RunDir, tmp_path: Path, strategy: str
) -> None:
    run = prepared(tmp_path, "two", "trainer.num_nodes=2", f"trainer.strategy={strategy}")
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "two"]
    processes = [
        begun(
            *torchrun,
            "--local-addr",
            f"10.77.0.{number}",
            "--rdzv-conf",  # on a node of its own torchrun sees by its host's name whether it is the first
            f"is_host={int(number == 1)}",
            "-m",
            "lmlab.worker",
            str(run.path),
            before=on,
            GLOO_SOCKET_IFNAME="node0",
            OMP_NUM_THREADS="1",
        )
        for number, on in enumerate(nodes, 1)
    ]
    for code, _, errors in finish(processes):
        assert code == 0, errors
    assert read_json(run.summary)["status"] == "finished"
    assert losses(run) == pytest.approx(losses(one_machine), rel=RELATIVE)
    assert not run.lock.exists()


# --- SLURM, by its variables ------------------------------------------------------------------------------------------


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def tasks_of_srun(run: RunDir, **environment: str) -> list[subprocess.Popen[str]]:
    """As two nodes of one task each; srun's own variables, and no torchrun."""
    step = {
        **SBATCH,
        "SLURM_NNODES": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost,other",
        "MASTER_PORT": free_port(),
    }
    return [
        begun(
            "-m",
            "lmlab.worker",
            str(run.path),
            **{**step, "SLURM_PROCID": task, "SLURM_NODEID": task, **environment},
        )
        for task in ("0", "1")
    ]


@pytest.mark.slow
def test_two_tasks_of_srun(one_machine: RunDir, tmp_path: Path) -> None:
    run = prepared(tmp_path, "srun", "trainer.num_nodes=2")
    for code, _, errors in finish(tasks_of_srun(run)):
        assert code == 0, errors
    assert losses(run) == pytest.approx(losses(one_machine), rel=RELATIVE)
    assert not run.lock.exists()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_train_py_inside_a_batch_script(tmp_path: Path, devices: int, request: pytest.FixtureRequest) -> None:
    """SLURM_NTASKS=2 stands in the environment, and nobody called srun: Lightning would wait for a second task."""
    size = f"trainer.batch_size={4 // devices}"
    told = [*TOLD, size, f"trainer.devices={devices}", "run_name=batch", f"output_root={tmp_path}"]
    done = command("train.py", *told, **SBATCH)
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "sft" / "batch")
    assert read_json(run.summary)["status"] == "finished"
    if devices == 2:
        one = request.getfixturevalue("one_machine")
        assert losses(run) == pytest.approx(losses(one), rel=RELATIVE)


@pytest.mark.slow
def test_srun_with_another_number_of_tasks_is_refused(tmp_path: Path) -> None:
    run = prepared(tmp_path, "three", "trainer.num_nodes=2")
    step: dict[str, Any] = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "localhost"}
    done = command("-m", "lmlab.worker", str(run.path), **SBATCH, **step)
    assert done.returncode == 2
    assert (
        "3 ranks were started, and the run was prepared for trainer.devices=1 x trainer.num_nodes=2"
        in done.stderr
    )
