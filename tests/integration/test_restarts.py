"""A multirun started again after its launcher was killed: what its jobs did meanwhile, here and in a queue, is not lost or done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lmlab.journal import RunDir, read_json

from .conftest import TINY, begun, command, lines, rows_of, running, trained, wait_for

pytestmark = pytest.mark.slow
SIXTY = ("trainer.max_steps=60", "trainer.val_every_n_steps=60")


def told_of(root: Path, *more: str) -> list[str]:
    return ["train.py", "-m", *TINY, "logger=none", f"output_root={root}", "run_name=again", *more]


def worker_of(run: RunDir) -> psutil.Process:
    """The process that writes the run."""
    return psutil.Process(int(wait_for(lambda: read_json(run.lock).get("pid"))))


def printed(process: subprocess.Popen[str], text: str) -> str:
    """Its next line with ``text``; all that it printed instead is the error."""
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return line
    raise AssertionError(["".join(seen), process.communicate()[1]])


def steps(run: RunDir) -> list[int]:
    return [row["step"] for row in lines(run.metrics) if "train/loss" in row]


def killed_while_it_trains(
    root: Path, left_behind: list[psutil.Process], *told: str, **environment: str
) -> tuple[RunDir, psutil.Process]:
    """The job of a launcher that is killed; the job's own process is stopped, as if it were in a long step."""
    launcher = begun(*told, **environment)
    run = RunDir(root / "sweeps" / "again" / "0-run")
    wait_for(lambda: trained(run.path), of=launcher)
    worker = worker_of(run)
    left_behind.append(worker)
    worker.suspend()
    launcher.kill()
    launcher.communicate()
    return run, worker


def test_a_job_that_still_saves_is_waited_for(tmp_path: Path, left_behind: list[psutil.Process]) -> None:
    told = told_of(tmp_path, *SIXTY, "seed=1")
    run, worker = killed_while_it_trains(tmp_path, left_behind, *told)
    second = begun(*told)
    line = printed(second, "waiting for its end")
    assert f"job 0 (run) of an earlier start still runs (pid {worker.pid} on " in line
    assert [row["status"] for row in rows_of(run.path.parent)] == ["running"]
    worker.resume()  # and to its SIGTERM
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert [row["status"] for row in rows_of(run.path.parent)] == ["finished"]
    assert steps(run) == list(range(1, 61))


SLURM = {
    "sbatch": """id=$((77 + $(ls {folder} | grep -c started)))
touch {folder}/started-$id
SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
  setsid sh -c "bash '$1'; touch {folder}/ended-$id" > {folder}/said-$id 2>&1 < /dev/null &
echo Submitted batch job $id""",
    "srun": """while [ "$1" != "{python}" ]; do shift; done
exec "$@\"""",
    "sacct": """echo 'JobID|State|NodeList'
for file in $(ls {folder} | grep started); do
  id=${{file#started-}}
  if [ -e {folder}/ended-$id ]; then echo "$id|COMPLETED|here"; else echo "$id|RUNNING|here"; fi
done""",
    "scancel": "exit 0",
}
"""A queue of one machine that begins everything at once; submitit takes it for SLURM."""


def queue(folder: Path) -> dict[str, str]:
    """Environment in which there is a queue."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for name, text in SLURM.items():
        script = text.format(folder=folder, python=sys.executable)
        (tools / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


def test_a_job_in_the_queue_goes_on_and_is_taken_up_again(
    tmp_path: Path, left_behind: list[psutil.Process]
) -> None:
    """It does not hang on its launcher: the second start asks for none, and waits for this one."""
    slurm = queue(tmp_path / "queue")
    told = told_of(tmp_path, *SIXTY, "seed=1", "launcher=slurm")
    run, worker = killed_while_it_trains(tmp_path, left_behind, *told, **slurm)
    second = begun(*told, **slurm)
    assert "run: running" in printed(second, "[1/1]")
    worker.resume()
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert [row["status"] for row in rows_of(run.path.parent)] == ["finished"]
    assert steps(run) == list(range(1, 61)), "not stopped in between"
    assert read_json(run.summary)["steps"] == 60
    assert sorted(file.name for file in (tmp_path / "queue").glob("started-*")) == ["started-77"]
    assert not running([worker])


def test_a_trial_that_finished_unseen_is_told_and_not_trained_again(tmp_path: Path) -> None:
    """Its launcher is killed between the run's end and the run's row."""
    import optuna

    told = told_of(tmp_path, "trainer.max_steps=3", "trainer.val_every_n_steps=3", "adapter.rank=choice(2,4)")
    told += ["hparams_search=optuna", "hparams_search.n_trials=1", "hparams_search.sampler=random"]
    launcher = begun(*told)
    root = tmp_path / "sweeps" / "again"
    (folder,) = wait_for(lambda: [run for run in root.glob("0-*") if trained(run)], of=launcher)
    launcher.send_signal(signal.SIGSTOP)
    run = RunDir(folder)
    wait_for(lambda: read_json(run.summary).get("status") == "finished" and not run.lock.exists())
    launcher.kill()
    launcher.communicate()
    assert [row["status"] for row in rows_of(root)] == ["running"]
    summary, console = run.summary.stat().st_mtime_ns, (folder / "console.log").read_bytes()
    second = command(*told)
    assert second.returncode == 0, second.stderr
    (row,) = rows_of(root)
    assert (row["status"], row["exit_code"]) == ("finished", "0")
    assert float(row["seconds"]) > 0
    assert run.summary.stat().st_mtime_ns == summary
    assert (folder / "console.log").read_bytes() == console
    (trial,) = optuna.load_study(study_name="again", storage=f"sqlite:///{root / 'study.db'}").trials
    assert (trial.state.name, trial.value) == ("COMPLETE", read_json(run.summary)["best/val_loss"])


def test_nobody_reads_the_sweep_s_output_any_more(tmp_path: Path) -> None:
    """`python train.py -m ... | head -1`: all jobs run, without a word about the pipe."""
    sweep = begun(*told_of(tmp_path, "trainer.max_steps=1", "seed=1,2"))
    assert sweep.stdout is not None
    assert sweep.stdout.readline()
    sweep.stdout.close()
    assert sweep.stderr is not None
    errors = sweep.stderr.read()
    assert sweep.wait(timeout=300) == 0, errors
    assert errors == ""
    root = tmp_path / "sweeps" / "again"
    assert [row["status"] for row in rows_of(root)] == ["finished", "finished"]
    assert (root / "report.html").is_file()
