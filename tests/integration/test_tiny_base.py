"""assets/tiny-base is what this project says it is: its training can be replayed, and it loads everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from lmlab.journal import RunDir, read_json
from lmlab.models.build import ASSETS
from tests.integration.conftest import lines

BASE = ASSETS / "tiny-base"
# The same program on the same data in fp32: only the order of sums differs between CPUs and thread counts.
RELATIVE = 1e-4


@pytest.mark.slow
@pytest.mark.parity
def test_against_its_own_record_first_20_steps(train: Callable[..., RunDir]) -> None:
    run = train(
        "tiny-base-replay",
        "experiment=tiny_base",
        "task=pretrain",
        "trainer.max_steps=20",
        "trainer.val_every_n_steps=20",
        "samples.prompts=0",
    )
    record, now = read_json(BASE / "run.json"), read_json(run.info)
    if record["versions"]["python"] != now["versions"]["python"]:
        pytest.skip(
            f"trained on the documentation of Python {record['versions']['python']}, this is another one"
        )

    def losses(rows: list[dict[str, float]]) -> list[float]:
        return [row["train/loss"] for row in rows if "train/loss" in row and row["step"] <= 20]

    expected = losses(lines(BASE / "metrics.jsonl"))
    assert len(expected) == 20
    assert losses(lines(run.metrics)) == pytest.approx(expected, rel=RELATIVE)


def test_it_is_small_and_complete() -> None:
    assert sum(f.stat().st_size for f in BASE.iterdir()) < 8e6
    names = {f.name for f in BASE.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "run.json",
        "metrics.jsonl",
        "chat_template.jinja",
    }
    assert read_json(BASE / "config.json")["eos_token_id"] == 0


def test_it_loads_with_transformers_and_has_learnt_something() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert tokenizer.eos_token_id == 0
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "hi" in str(chat)
    text = "Return a list of all the names in the current scope. If an argument is given, return the attributes of that object."
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    bits_per_byte = loss * (ids.shape[1] - 1) / torch.log(torch.tensor(2.0)).item() / len(text.encode())
    assert bits_per_byte < 2.2  # an untrained model: about 3.4
    assert json.loads((BASE / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 1600
