"""Real runs compared: what they log is what the page and results.csv are made of."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.journal import RunDir

from .conftest import SMALL, command


@pytest.mark.slow
def test_real_runs_are_compared(train: Callable[..., RunDir], tmp_path: Path) -> None:
    told = ["data=skills", "data.num_records=60", "trainer.memory_plan=true", *SMALL]
    runs = [
        train(f"compared-{adapter}-{seed}", f"adapter={adapter}", f"seed={seed}", *told)
        for adapter in ("none", "lora")
        for seed in (1, 2)
    ]
    done = command("scripts/report.py", *[str(run.path) for run in runs], "--to", str(tmp_path / "there"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'there' / 'report.html'}\n"), done.stderr
    with open(tmp_path / "there" / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for run, row in zip(runs, rows, strict=True):
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        assert row["status"] == "finished"
        assert float(row["best/val_loss"]) == summary["best/val_loss"]
        assert int(row["model/params_trainable"]) == summary["model/params_trainable"]
        assert float(row["seconds"]) > 0
    page = (tmp_path / "there" / "report.html").read_text(encoding="utf-8")
    for said in (
        "4 finished; 2 groups",
        "Differences to adapter=none",
        "memory growth",
        "trained parameters",
        "seconds of training",
    ):
        assert said in page, said
    assert page.count("<svg") == 8 + 2 + 2, (
        "curves against four axes, memory of two groups, quality against memory"
    )
