"""The corpus over Ray actors: the bytes of the local run, killed workers, errors, and processes that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fsspec.registry import _registry

from lmlab.data.corpus import build_corpus
from lmlab.data.crew import Tick
from lmlab.data.files import find_files
from lmlab.data.ray_crew import RayCrew
from lmlab.data.store import FolderStore, ObjectStore, StorageProbe
from lmlab.records import RunFailedError, UserError
from lmlab.remote import Remote
from tests.data.test_corpus import OPTIONS, ByteEncoder, contents
from tests.object_store import free_port

PROGRESS = lambda stage, done, total: None  # noqa: E731


def no_probe() -> None:
    """A worker of this machine has nothing to show."""


def square(job: int, tool: int, tick: Tick) -> int:
    tick(10)
    return job * job + tool


def die_once(job: Path, tool: object, tick: Tick) -> str:
    """The first to come dies as for lack of memory."""
    try:
        job.touch(exist_ok=False)
    except FileExistsError:
        return "done again"
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die(job: int, tool: object, tick: Tick) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(job: int, tool: object, tick: Tick) -> int:
    if job >= 2:
        raise UserError("bad", where=f"file:{job}", fix="mend it")
    return job


def ray_processes() -> list[str]:
    """Command lines of what Ray has left running below this process."""
    found = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return [line for line in found if "ray" in line]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lmlab.data.documents.SMALLEST_UNIT", 100)
    draw = np.random.default_rng(0)
    lines = [f'{{"text": "row {n} {"né " * int(draw.integers(1, 40))}"}}\n' for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


def build(source: Path, folder: Path, **told: Any) -> None:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    build_corpus(
        find_files(str(source)),
        folder,
        ByteEncoder(),
        OPTIONS,
        tokenizer_hash="bytes",
        save_tokenizer=save,
        **told,
    )


def on_ray(
    encoder: Any, workers: int, progress: Any, probe: StorageProbe, *, address: str = "local"
) -> RayCrew:
    return RayCrew(encoder, workers, progress, address=address, probe=probe, cpus=2)


@pytest.mark.slow
def test_the_bytes_are_those_of_the_local_run_and_errors_name_the_line(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    build(source, tmp_path / "local", workers=1)
    told: list[int] = []
    build(
        source,
        tmp_path / "ray",
        workers=99,
        team=on_ray,
        progress=lambda stage, done, total: told.append(done),
    )
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert told[-1] == source.stat().st_size
    assert signal.getsignal(signal.SIGTERM) is before
    with source.open("a", encoding="utf-8") as file:
        file.write('bad\n{"text": "later"}\n' * 5)
    with pytest.raises(UserError, match="broken JSON") as local:
        build(source, tmp_path / "a", workers=1)
    with pytest.raises(UserError) as ray:
        build(source, tmp_path / "b", workers=2, team=on_ray)
    assert str(ray.value) == str(local.value)
    assert f"{source}:81" in str(ray.value)
    assert not ray_processes()


@pytest.mark.slow
def test_a_killed_worker_s_job_is_done_again_and_a_deadly_job_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    with RayCrew(5, 2, PROGRESS, address="local", probe=no_probe, cpus=2) as crew:
        assert crew.workers == 2
        assert crew.run("squares", square, range(7), total=70) == [n * n + 5 for n in range(7)]
        jobs = [tmp_path / name for name in "abc"]
        assert crew.run("again", die_once, jobs, total=0) == ["done again"] * 3
        assert capsys.readouterr().err == "ray: a worker died; its unit is done again\n" * 3
        with pytest.raises(UserError, match=r"bad \(file:2\)"):
            crew.run("failing", fail, [0, 1, 2, 3, 4], total=0)
        with pytest.raises(RunFailedError, match=r"a worker of the Ray cluster died.*deadly, 3 times at one"):
            crew.run("deadly", die, [1], total=0)
    assert not ray_processes()


@pytest.mark.slow
def test_a_cluster_that_was_there_is_used_and_left(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"]
    command += [f"--port={port}", "--include-dashboard=false", "--object-store-memory=100000000"]
    log = (tmp_path / "ray.log").open("w")
    head = subprocess.Popen(
        command, stdout=log, stderr=log, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        build(source, tmp_path / "local", workers=1)
        build(source, tmp_path / "ray", workers=2, team=partial(on_ray, address=f"127.0.0.1:{port}"))
        assert contents(tmp_path / "ray") == contents(tmp_path / "local")
        assert head.poll() is None
        hidden = StorageProbe(FolderStore(tmp_path / "elsewhere"), ((str(source), 1),), "here.tmp")
        with (
            pytest.raises(UserError, match=r"a worker on \S+ sees [\d,]+ bytes of an input of 1 "),
            RayCrew(None, 1, PROGRESS, address=f"127.0.0.1:{port}", probe=hidden) as crew,
        ):
            crew.run("stage", square, [1], total=0)
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        log.close()
        assert not psutil.wait_procs(children, timeout=30)[1]


def test_what_a_node_without_the_storage_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "corpus")
    store.write("here.tmp", {})
    file = tmp_path / "a.txt"
    file.write_bytes(b"text")
    StorageProbe(store, ((str(file), 4),), "here.tmp")()
    assert [path.name for path in store.folder.iterdir()] == ["here.tmp"]
    fix = r"put the input, and --to unless it is a URL, on storage that all nodes have"
    with pytest.raises(UserError, match=rf"cannot read the input: No such file .*gone\.txt\): {fix}"):
        StorageProbe(store, ((str(tmp_path / "gone.txt"), 4),), "here.tmp")()
    with pytest.raises(UserError, match=r"does not see what is written here"):
        StorageProbe(store, (), "there.tmp")()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(
        UserError, match=r"a worker on \S+ cannot use the output: .*pip install 'lmlab\[s3\]'"
    ):
        StorageProbe(ObjectStore(Remote("s3://lab/corpus")), (), "here.tmp")()
    store.folder.rename(tmp_path / "file")
    (tmp_path / "corpus").symlink_to("/proc")  # where nobody can make a file
    with pytest.raises(UserError, match=r"cannot write the output"):
        StorageProbe(store, (), "version")()


def test_no_cluster_and_no_ray_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(UserError, match=rf"no Ray cluster at {address}: .*refused \(--ray\): start one"),
        RayCrew(None, 1, PROGRESS, address=address, probe=no_probe),
    ):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r"pip install 'lmlab\[ray\]'"),
        RayCrew(None, 1, PROGRESS, address="local", probe=no_probe),
    ):
        pass
