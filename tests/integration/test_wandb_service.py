"""W&B as a service that is there, slow, refuses the key, goes away, or has no disk: real runs against a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lmlab.journal import RunDir, read_json
from tests.integration.conftest import ROOT, TINY, begun, command, lines, trained, wait_for
from tests.tracking.wandb_server import KEY, WandbServer, numbers

QUICK = (
    *TINY,
    "samples.prompts=1",
    "samples.grid=[greedy]",
    "trainer.max_steps=3",
    "trainer.val_every_n_steps=3",
)
REVISION = "0123456789abcdef0123456789abcdef01234567"[::-1]
PLANTED = {
    "HF_TOKEN": "hf_" + "q7" * 12,
    "MY_SECRET": "planted-in-the-environment-93",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.planted.signature",
    "FROM_DOTENV": "planted-in-the-file-57",
}


def metrics(run: RunDir) -> set[tuple[int, str, float]]:
    return numbers(lines(run.metrics), step="step")


def offline_records(folder: Path) -> list[dict[str, Any]]:
    """What the .wandb file in a run's W&B folder holds, read by W&B's own reader."""
    (file,) = folder.glob("run-*.wandb")
    shown = command("-m", "wandb", "leet", "inspect", "--json", str(file))
    return [json.loads(line) for line in shown.stdout.splitlines()]


def history(folder: Path) -> set[tuple[int, str, float]]:
    records = offline_records(folder)
    return numbers((r["history"]["item"] for r in records if r["type"] == "history"), step="trainer/step")


def folder_of(run: RunDir) -> Path:
    """The one folder that W&B made in the run's directory."""
    (folder,) = {p.parent for p in run.path.glob("wandb/**/run-*.wandb")}
    return folder


