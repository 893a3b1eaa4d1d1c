"""The self-test of a config: green where the code is right, and red by the right name where it was broken on purpose."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from scripts.check import _sorted

from lmlab.checks import CHECKS, Bench, Outcome, Part, SkippedError, check, chosen, run_check
from lmlab.checks.callbacks import without_dropout
from lmlab.checks.compare import differences, metric_agreement
from lmlab.checks.sizes import largest
from lmlab.config.compose import CONF, to_run_config
from lmlab.journal import RunDir, read_json
from lmlab.records import RunFailedError, UserError
from tests.checks.breakages import BREAKAGES
from tests.integration.conftest import ROOT, command, train  # noqa: F401 - a fixture

IN_PROCESS = [name for name, each in CHECKS.items() if not each.trains]
SMALL = (
    "data=skills",
    "data.num_records=60",
    "metrics=none",
    "trainer.accelerator=cpu",
    "trainer.batch_size=4",
)
SMALL_TEXT = (
    "task=pretrain",
    "data.max_length=96",
    "model.config.num_hidden_layers=2",
    "tokenizer.vocab_size=512",
    "trainer.accelerator=cpu",
    "trainer.batch_size=4",
)
EXPERIMENTS = {
    "the default": (),
    "qlora": ("adapter=qlora", "quant=nf4", "data=skills", "adapter.dropout=0.1"),
    "pretrain": ("task=pretrain", "data.max_length=128"),
    "full": ("experiment=skills", "adapter=none", "trainer.accumulate_grad_batches=2"),
    "packed gpt2": ("model=gpt2_tiny", "data.packing=true", "adapter=lora", "trainer.batch_size=3"),
    "int8": ("adapter=lora", "quant=int8", "data=skills", "trainer.batch_size=1"),
}


def bench_of(folder: Path, *overrides: str) -> Bench:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["logger=none", *overrides])
    return Bench(to_run_config(composed), folder)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_of(tmp_path_factory.mktemp("bench"), *SMALL, "adapter.dropout=0.1")


def outcome(name: str, bench: Bench) -> Outcome:
    return run_check(CHECKS[name], bench)


def shown(outcome: Outcome) -> str:
    return "\n".join(outcome.lines())


# --- in this process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_PROCESS)
def test_green(adapted: Bench, name: str) -> None:
    found = outcome(name, adapted)
    assert found.status in ("equal", "within"), shown(found)
    assert all(len(line) <= 80 for line in found.lines())


@pytest.mark.parametrize("name", ["accumulation", "packing", "cache", "save_load"])
def test_red(adapted: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bench as it stands: what was built is right, and what is called on it is not."""
    module, breaks = BREAKAGES[name]
    breaks(importlib.import_module(module), monkeypatch.setattr)
    found = outcome(name, adapted)
    assert found.status == "differs", shown(found)
    assert found.parts[0].excess > 10, "hardly seen"
    assert all(len(line) <= 80 for line in found.lines())


