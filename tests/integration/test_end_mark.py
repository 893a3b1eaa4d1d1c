"""A model that knows its records by heart ends each answer by itself: EOS is trained, saved and obeyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lmlab.data.split import draw
from lmlab.journal import RunDir, read_json
from lmlab.records import Record
from tests.integration.conftest import command, lines

NOUNS = ("apple", "bridge", "cloud", "desk", "engine", "forest", "garden", "hammer", "island", "jacket")
QUESTIONS = ("What colour has the {}?", "Where is the {}?")
COLOURS = ("red", "blue", "green", "white", "black")
PLACES = (
    "It is here.",
    "Far away, behind the old town.",
    "In the house.\nOn the table.",
    "Nowhere",
    "There, there.",
)


def triples() -> list[dict[str, str]]:
    """21 questions (one of them will be held out); the answers have one to a dozen words, share beginnings, and some are the beginning of another."""
    answers = [COLOURS[i % 5] + (" and " + COLOURS[i // 5] if i >= 5 else "") for i in range(10)]
    answers += [PLACES[i % 5] + (" Or not." if i >= 5 else "") for i in range(10)]
    rows = [
        {"instruction": QUESTIONS[i // 10].format(NOUNS[i % 10]), "input": "", "output": answer}
        for i, answer in enumerate(answers)
    ]
    return [*rows, {"instruction": "Who is it?", "input": "", "output": "It is me."}]


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    return {"messages": turns}


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["triples", "messages"])
def test_greedy_stops_by_itself_on_each_of_20_records_learnt_by_heart(
    shape: str, train: Callable[..., RunDir], tmp_path: Path
) -> None:
    rows = triples()
    records = [row if shape == "triples" else as_messages(row) for row in rows]
    held_out = min(range(21), key=lambda i: draw(Record(records[i], where="")))
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    del rows[held_out]
    run = train(
        f"by-heart-{shape}",
        "data=jsonl",
        f"data.path={file}",
        f"data.format={shape}",
        "data.val_fraction=1e-6",  # the one record with the lowest draw
        "data.packing=true",
        "data.max_length=256",
        "adapter=none",
        "optim.lr=2e-3",
        "optim.warmup_steps=5",
        "optim.schedule=constant",
        "trainer.batch_size=8",
        "trainer.max_steps=35",
        "trainer.val_every_n_steps=35",
        "samples.prompts=0",
        "metrics=none",
    )
    assert read_json(run.data_report)["records_kept"] == 21
    losses = [row["train/loss"] for row in lines(run.metrics) if "train/loss" in row]
    assert losses[-1] < 0.05
    out = tmp_path / "texts.jsonl"
    prompts = [row["instruction"] for row in rows]
    told = ["--sampler", "greedy", "--max-new-tokens", "60", "--out", str(out)]
    if shape == "messages":  # as the run's own tokenizer opens the assistant's turn
        tokenizer: Any = AutoTokenizer.from_pretrained(run.path / "model")
        prompts = [
            tokenizer.apply_chat_template(
                as_messages(row)["messages"][:1], tokenize=False, add_generation_prompt=True
            )
            for row in rows
        ]
        told.append("--raw")
    asked = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    done = command("scripts/generate.py", str(run.path), *asked, *told)
    assert done.returncode == 0, done.stderr
    texts = lines(out)
    assert [text["stop_reason"] for text in texts] == ["eos"] * 20
    ended = "\n" if shape == "messages" else ""  # what this chat template writes after a turn's end mark
    assert [text["text"].removesuffix(ended) for text in texts] == [row["output"] for row in rows]
