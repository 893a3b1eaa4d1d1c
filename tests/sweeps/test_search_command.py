"""`python train.py -m hparams_search=optuna ...` up to the jobs it asks for, which train nothing here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmlab.config.compose import CONF, run_app, to_run_config
from lmlab.records import RefusedError, UserError
from lmlab.sweeps import launcher
from lmlab.sweeps.feasible import refuse_too_large
from lmlab.sweeps.launcher import Job
from lmlab.sweeps.search import OptunaPoints

from .play import begin, bowl, end, values

optuna = pytest.importorskip("optuna", reason="pip install 'lmlab[optuna]'")

SPACE = ("optim.lr=tag(log, interval(1e-4, 1e-2))", "adapter.rank=choice(4, 8, 16)")
Search = Callable[..., tuple[int, list[Job]]]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Search:
    """``sweep(*arguments)`` -> (exit code, the jobs); each composed and checked as the launcher does, then ended."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored afterwards
    jobs: list[Job] = []

    def run_jobs(
        points: OptunaPoints,
        *,
        compose: Callable[[Sequence[str]], Any],
        root: Path,
        options: Any,
        overwrite: bool,
    ) -> int:
        while (job := begin(points, len(jobs))) is not None:
            jobs.append(job)
            try:
                config = to_run_config(compose(job.overrides))
                assert config.hparams_search.kind == "none"
            except RefusedError as error:
                end(points, job, {}, status=f"refused: {error}")
                continue
            end(points, job, bowl({"optim.lr": 1e-3, "adapter.rank": 8, **values(job.overrides)}))
        assert root == points.root
        return 0

    monkeypatch.setattr(launcher, "run_jobs", run_jobs)

    def run(*arguments: str) -> tuple[int, list[Job]]:
        jobs.clear()
        told = (*arguments, f"output_root={tmp_path}", "trainer.memory_plan=false")
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *told])
        code = run_app(lambda config, overrides: 1)
        return code, list(jobs)

    return run