@pytest.mark.parametrize("name", ["cache", "save_load"])
def test_no_number_is_red(adapted: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN among the logits, and not in the first that are compared."""
    right, calls = Bench.own_logits, []

    def own_logits(self: Bench, *args: Any) -> torch.Tensor:
        logits = right(self, *args)
        calls.append(logits)
        if len(calls) > 1:
            logits[0, 0] = math.nan
        return logits

    monkeypatch.setattr(Bench, "own_logits", own_logits)
    found = outcome(name, adapted)
    assert found.status == "differs", shown(found)
    assert found.parts[0].difference == math.inf


def test_red_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, breaks = BREAKAGES["lora_init"]
    breaks(importlib.import_module(module), monkeypatch.setattr)
    found = outcome("lora_init", bench_of(tmp_path, *SMALL))
    assert found.status == "differs", shown(found)


def test_an_update_of_zeros_would_hide_what_is_done_to_it(adapted: Bench) -> None:
    """So the bench has moved it: a decode that leaves the adapter out is seen."""
    zeros = [n for n, p in adapted.built.model.named_parameters() if p.requires_grad and not p.any()]
    assert not zeros
    assert any(not torch.equal(a, adapted.own_logits(adapted.built.model, document))
               for a, document in zip(adapted.at_start.adapted, adapted.documents, strict=True))  # fmt: skip


def test_the_bench_has_no_dropout() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout, self.layer = 0.3, torch.nn.Dropout(0.5)

    model = Attention()
    assert without_dropout(model) == 0.5
    assert (model.attention_dropout, model.layer.p) == (0.0, 0.0)


def test_no_number_is_the_largest() -> None:
    nan = math.nan
    assert [largest(each) for each in ([], [0.0, 2.0, 1.0], [0.0, nan], [nan, 1.0])] == [
        0,
        2,
        math.inf,
        math.inf,
    ]


def test_a_run_that_logs_nan_agrees_with_none(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("one", "other")]
    for run, losses in zip(runs, ([1.0, 1.0, 2.0], [1.0, math.nan, 2.5]), strict=True):
        run.path.mkdir()
        rows = [json.dumps({"step": i, "train/loss": loss}) + "\n" for i, loss in enumerate(losses)]
        run.metrics.write_text("".join(rows))
    (found,) = metric_agreement(*runs, after=-1)
    assert (found.largest, found.step) == (math.inf, 1)
    (difference,) = differences(*runs, after=-1, upto=9)
    assert difference.size == math.inf


# --- the table ------------------------------------------------------------------------------------------------------


def test_a_part_is_as_good_as_its_difference() -> None:
    assert Part("a", 0.0).status == "equal"
    assert Part("a", 1e-6, 1e-5).status == "within"
    for difference, allowed in ((2e-5, 1e-5), (1e-9, 0.0), (math.nan, 1.0), (math.inf, 1.0)):
        assert Part("a", difference, allowed).status == "differs"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """Adds a check as a plugin does, runs it, and forgets it again."""

    def run(function: Callable[[Any], Any]) -> Outcome:
        check("of_a_plugin", "this = that")(function)
        (chosen_one,) = chosen(["of_a_plugin"])
        return run_check(chosen_one, None)  # type: ignore[arg-type]

    yield run
    CHECKS.pop("of_a_plugin", None)


def test_a_plugin_adds_a_check(known: Callable[..., Outcome]) -> None:
    found = known(
        lambda bench: [Part("one", 0.0), Part("two", 0.5, 0.1, "the second"), Part("three", 1.0, 2.0)]
    )
    assert (found.status, found.is_red) == ("differs", True)
    assert found.parts[0].what == "two"
    assert "the second" in shown(found)
    row = found.as_json()
    assert [part["status"] for part in row["parts"]] == ["differs", "within", "equal"]
    with pytest.raises(ValueError, match="twice"):
        check("resume", "x")(lambda bench: [])


def test_what_a_check_raises(known: Callable[..., Outcome]) -> None:
    def raising(error: Exception) -> Callable[[Any], Any]:
        def function(bench: Any) -> Any:
            raise error

        return function

    skipped = known(raising(SkippedError("no adapter")))
    assert (skipped.status, skipped.is_red, skipped.reason) == ("skipped", False, "no adapter")
    for error in (RunFailedError("it died"), RuntimeError("broken")):
        failed = known(raising(error))
        assert (failed.status, failed.is_red) == ("failed", True)
        assert str(error) in shown(failed)
    with pytest.raises(UserError):
        known(raising(UserError("wrong")))
    json.dumps(known(lambda bench: [Part("a", math.inf)]).as_json(), allow_nan=False)


def test_unknown_names_and_order() -> None:
    assert [each.name for each in chosen([])] == list(CHECKS)
    assert [each.name for each in chosen(["resume", "cache"])] == ["cache", "resume"]
    with pytest.raises(UserError, match="did you mean 'packing'"):
        chosen(["paking"])


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_directory_of_a_check_s_name_hides_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _sorted(["cache", "seed=1"]) == (["cache"], [], ["seed=1"])
    assert _sorted(["resume", "./cache"]) == (["resume"], ["./cache"], [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["paking", *SMALL], "did you mean 'packing'?"),
        (["outputs/none", "data=skills"], "give one run"),
        (["cache", "--at", "4"], "begin after step 0"),
    ],
)
def test_a_user_error_is_one_line(arguments: list[str], said: str) -> None:
    done = command("scripts/check.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("overrides", EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_green_on_experiments(overrides: tuple[str, ...]) -> None:
    done = command("scripts/check.py", "trainer.accelerator=cpu", *overrides, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.split(" ")[0] in CHECKS]
    assert [name for name, _ in rows] == list(CHECKS)
    skipped = {name for name, status in rows if status == "skipped"}
    trains_base = "adapter=none" in overrides or "task=pretrain" in overrides
    assert skipped == ({"lora_init"} if trains_base else set())
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKAGES)
def test_red_by_name_and_nothing_else(name: str) -> None:
    """All checks on a build that is broken in one place, in this process's children and in theirs."""
    path = os.pathsep.join([str(ROOT / "tests" / "checks" / "broken"), str(ROOT), str(ROOT / "src")])
    # A leak breaks the micro-batches of flat rows too; those of a text stream are no flat rows.
    overrides = SMALL_TEXT if name == "packing" else SMALL
    done = command("scripts/check.py", *overrides, timeout=900, PYTHONPATH=path, LMLAB_TEST_BREAKS=name)
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert f"red: {name} (" in done.stdout, done.stdout
    rows = dict(line.split()[:2] for line in done.stdout.splitlines() if line.split(" ")[0] in CHECKS)
    assert rows[name] == "differs"


@pytest.mark.slow
def test_a_runs_outcome_is_kept_beside_it(train: Callable[..., RunDir], tmp_path: Path) -> None:  # noqa: F811
    run = RunDir(tmp_path / "moved")
    shutil.copytree(
        train("checked", *SMALL, "trainer.max_steps=2", "trainer.val_every_n_steps=2").path, run.path
    )
    done = command("scripts/check.py", "resume", "save_load", str(run.path), "--steps", "2", "--at", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = read_json(run.path / "checks.json")
    assert (kept["green"], [row["check"] for row in kept["checks"]]) == (True, ["save_load", "resume"])
    assert read_json(run.resume_certificate)["equal"] is True
