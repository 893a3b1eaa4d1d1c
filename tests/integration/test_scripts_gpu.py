"""On a CUDA device: a run over nf4, and all that is made of it afterwards, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHORT = [
    "logger=none",
    "metrics=none",
    "trainer.max_steps=12",
    "trainer.val_every_n_steps=12",
    "samples.prompts=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    told = ["adapter=qlora", "quant=nf4", *SHORT, f"output_root={root}", "run_name=run"]
    done = command("train.py", *told)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return root / "sft" / "run"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("The mill stands by the river, and its wheel turns slowly.\n" * 40, encoding="utf-8")
    return file


def test_forms_of_the_run_are_evaluated_side_by_side(run: Path, texts: Path) -> None:
    forms = "base,adapter,merged,none,bf16,int8,nf4,fp4,int4"
    done = command("scripts/evaluate.py", str(run), "--data", str(texts), "--compare", forms, "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = json.loads(done.stdout)
    found = {row["form"]: figures["perplexity"] for row in rows for figures in row["data"].values()}
    assert len(found) == len(forms.split(","))
    assert all(1 < perplexity < 1e4 for perplexity in found.values()), found
    assert found["merged"] == pytest.approx(found["adapter"], rel=1e-2)  # bf16 products, rounded elsewhere


def test_an_export_is_certified(run: Path, tmp_path: Path) -> None:
    done = command("scripts/export.py", str(run), "--to", str(tmp_path / "export"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert command("scripts/export.py", "--verify", str(tmp_path / "export")).returncode == 0


def test_texts_are_generated(run: Path) -> None:
    told = ["--prompt", "List the parameters.", "--sampler", "top_p", "--max-new-tokens", "24"]
    done = command("scripts/generate.py", str(run), *told)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_invariances_hold(precision: str) -> None:
    told = ["adapter=qlora", "quant=nf4", "logger=none", "metrics=none", f"trainer.precision={precision}"]
    done = command("scripts/check.py", *told, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_a_run_resumes_as_if_never_stopped(storage: str, tmp_path: Path) -> None:
    told = ["adapter=lora", f"quant={storage}", *SHORT, f"output_root={tmp_path}", "run_name=run"]
    done = command("scripts/check.py", "resume", *told)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "resume" in done.stdout