def about_wandb(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Every line of the run that is W&B's or about it."""
    told = (done.stdout + done.stderr).splitlines()
    return [line for line in told if "W&B" in line or line.startswith("wandb:")]


def train(
    folder: Path, name: str, *overrides: str, environment: Mapping[str, Any]
) -> tuple[RunDir, subprocess.CompletedProcess[str]]:
    """A tiny run in a process of its own, at home in ``folder``."""
    told = [*QUICK, f"run_name={name}", f"output_root={folder / 'out'}", *overrides]
    done = command(str(ROOT / "train.py"), *told, cwd=folder, **{"HOME": str(folder / "home"), **environment})
    return RunDir(folder / "out" / "sft" / name), done


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as there:
        yield there


@pytest.fixture(scope="module")
def online(
    server: WandbServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, subprocess.CompletedProcess[str]]:
    """A run that goes online, with secrets planted where a run could find them, and words that only look like some."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "home").mkdir()
    planted = dict(PLANTED)
    (folder / ".env").write_text(f"FROM_DOTENV={planted.pop('FROM_DOTENV')}\n", encoding="utf-8")
    told = [
        "model=pretrained",
        f"model.name_or_path={ROOT / 'assets' / 'tiny-base'}",
        f"model.revision={REVISION}",
        "tokenizer.added_tokens=['<secret>','<api_key>']",
    ]
    run, done = train(folder, "online", *told, environment=server.environment(**planted))
    assert done.returncode == 0, done.stderr
    return run, done


@pytest.mark.slow
def test_what_arrives_is_what_metrics_jsonl_has(
    server: WandbServer, online: tuple[RunDir, subprocess.CompletedProcess[str]]
) -> None:
    run, done = online
    (told,) = server.runs.values()
    assert not server.unknown
    assert metrics(run)
    assert told.numbers == metrics(run)
    assert told.exit_code == 0
    summary = read_json(run.summary)
    assert told.summary["best/val_loss"] == summary["best/val_loss"]
    assert told.summary["val/loss"] == summary["final/val/loss"]  # a number: W&B's sweeps compare it
    frozen = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    assert told.config == {name: value for name, value in frozen.items() if value != {}}
    assert told.about["jobType"] == "sft"
    assert "adapter:lora" in told.about["tags"]
    assert read_json(run.info)["wandb_id"] in server.runs
    tables = [json.loads(body) for name, body in told.uploads.items() if "samples" in name]
    assert [row[5] for row in max(tables, key=lambda t: len(t["data"]))["data"]] == [
        sample["text"] for sample in lines(run.samples)
    ]
    (line,) = about_wandb(done)
    assert line == f"W&B: {server.url}/tester/lmlab/runs/{read_json(run.info)['wandb_id']}"


@pytest.mark.slow
def test_nothing_of_the_environment_leaves_the_process(
    server: WandbServer, online: tuple[RunDir, subprocess.CompletedProcess[str]]
) -> None:
    run, done = online
    secrets = [value.encode() for value in (*PLANTED.values(), KEY)]
    home = run.path.parents[2] / "home"
    files = [p for root in (run.path.parents[1], home) for p in root.rglob("*") if p.is_file()]
    assert [p for p in files if p.suffix == ".wandb"]
    assert [p for p in files if p.name.startswith("debug")]
    found = [(p, secret) for p in files for secret in secrets if secret in p.read_bytes()]
    assert not found
    assert len(server.requests) > 10
    sent = [(r.path + "\n" + r.headers).encode() + r.body for r in server.requests]
    assert not [(body, secret) for body in sent for secret in secrets if secret in body]
    assert not [secret for secret in secrets if secret.decode() in done.stdout + done.stderr]


@pytest.mark.slow
def test_what_only_looks_like_a_secret_is_left_alone(
    server: WandbServer, online: tuple[RunDir, subprocess.CompletedProcess[str]]
) -> None:
    (told,) = server.runs.values()
    assert told.config["model"]["revision"] == REVISION
    assert told.config["tokenizer"]["added_tokens"] == ["<secret>", "<api_key>"]
    commit = read_json(online[0].info)["git_commit"]
    assert commit is None or len(commit) == 40


@pytest.mark.slow
@pytest.mark.parametrize("key", ["refused", "of a wrong shape"])
def test_a_bad_key_costs_one_line(tmp_path: Path, key: str) -> None:
    with WandbServer(status=401) as server:
        environment = server.environment(**({} if key == "refused" else {"WANDB_API_KEY": "abc"}))
        run, done = train(tmp_path, "bad", "logger.init_timeout=5", environment=environment)
    assert done.returncode == 0, done.stderr
    first, last = about_wandb(done)
    assert "W&B: cannot go online (" in first
    assert first.endswith("so this run is recorded offline")
    assert "upload with `wandb sync" in last
    assert [step for step, name, _ in sorted(metrics(run)) if name == "train/loss"] == [1, 2, 3]
    assert history(folder_of(run)) == metrics(run)
    assert not [r for r in server.requests if r.path.endswith("/file_stream")]


@pytest.mark.slow
@pytest.mark.parametrize("then", [None, 401], ids=["network", "key"])
def test_lost_midway_everything_is_on_disk_and_can_be_synced(tmp_path: Path, then: int | None) -> None:
    with WandbServer(after=1, then=then) as server:
        run, done = train(tmp_path, "lost", "logger.finish_timeout=6", environment=server.environment())
        assert server.lost if then is None else server.status == 401
    assert done.returncode == 0, done.stderr
    waited = run.report.stat().st_mtime - run.summary.stat().st_mtime  # written after W&B's end and before it
    assert waited < 6 + 60  # the report takes its time too; W&B itself would try for days
    assert read_json(run.summary)["status"] == "finished"
    assert [step for step, name, _ in sorted(metrics(run)) if name == "train/loss"] == [1, 2, 3]
    (line,) = about_wandb(done)
    folder = folder_of(run)
    assert line.endswith(f"has not got everything: upload the rest with `wandb sync --include-online {os.path.relpath(folder, tmp_path)}`")  # fmt: skip
    assert history(folder) == metrics(run)
    with WandbServer() as other:
        synced = command(
            "-m", "wandb", "sync", "--include-online", str(folder), cwd=tmp_path, **other.environment()
        )
        assert synced.returncode == 0, synced.stderr
        (told,) = other.runs.values()
        assert told.numbers == metrics(run)
        assert told.exit_code == 0


@pytest.mark.slow
def test_a_service_that_comes_back_has_everything(tmp_path: Path) -> None:
    with WandbServer(after=1, then=503) as server:
        mender = threading.Thread(target=server.mend, kwargs={"seconds": 4}, daemon=True)
        mender.start()
        run, done = train(tmp_path, "back", "logger.finish_timeout=120", environment=server.environment())
        assert done.returncode == 0, done.stderr
        assert not mender.is_alive()
        (told,) = server.runs.values()
        assert told.numbers == metrics(run)
        assert told.exit_code == 0
        (line,) = about_wandb(done)
        assert line.startswith(f"W&B: {server.url}/")
        assert "wandb sync" not in line


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_own_wandb_run(tmp_path: Path) -> None:
    with WandbServer() as server:
        run, first = train(tmp_path, "twice", environment=server.environment())
        assert first.returncode == 0, first.stderr
        told = ("resume=auto", "trainer.max_steps=6")
        _, second = train(tmp_path, "twice", *told, environment=server.environment())
        assert second.returncode == 0, second.stderr
        (mirrored,) = server.runs.values()
    trained = {(step, value) for step, name, value in metrics(run) if name == "train/loss"}
    assert {step for step, _ in trained} == set(range(1, 7))
    assert {(step, value) for step, name, value in mirrored.numbers if name == "train/loss"} == trained


@pytest.mark.slow
def test_a_slow_service_gets_everything(tmp_path: Path) -> None:
    with WandbServer(delay=0.5) as server:
        run, done = train(tmp_path, "slow", environment=server.environment())
        assert done.returncode == 0, done.stderr
        (told,) = server.runs.values()
        assert told.numbers == metrics(run)
        assert told.exit_code == 0


@pytest.mark.slow
def test_the_service_process_killed_midway_costs_one_line(tmp_path: Path) -> None:
    told = [*QUICK, "trainer.max_steps=400", "trainer.val_every_n_steps=400", "trainer.batch_size=1"]
    told += ["run_name=killed", f"output_root={tmp_path}", "logger.mode=offline"]
    process, run = begun("train.py", *told), RunDir(tmp_path / "sft" / "killed")
    wait_for(lambda: trained(run.path), of=process)
    (core,) = [p for p in psutil.Process(process.pid).children(recursive=True) if "wandb-core" in p.name()]
    core.kill()
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    steps = [step for step, name, _ in metrics(run) if name == "train/loss"]
    assert max(steps) == 400
    assert len([line for line in out.splitlines() if "stopped mirroring" in line]) == 1
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_parents_service_process_is_left_to_the_parent(tmp_path: Path) -> None:
    """As in a notebook that uses W&B and starts train.py; here that service is gone already."""
    inherited = {"WANDB_SERVICE": f"3-1-unix-{tmp_path / 'gone'}"}
    run, done = train(tmp_path, "child", "logger.mode=offline", environment=inherited)
    assert done.returncode == 0, done.stderr
    assert history(folder_of(run)) == metrics(run)


MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh")


def mounts_work(folder: Path) -> bool:
    """Whether a process of its own may mount a small file system for itself."""
    try:
        return subprocess.run([*NAMESPACE, "64k", str(folder), "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "200k"])
def test_a_full_disk_for_wandb_alone_costs_no_number(tmp_path: Path, size: str) -> None:
    """W&B's folder of a run that is gone on with is a file system of its own, too small for it from the start or later."""
    if not mounts_work(tmp_path):
        pytest.skip("no mount namespaces here")
    told = [str(ROOT / "train.py"), *QUICK, "run_name=full", f"output_root={tmp_path}"]
    first = command(*told, "logger=none")
    assert first.returncode == 0, first.stderr
    run = RunDir(tmp_path / "sft" / "full")
    (run.path / "wandb").mkdir()
    again = [*told, "resume=auto", "trainer.max_steps=60", "logger.mode=offline"]
    done = subprocess.run(
        [*NAMESPACE, size, str(run.path / "wandb"), sys.executable, *again],
        cwd=tmp_path,
        env=os.environ.copy(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert read_json(run.summary)["status"] == "finished"
    assert {step for step, name, _ in metrics(run) if name == "train/loss"} == set(range(1, 61))
    assert "Traceback" not in done.stderr
    (line,) = [line for line in about_wandb(done) if "metrics.jsonl" in line]
    assert "No space left on device" in line
