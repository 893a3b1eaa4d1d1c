"""A run from Python is the run of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmlab.config.compose import compose_config
from lmlab.records import RunFailedError, UserError
from lmlab.runs import train
from lmlab.tracking.plots import series

QUICK = (
    "data=skills",
    "data.num_records=60",
    "metrics=none",
    "samples.prompts=0",
    "trainer.accelerator=cpu",
    "trainer.memory_plan=false",
    "trainer.max_steps=3",
    "trainer.val_every_n_steps=3",
    "logger=none",
)


def test_a_config_is_composed_as_on_the_command_line() -> None:
    config = compose_config(["adapter=qlora", "optim.lr=2e-3"])
    assert (config.adapter.kind, config.quant.kind, config.optim.lr) == ("qlora", "nf4", 2e-3)
    with pytest.raises(UserError, match="did you mean"):
        compose_config(["optim.lrr=2e-3"])


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


def test_a_run_that_fails_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmlab import session

    def broken(self: session.Session) -> int:
        raise RunFailedError("the loss is gone at step 1")

    monkeypatch.setattr(session.Session, "train", broken)
    with pytest.raises(RunFailedError, match=r"the loss is gone at step 1 \(exit code 1, .*/two\)"):
        train([*QUICK, f"output_root={tmp_path}", "run_name=two"])
    assert "error: the loss is gone at step 1" in capsys.readouterr().err


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
