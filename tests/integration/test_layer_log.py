"""layers.jsonl of whole runs: what is in it, that training does not notice it, that a resumed run does not repeat it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.checks import compare_runs, metric_agreement
from lmlab.journal import RunDir, read_json
from tests.integration.conftest import QUICK, command, lines

Train = Callable[..., RunDir]
STEPS = 6
SMALL = (
    "data=skills",
    "data.num_records=60",
    "metrics=none",
    "samples.prompts=0",
    "trainer.batch_size=2",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=1",
    "checkpoint.keep=20",
)
LINEARS = 7


@pytest.fixture(scope="module")
def whole(train: Train) -> RunDir:
    return train(
        "layers-lora", *SMALL, "adapter=lora", "adapter.dropout=0.1", "trainer.gradient_clip_val=0.05"
    )


def test_a_line_for_each_layer_at_each_validation(whole: RunDir) -> None:
    rows = lines(whole.layers)
    assert [row["step"] for row in rows[:: len(rows) // 3]] == [2, 4, 6]
    names = {row["layer"] for row in rows}
    assert len(names) * 3 == len(rows), "every layer once a step"
    assert len(names) % LINEARS == 0
    assert all("base_model" not in name and "lora" not in name for name in names)
    assert all(row["update_ratio"] > 0 and row["effective_rank"] >= 1 for row in rows)
    metrics = lines(whole.metrics)
    for step in (2, 4, 6):
        of_step = [row for row in rows if row["step"] == step]
        (logged,) = (row for row in metrics if row["step"] == step and "layers/update_ratio" in row)
        for name in ("update_ratio", "effective_rank"):
            mean = sum(row[name] for row in of_step) / len(of_step)
            assert logged[f"layers/{name}"] == pytest.approx(mean)
        assert logged["layers/grad_norm_max"] == max(row["grad_norm"] for row in of_step)
        # Only these layers are trained, so their norms make up the whole; before clipping, as train/grad_norm is.
        (norm,) = (
            row["train/grad_norm"] for row in metrics if row["step"] == step and "train/grad_norm" in row
        )
        assert norm > 0.05
        assert math.hypot(*(row["grad_norm"] for row in of_step)) == pytest.approx(norm, rel=1e-5)
    ratios = [row["layers/update_ratio"] for row in metrics if "layers/update_ratio" in row]
    assert ratios == sorted(ratios)
    assert read_json(whole.summary)["final/layers/update_ratio"] == ratios[-1]
    assert 'id="layers"' in whole.report.read_text(encoding="utf-8")


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_training_does_not_notice(train: Train, whole: RunDir, adapter: str) -> None:
    """Losses, gradient norms, weights, optimizer and random states are bit-equal without."""
    told = [*SMALL, f"adapter={adapter}", "trainer.gradient_clip_val=0.05"]
    told += ["adapter.dropout=0.1"] if adapter == "lora" else []
    on = whole if adapter == "lora" else train("layers-none", *told)
    off = train(f"layers-off-{adapter}", *told, "trainer.layer_stats=false")
    assert not off.layers.exists()
    assert len(lines(on.layers)) == 3 * len({row["layer"] for row in lines(on.layers)})
    found = {metric.name: metric.equal for metric in metric_agreement(on, off, after=-1)}
    assert {name for name, equal in found.items() if not equal} == {
        name for name in found if name.startswith("layers/")
    }
    assert found["train/loss"]
    others = [d for d in compare_runs(on, off) if not d.startswith(("metrics.jsonl", "layers.jsonl"))]
    assert others == []
    if adapter == "none":
        assert all(row["effective_rank"] is None and row["update_ratio"] > 0 for row in lines(on.layers))


@pytest.mark.parametrize("adapter", ["lora", pytest.param("none", marks=pytest.mark.slow)])
def test_a_resumed_run_has_each_line_once(train: Train, whole: RunDir, adapter: str) -> None:
    """Killed after step 4 had been logged and before it was saved; the weights it is measured against come from step 0."""
    told = [*SMALL, f"adapter={adapter}", "trainer.gradient_clip_val=0.05"]
    told += ["adapter.dropout=0.1"] if adapter == "lora" else []
    one = whole if adapter == "lora" else train("layers-resumed-none", *told)
    parts = RunDir(one.path.with_name(f"{one.path.name}-parts"))
    shutil.copytree(one.path, parts.path)
    for later in parts.checkpoints.glob("step-*"):
        if int(later.name[5:]) > 3:
            shutil.rmtree(later)
    train(parts.path.name, *told, "resume=auto")
    assert list(compare_runs(one, parts)) == []
    assert lines(parts.layers) == lines(one.layers)


@pytest.mark.slow
def test_two_ranks_log_it_once_and_alike(tmp_path: Path) -> None:
    told = [*QUICK, "adapter=lora", "optim=sgd", "optim.lr=1.0", f"output_root={tmp_path}"]
    one = command("train.py", *told, "run_name=one", "trainer.batch_size=4")
    two = command("train.py", *told, "run_name=two", "trainer.batch_size=2", "trainer.devices=2")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    rows = [lines(tmp_path / "sft" / name / "layers.jsonl") for name in ("one", "two")]
    assert [(row["step"], row["layer"]) for row in rows[0]] == [
        (row["step"], row["layer"]) for row in rows[1]
    ]
    for first, second in zip(*rows, strict=True):
        for name in ("update_ratio", "effective_rank", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-3), (first, second)


@pytest.mark.slow
def test_wandb_gets_the_means_and_the_pictures(tmp_path: Path) -> None:
    told = [o for o in QUICK if o != "logger=none"]
    done = command("train.py", *told, "run_name=mirrored", f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "sft" / "mirrored")
    pictures = sorted(
        path.name for path in run.path.glob("wandb/*offline-run-*/files/media/images/layers/*.png")
    )
    assert [name.split("_map")[0] for name in pictures] == ["effective_rank", "update_ratio"]
    (file,) = run.path.glob("wandb/*offline-run-*/run-*.wandb")
    shown = command("-m", "wandb", "leet", "inspect", "--json", str(file)).stdout
    for name in ("layers/update_ratio", "layers/effective_rank", "layers/grad_norm_max"):
        assert name in shown


def test_stop_after_is_the_beginning_of_the_longer_schedule(train: Train) -> None:
    common = [o for o in SMALL if not o.startswith("trainer.max_steps")]
    runs = []
    for steps in (3, 5):
        stop = ["callbacks=stop_after", f"callbacks.stop_after.steps={steps}"]
        runs.append(train(f"stopped-after-{steps}", *common, "trainer.max_steps=50", *stop))
    first, second = runs
    rates = [[row["train/lr"] for row in lines(run.metrics) if "train/lr" in row] for run in runs]
    assert [len(found) for found in rates] == [3, 5]
    assert rates[0] == rates[1][:3]
    assert max(row["step"] for row in lines(first.metrics) if "val/loss" in row) == 3
    assert {row["step"] for row in lines(first.layers)} == {2, 3}, "at the stop's own validation too"
    assert read_json(first.summary)["status"] == "finished"
    assert list(compare_runs(second, first, after=-1, upto=3)) == []
