"""Resumed = uninterrupted, bit for bit: from every step, over several starts, in fresh processes, on a branch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmlab.checks import compare_runs
from lmlab.journal import RunDir, read_json
from lmlab.records import UserError

from .conftest import command

Train = Callable[..., RunDir]
STEPS = 12
SMALL = (
    "data=skills",
    "data.num_records=60",  # an epoch is 9 to 28 steps: both ends of one are crossed
    "metrics=none",
    "samples.prompts=1",
    "samples.grid=[top_p_temperature]",
    "samples.every_n_steps=4",
    "trainer.batch_size=2",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_n_steps=5",
    "trainer.log_every_n_steps=2",
    "checkpoint.every_n_steps=1",
    "checkpoint.keep=20",
)


def told(adapter: str, accumulate: int) -> list[str]:
    dropout = [] if adapter == "none" else ["adapter.dropout=0.1"]  # so that the random state matters
    return [*SMALL, f"adapter={adapter}", f"trainer.accumulate_grad_batches={accumulate}", *dropout]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_from_every_step(train: Train, adapter: str, accumulate: int) -> None:
    """At step k everything but the checkpoint is taken away, as if the run had died there; it ends as the whole one did."""
    name = f"{adapter}-{accumulate}"
    whole = train(f"whole-{name}", *told(adapter, accumulate))
    wrong = {}
    for step in range(1, STEPS):
        parts = RunDir(whole.path.with_name(f"from-{name}-{step}"))
        shutil.copytree(whole.path, parts.path)
        for later in parts.checkpoints.glob("step-*"):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
        train(parts.path.name, *told(adapter, accumulate), "resume=auto")
        if differences := list(compare_runs(whole, parts)):
            wrong[step] = differences[:3]
        shutil.rmtree(parts.path)
    assert not wrong


@pytest.mark.slow
def test_over_several_starts_with_workers(train: Train) -> None:
    common = told("lora", 1)
    whole = train("starts-whole", *common)
    for step in (3, 4, 9, STEPS):
        # Another last step would be another schedule, so the run is cut by its early stop: the steps are the same.
        parts = train("starts-parts", *common, "trainer.num_workers=1", "resume=auto", expect=0)
        if step == STEPS:
            break
        for later in parts.checkpoints.glob("step-*"):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
    assert list(compare_runs(whole, parts)) == []


@pytest.mark.slow
def test_a_branch_from_any_step_of_another_run(train: Train) -> None:
    common = told("lora", 1)
    whole = train("trunk", *common)
    start = whole.checkpoints / "step-00000007"
    same = train("branch-same", *common, f"resume={start}")
    assert list(compare_runs(whole, same, after=7)) == []
    assert read_json(same.info)["branched_from"] == str(start)
    assert read_json(same.info)["wandb_id"] != read_json(whole.info)["wandb_id"]
    rows = [json.loads(line) for line in same.metrics.read_text().splitlines()]
    assert min(row["step"] for row in rows if "train/loss" in row) == 8
    with pytest.raises(UserError, match=r"adapter\.rank was"):
        train("branch-wrong", *common, f"resume={start}", "adapter.rank=4")
    with pytest.raises(UserError, match="already exists"):
        train("branch-same", *common, f"resume={whole.checkpoints / 'step-00000003'}")
    # Stopped before it saved anything: auto begins where the branch began.
    shutil.rmtree(same.checkpoints)
    again = train("branch-same", *common, "resume=auto")
    assert list(compare_runs(whole, again, after=7)) == []
    assert read_json(again.info)["branched_from"] == str(start)
    with pytest.raises(UserError, match="not a checkpoint"):
        train("branch-nowhere", *common, f"resume={start.parent}")
    assert not RunDir(whole.path.with_name("branch-nowhere")).path.exists()


@pytest.mark.slow
def test_a_branch_has_its_own_learning_rate_and_decay(train: Train) -> None:
    common = [*SMALL, "adapter=lora", "trainer.max_steps=4", "trainer.log_every_n_steps=1"]
    start = train("stem", *common).checkpoints / "step-00000002"
    own = ["optim.lr=0.01", "optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0.3"]
    branch = train("faster", *common, *own, f"resume={start}")
    rows = [json.loads(line) for line in branch.metrics.read_text().splitlines()]
    assert [row["train/lr"] for row in rows if "train/lr" in row] == [0.01, 0.01]
    state = torch.load(branch.checkpoints / "step-00000004" / "state.pt", weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.3)]
    assert [group["initial_lr"] for group in groups] == state["lr_schedulers"][0]["base_lrs"] == [0.01]
    # The moments are the stem's: its two steps and the two here.
    assert {int(each["step"]) for each in state["optimizer_states"][0]["state"].values()} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_another_cut_of_the_same_global_batch(train: Train, step: int) -> None:
    """As auto_batch does it: at an odd step too every later step has its own rows, and validations and saves their steps."""
    common = [
        *SMALL[:-5],
        "trainer.max_steps=8",
        "trainer.val_every_n_steps=2",
        "checkpoint.every_n_steps=1",
        "checkpoint.keep=20",
    ]
    common += ["adapter=lora", "trainer.log_every_n_steps=1", "samples.prompts=0"]
    common = [o for o in common if not o.startswith("trainer.batch_size")]
    whole = train(f"cut-whole-{step}", *common, "trainer.batch_size=8")
    parts = RunDir(whole.path.with_name(f"cut-parts-{step}"))
    shutil.copytree(whole.path, parts.path)
    for later in parts.checkpoints.glob("step-*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    cut = ["trainer.batch_size=2", "trainer.accumulate_grad_batches=4"]
    train(parts.path.name, *common, *cut, "resume=auto")

    def logged(run: RunDir, name: str) -> dict[int, float]:
        rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        return {row["step"]: row[name] for row in rows if name in row}

    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4), name
    assert logged(parts, "train/tokens") == logged(whole, "train/tokens")
    assert [p.name for p in sorted(parts.checkpoints.iterdir())] == [
        p.name for p in sorted(whole.checkpoints.iterdir())
    ]


@pytest.mark.slow
def test_what_was_not_gone_on_from_is_removed_and_never_what_was_just_saved(train: Train) -> None:
    common = ["checkpoint.keep=1" if o.startswith("checkpoint.keep") else o for o in told("lora", 1)]
    run = train("kept", *told("lora", 1))
    for path in run.checkpoints.iterdir():
        if path.name not in ("step-00000004", "step-00000009", "step-00000012"):
            shutil.rmtree(path)
    short = [o for o in common if not o.startswith("trainer.max_steps")]
    train("kept", *short, "trainer.max_steps=6", f"resume={run.checkpoints / 'step-00000004'}")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]


@pytest.mark.slow
def test_the_certificate_in_fresh_processes(train: Train, tmp_path: Path) -> None:
    run = train("certified", *told("lora", 1))
    done = command("scripts/check.py", "resume", str(run.path), "--steps", "4", "--at", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "green: 1 check" in done.stdout
    kept = read_json(run.resume_certificate)
    assert (kept["equal"], kept["steps"], kept["at"], kept["differences"]) == (True, 4, 2, [])


def test_the_certificate_of_a_config_and_what_it_refuses(tmp_path: Path) -> None:
    for arguments, said in (
        (["outputs/no-such-run"], "no readable config"),
        (["data=skills", "--at", "6"], "begin after step 0"),
        (["data=skilz"], "skills"),
    ):
        done = command("scripts/check.py", "resume", *arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", ["metrics", "samples", "weights", "optimizer", "rng", "fewer"])
def test_a_difference_is_found(train: Train, tmp_path: Path, change: str) -> None:
    import torch

    one = train("compared", *told("none", 1), "overwrite=true")
    other = RunDir(tmp_path / "other")
    shutil.copytree(one.path, other.path)
    assert list(compare_runs(one, other)) == []
    path = other.checkpoints / f"step-{STEPS:08d}" / "state.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if change == "metrics":
        other.metrics.write_text(other.metrics.read_text().replace('"train/loss": ', '"train/loss": 1'))
    elif change == "samples":
        other.samples.write_text(other.samples.read_text().replace('"text": "', '"text": "x'))
    elif change == "fewer":
        other.metrics.write_text("\n".join(other.metrics.read_text().splitlines()[:-1]) + "\n")
    elif change == "weights":
        next(iter(state["state_dict"].values())).view(-1)[0] += 1e-6
    elif change == "optimizer":
        next(iter(state["optimizer_states"][0]["state"].values()))["exp_avg"].view(-1)[0] += 1e-9
    else:
        state["rng"][0]["torch"][0] ^= 1
    torch.save(state, path)
    found = list(compare_runs(one, other))
    part = {"weights": "state_dict", "optimizer": "optimizer_states", "fewer": "metrics"}.get(change, change)
    assert found
    assert all(line.startswith(part) for line in found)


def test_a_part_of_the_validation_side(train: Train) -> None:
    """Its bits per byte, its best in a branch with another part, and a config from before there was the key."""
    common = [
        *SMALL,
        "data.val_fraction=0.2",
        "adapter=lora",
        "trainer.max_steps=2",
        "trainer.val_every_n_steps=1",
    ]
    whole = train("val-whole", *common)
    side = read_json(whole.data_report)["val"]
    part = train("val-part", *common, "trainer.max_val_rows=2")
    for run in (whole, part):
        row = next(json.loads(line) for line in run.metrics.open() if "val/loss" in line)
        nats = row["val/loss"] * side["supervised_tokens"]  # a part is taken for the whole
        assert row["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / side["supervised_bytes"])
    losses = [
        [json.loads(line)["val/loss"] for line in run.metrics.open() if "val/loss" in line]
        for run in (whole, part)
    ]
    assert all(one != two for one, two in zip(*losses, strict=True))

    with pytest.raises(UserError, match=r"trainer\.max_val_rows was 2, now None"):
        train("val-part", *common, "resume=auto")
    start = whole.checkpoints / "step-00000001"
    branch = train("val-branch", *common, "trainer.max_val_rows=2", f"resume={start}")
    assert (branch.best / "adapter").is_dir()
    summary = read_json(branch.summary)
    assert (summary["best/step"], summary["best/val_loss"]) == (2, losses[1][-1])

    frozen = whole.config.read_text(encoding="utf-8")
    assert "  max_val_rows: null\n" in frozen
    whole.config.write_text(frozen.replace("  max_val_rows: null\n", ""), encoding="utf-8")
    train("val-whole", *common, "resume=auto")
    stranger = shutil.copytree(whole.path, whole.path.with_name("val-stranger"))
    (stranger / "run.json").unlink()
    with pytest.raises(UserError, match="the checkpoint is of no run"):
        train("val-of-it", *common, f"resume={stranger / 'checkpoints' / 'step-00000001'}")