def test_each_job_is_a_run_to_type_and_the_same_command_goes_on(
    sweep: Search, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("hparams_search=optuna", "hparams_search.n_trials=6", "run_name=found", *SPACE)
    code, jobs = sweep(*command)
    assert (code, len(jobs)) == (0, 6)
    for job in jobs:
        assert list(values(job.overrides)) == [
            "run_name",
            "optim.lr",
            "adapter.rank",
            "output_root",
            "trainer.memory_plan",
        ]
    root = tmp_path / "sweeps" / "found"
    (best,) = yaml.safe_load((root / "best.yaml").read_text(encoding="utf-8"))["best"]
    assert best["overrides"] in [job.overrides for job in jobs]
    said = capsys.readouterr().out
    assert "found: best trial (6 finished)" in said
    assert sweep(*command) == (0, []), "all six are there"
    code, jobs = sweep(*command, "hparams_search.n_trials=8")
    assert (code, len(jobs)) == (0, 2)
    assert not (root / ".lock").exists()


def test_an_experiment_file_may_ask_for_the_search(sweep: Search, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "tuned.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hparams_search: optuna\n"
        "hparams_search:\n  n_trials: 3\n  sampler: random\noptim:\n  warmup_steps: 7\n",
        encoding="utf-8",
    )
    code, jobs = sweep("--config-dir", str(tmp_path / "conf"), "experiment=tuned", "run_name=x", *SPACE)
    assert (code, len(jobs)) == (0, 3)
    assert all(job.overrides[-1] == "hparams_search=none" for job in jobs)
    assert (
        len(optuna.load_study(study_name="x", storage=f"sqlite:///{tmp_path}/sweeps/x/study.db").trials) == 3
    )


def test_a_point_that_cannot_train_never_starts(sweep: Search, tmp_path: Path) -> None:
    grid = ("hparams_search=optuna", "hparams_search.sampler=grid", "run_name=some")
    code, jobs = sweep(*grid, "trainer.accelerator=cpu", "quant=none,int8", "adapter=lora,none")
    assert code == 0
    ends = {tuple(job.overrides[2:4]): job.status.partition(":")[0] for job in jobs}
    assert ends == {
        ("quant=none", "adapter=lora"): "finished",
        ("quant=none", "adapter=none"): "finished",
        ("quant=int8", "adapter=lora"): "finished",
        ("quant=int8", "adapter=none"): "refused",
    }
    trial = optuna.load_study(study_name="some", storage=f"sqlite:///{tmp_path}/sweeps/some/study.db").trials[
        3
    ]
    assert trial.state.name == "PRUNED"
    assert "int8 weights cannot be trained" in trial.user_attrs["reason"]


@pytest.mark.slow
def test_the_memory_plan_prunes_what_does_not_fit(sweep: Search, tmp_path: Path) -> None:
    command = (
        "hparams_search=optuna",
        "hparams_search.sampler=grid",
        "run_name=some",
        "trainer.accelerator=cpu",
        "data=skills",
        "data.num_records=300",
        "samples.grid=[]",
        "adapter.rank=8",
        "optim.lr=0.001",
    )
    code, jobs = sweep(*command, "hparams_search.memory_limit_gb=0.15", "trainer.batch_size=2,64")
    assert code == 0
    assert [job.status.partition(":")[0] for job in jobs] == ["finished", "refused"]
    assert "0.15 GB there (memory plan)" in jobs[1].status
    small, large = optuna.load_study(
        study_name="some", storage=f"sqlite:///{tmp_path}/sweeps/some/study.db"
    ).trials
    assert (small.state.name, large.state.name) == ("COMPLETE", "PRUNED")
    assert "GB planned in" in large.user_attrs["reason"]


@pytest.mark.slow
def test_the_plan_of_the_data_themselves_decides(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    told = ["trainer=cpu", "data=skills", "data.num_records=300", "samples.grid=[]", "trainer.batch_size=16"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config, unplanned = (
            to_run_config(compose("train", [*told, f"trainer.memory_plan={on}"])) for on in ("true", "false")
        )
    refuse_too_large(config, None)
    refuse_too_large(unplanned, None)
    with pytest.raises(RefusedError, match=r"GB planned in \w+, 0\.00 GB there \(memory plan\)"):
        refuse_too_large(unplanned, 1e-3)
    refuse_too_large(
        config, 0.9 * _planned(config)
    )  # rows of skills are short: no micro-batch is as large as that


def _planned(config: Any) -> float:
    """GB if every row were full."""
    from lmlab.planning import plan_of_config

    return plan_of_config(config).made().total_gb


def test_a_name_that_another_sweep_has(sweep: Search, tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "grid"
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text("job\n", encoding="utf-8")
    assert sweep("hparams_search=optuna", "run_name=grid", *SPACE) == (2, [])
    assert not (folder / "study.db").exists()


def test_without_a_name_the_folder_has_the_time_and_the_keys(sweep: Search, tmp_path: Path) -> None:
    code, jobs = sweep("hparams_search=optuna", "hparams_search.n_trials=1", *SPACE)
    assert (code, len(jobs)) == (0, 1)
    (root,) = (tmp_path / "sweeps").iterdir()
    assert "optim.lr-adapter.rank" in root.name


def test_a_search_without_m() -> None:
    from hydra import compose, initialize_config_dir

    from lmlab.start import start

    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["hparams_search=optuna"])
    with pytest.raises(UserError, match=r"search over many runs \(hparams_search\): add -m"):
        start(composed, ["hparams_search=optuna"])


def test_without_optuna_installed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "from lmlab.config.compose import run_app\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "sys.exit(run_app(lambda config, overrides: 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "hparams_search=optuna", *SPACE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: hparams_search=optuna needs the package optuna (hparams_search): pip install 'lmlab[optuna]'"
    )
    assert list(tmp_path.iterdir()) == []
