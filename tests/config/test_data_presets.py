"""Presets of data sets on the hub: each reads a local directory of the same layout, fields and splits as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmlab.config.compose import CONF
from lmlab.data.chat_templates import CHAT_TEMPLATES
from lmlab.data.fields import BadRecordError
from lmlab.data.formats import FormatOptions, formats, template_source
from lmlab.data.intake import Intake

from .conftest import Compose

TALK = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
ROWS: dict[str, list[dict[str, Any]]] = {  # columns as the pages of the data sets show them
    "alpaca": [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is ..."},
        {"instruction": "Greet.", "input": "", "output": "Hi!", "text": "Below is ..."},
    ],
    "dolly": [
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "closed_qa"},
        {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"},
    ],
    "gsm8k": [{"question": "2 apples and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}],
    "metamath": [
        {
            "type": "GSM_Rephrased",
            "query": "2 and 3?",
            "original_question": "?",
            "response": "The answer is: 5",
        }
    ],
    "no_robots": [{"prompt": "Hello?", "prompt_id": "a1", "messages": TALK, "category": "Chat"}],
    "ultrachat": [{"prompt": "Hello?", "prompt_id": "a1", "messages": [*TALK, *TALK]}],
    "tulu_3": [
        {"id": "a", "messages": TALK, "source": "x"},
        {"id": "b", "messages": [TALK[0], {"role": "assistant", "content": ""}], "source": "x"},
    ],
    "openhermes": [
        {
            "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}],
            "source": "x",
            "language": None,
        }
    ],
    "wikitext": [
        {"text": ""},
        {"text": " = Robert Boulter = \n"},
        {"text": " Robert Boulter is an actor . \n"},
    ],
    "tinystories": [{"text": "One day, a little girl found a needle."}],
    "fineweb_edu": [{"text": "Plants make sugar.", "id": "<urn:uuid:1>", "url": "http://a", "score": 3.1}],
    "c4": [{"text": "A page.", "timestamp": "2019-04-25T12:57:54Z", "url": "http://a"}],
}
TRAINED = {  # of the first record that is kept
    "alpaca": "3",
    "dolly": "Ada.",
    "gsm8k": "2+3=<<2+3=5>>5\n#### 5",
    "metamath": "The answer is: 5",
    "wikitext": " = Robert Boulter = \n",
    "tinystories": "One day, a little girl found a needle.",
    "fineweb_edu": "Plants make sugar.",
    "c4": "A page.",
}
DROPPED = {"wikitext": 1, "tulu_3": 1}
PROMPTED = {
    "alpaca": ["Add.", "1 and 2"],
    "dolly": ["Who?", "Ada wrote it."],
    "gsm8k": ["2 apples"],
    "metamath": ["2 and 3?"],
}


def hub_presets() -> list[str]:
    files = (CONF / "data").glob("[!_]*.yaml")
    return sorted(
        file.stem for file in files if "defaults: [hub, _self_]" in file.read_text(encoding="utf-8")
    )


def repository(folder: Path, rows: list[dict[str, Any]], *, config_name: str | None, split: str) -> Path:
    """A data set's repository: a card that names configuration, split and files, and the files."""
    (folder / "data").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "part-0.jsonl").write_text(lines, encoding="utf-8")
    card = f"---\nconfigs:\n- config_name: {config_name or 'default'}\n  data_files:\n"
    card += f"  - split: {split}\n    path: data/part-*.jsonl\n---\n# A data set\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def chatml(turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    from jinja2 import Environment

    return (
        Environment()
        .from_string(CHAT_TEMPLATES["chatml"])
        .render(
            messages=turns, add_generation_prompt=add_generation_prompt, bos_token="", eos_token="<|im_end|>"
        )
    )


def test_every_preset_has_rows_here() -> None:
    assert hub_presets() == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_preset_reads_the_published_layout(
    run_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    asked = run_config(f"data={name}").data
    assert asked.kind == "hub"
    assert asked.name.count("/") == 1, "a hub id"
    folder = repository(tmp_path / "set", ROWS[name], config_name=asked.config_name, split=asked.split)
    data = run_config(f"data={name}", f"data.name={folder}").data
    task = "pretrain" if asked.format == "text" else "sft"
    assert data.format_for(task) == asked.format
    intake = Intake(data.on_bad_record)
    records = list(data.records(intake, task=task))
    assert len(records) == intake.read == len(ROWS[name])
    options = FormatOptions(template_source(data.template), data.columns, chatml)
    made = []
    for record in records:
        try:
            made.append(formats.get(data.format)(record, options))
        except BadRecordError as error:
            intake.bad(error.reason, where=record.where)
    assert len(made) == intake.kept == len(records) - DROPPED.get(name, 0)
    trained = "".join(segment.text for segment in made[0].segments if segment.trained)
    if data.format == "messages":
        assert trained.count("Hello.<|im_end|>") == sum(
            turn is TALK[1] for turn in ROWS[name][0].get("messages", TALK)
        )
    else:
        assert trained == TRAINED[name]
    for words in PROMPTED.get(name, []):
        assert words in (made[0].prompt or "")
