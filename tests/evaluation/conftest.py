"""Two small real runs and task files for the lm-evaluation-harness, made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmlab.data.intake import Intake
from lmlab.journal import RunDir
from lmlab.measured import DataChoice
from tests.integration.conftest import train

__all__ = ["train"]
STEPS = ("trainer.max_steps=6", "trainer.val_every_n_steps=6", "samples.prompts=0", "optim.warmup_steps=0")
SKILLS = ("data=skills", "data.num_records=120", "data.val_fraction=0.2", "data.max_length=96")


@pytest.fixture(scope="session")
def adapted(train: Callable[..., RunDir]) -> RunDir:
    """LoRA over the tiny base on skills, scored by exact match and ROUGE."""
    return train(
        "adapted",
        *STEPS,
        *SKILLS,
        "optim.lr=0.01",
        "metrics=rouge",
        "metrics.rouge.max_examples=8",
        "metrics.rouge.max_new_tokens=8",
        "+metrics.exact_match={kind:exact_match,max_examples:8,max_new_tokens:8}",
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand characters."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Line {n}: {n * n} is the square of {n}, und die Straße heißt {n}.\n" for n in range(120)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def pretrained(train: Callable[..., RunDir], text_file: Path) -> RunDir:
    """A llama from scratch with its own tokenizer on that text."""
    return train(
        "pretrained",
        "task=pretrain",
        *STEPS,
        "data=text",
        f"data.path={text_file}",
        "data.max_length=32",
        "data.val_fraction=0.2",
        "tokenizer.vocab_size=300",
    )


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks over 12 of the embedded skills: choose the answer, write the answer."""
    folder = tmp_path_factory.mktemp("tasks")
    config = DataChoice.of("skills", settings=["data.num_records=12"], task=None, side="all").config
    assert config is not None
    records = [record.fields for record in config.records(Intake("error"), task="sft")]
    answers = [record["output"] for record in records]
    rows = [
        {
            "question": f"{record['instruction']} {record['input']}".strip(),
            "answer": record["output"],
            "choices": [record["output"], answers[(i + 1) % len(answers)] + "!"],
            "label": 0,
        }
        for i, record in enumerate(records)
    ]
    file = folder / "skills.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    (folder / "skills_chosen.yaml").write_text(
        f"task: skills_chosen\n{data}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}\\n"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    (folder / "skills_written.yaml").write_text(
        f"task: skills_written\n{data}output_type: generate_until\n"
        'doc_to_text: "{{question}}\\n"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 6\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    return folder
