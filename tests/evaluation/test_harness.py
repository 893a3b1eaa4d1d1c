"""The lm-evaluation-harness over a loaded model and during training, with local task files and no network."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts.evaluate import main

from lmlab.evaluation.harness import load_suites, run_suites
from lmlab.journal import RunDir
from lmlab.load import load_for_use
from lmlab.models.build import ASSETS
from lmlab.records import UserError
from tests.evaluation.conftest import SKILLS, STEPS

pytest.importorskip("lm_eval", reason="lm-eval is absent: pip install 'lmlab[eval]'")
BASE = str(ASSETS / "tiny-base")
NAMES = ["skills_chosen", "skills_written"]


@pytest.mark.slow
@pytest.mark.parity
def test_against_lm_eval_alone(tasks: Path) -> None:
    """The harness's own way with plain transformers gives the same figures."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    usable = load_for_use(BASE, accelerator="cpu")
    loaded = load_suites(NAMES, folder=str(tasks))
    found = run_suites(usable.model, usable.tokenizer, loaded, around=usable.generator.around)
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    whole: Any = HFLM
    own_tasks: Any = NAMES
    expected: Any = simple_evaluate(
        whole(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(BASE), batch_size=4),
        tasks=own_tasks,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["skills_chosen"]["acc"] == expected["results"]["skills_chosen"]["acc,none"]
    assert found["skills_written"]["exact_match"] == expected["results"]["skills_written"]["exact_match,none"]
    assert run_suites(usable.model, usable.tokenizer, loaded, around=usable.generator.around) == found


def test_model_and_random_states_stay(adapted: RunDir, tasks: Path) -> None:
    usable = load_for_use(str(adapted.path), accelerator="cpu")
    model = usable.model.train()
    next(iter(model.children())).eval()
    flags = [module.training for module in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    padding = usable.tokenizer.pad_token

    def states() -> list[Any]:
        torchs, numpys = torch.get_rng_state().tolist(), np.random.get_state()
        return [torchs, random.getstate(), [np.asarray(part).tolist() for part in numpys]]  # type: ignore[union-attr]

    before = states()
    run_suites(
        model,
        usable.tokenizer,
        load_suites(NAMES, folder=str(tasks)),
        limit=2,
        around=usable.generator.around,
    )
    assert states() == before
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert usable.tokenizer.pad_token == padding


@pytest.mark.slow
def test_tasks_join_the_table(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [BASE, "--suite", ",".join(NAMES), "--suite-path", str(tasks), "--limit", "3"]
    assert main([*arguments, "--compare", "none,nf4", "--accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "skills_chosen acc" in out
    assert "skills_written exact_match" in out


@pytest.mark.slow
def test_during_training_and_the_loss_stays_bit_for_bit(train: Callable[..., RunDir], tasks: Path) -> None:
    harness = (
        "callbacks=harness",
        f"callbacks.harness.suites=[{','.join(NAMES)}]",
        f"callbacks.harness.suite_path={tasks}",
        "callbacks.harness.every_n_steps=2",
        "callbacks.harness.limit=2",
    )
    same = (*STEPS, *SKILLS, "metrics=none", "adapter.dropout=0.1")
    logged = []
    for name, overrides in (("with", harness), ("without", ())):
        run = train(name, *same, *overrides)
        logged.append([json.loads(line) for line in run.metrics.read_text().splitlines()])
    losses = [
        [(a["step"], a["train/loss"], a["train/grad_norm"]) for a in lines if "train/loss" in a]
        for lines in logged
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    found = {line["step"]: line for line in logged[0] if "eval/skills_chosen/acc" in line}
    assert sorted(found) == [0, 2, 4, 6]
    assert all(0 <= line["eval/skills_written/exact_match"] <= 1 for line in found.values())
    assert not any(key.startswith("eval/") for line in logged[1] for key in line)


@pytest.mark.slow
def test_an_unknown_task_names_what_is_near(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "skills_choosen", "--suite-path", str(tasks)]
    assert main([BASE, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown task 'skills_choosen' (--suite): did you mean 'skills_chosen'?")


@pytest.mark.slow
def test_a_run_with_an_unknown_task_begins_nothing(train: Callable[..., RunDir], tasks: Path) -> None:
    told = [f"callbacks.harness.suite_path={tasks}", "callbacks.harness.suites=[skills_choosen]"]
    with pytest.raises(UserError, match="did you mean 'skills_chosen'"):
        train("nothing", "callbacks=harness", *told)


def test_a_run_that_names_no_task_begins_nothing(train: Callable[..., RunDir]) -> None:
    with pytest.raises(UserError, match="no task named"):
        train("nothing", "callbacks=harness")


def test_a_task_without_its_data_is_one_line(tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "skills_chosen.yaml").read_text().replace("skills.jsonl", "gone.jsonl")
    (tmp_path / "broken.yaml").write_text(text.replace("task: skills_chosen", "task: broken"))
    with pytest.raises(UserError, match="the task cannot be loaded"):
        load_suites(["broken"], folder=str(tmp_path))


def test_no_such_folder_of_tasks() -> None:
    with pytest.raises(UserError, match="no such folder: nowhere"):
        load_suites(["x"], folder="nowhere")


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lmlab\[eval\]"):
        load_suites(["x"], folder=None)
