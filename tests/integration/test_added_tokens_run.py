"""`tokenizer.added_tokens` through a whole run: data, training, checkpoint, adapter directory, use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmlab.journal import RunDir, read_json
from lmlab.load import load_for_use
from lmlab.models.build import ASSETS
from lmlab.models.quantize import FourBit
from lmlab.records import UserError
from tests.integration.conftest import SMALL, command

RELATIVE = 1e-5  # fp32 sums in another order
TOKENS = ["<|ask|>", "<|reply|>"]
ADDED = f"tokenizer.added_tokens={json.dumps(TOKENS)}"
ROWS = 4096  # of the embedded base


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "records.jsonl"
    rows = [
        {"instruction": f"<|ask|> What is {i} plus 1? <|reply|>", "input": "", "output": str(i + 1)}
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a head of its own and the embedded base's tokenizer."""
    folder = tmp_path_factory.mktemp("untied")
    shutil.copytree(ASSETS / "tiny-base", folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    return folder


def rows_in(adapter: Path) -> dict[str, torch.Tensor]:
    stored = load_file(adapter / "adapter_model.safetensors")
    return {name: tensor for name, tensor in stored.items() if "trainable_tokens" in name}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied lora", "untied qlora"])
def test_new_rows_are_trained_resumed_saved_and_loaded(
    kind: str, train: Callable[..., RunDir], records: Path, untied: Path, tmp_path: Path
) -> None:
    is_tied = kind == "tied lora"
    source = ASSETS / "tiny-base" if is_tied else untied
    model = (
        [] if is_tied else ["model=pretrained", f"model.name_or_path={untied}", "adapter=qlora", "quant=nf4"]
    )
    told = [
        *SMALL,
        *model,
        "data=jsonl",
        f"data.path={records}",
        ADDED,
        "checkpoint.every_n_steps=2",
        "checkpoint.keep=3",
    ]
    name = kind.replace(" ", "-")
    run = train(name, *told)
    adapter = run.path / "adapter"
    rows = rows_in(adapter)
    assert [tuple(tensor.shape) for tensor in rows.values()] == [(2, 192)] * (1 if is_tied else 2)
    assert all((tensor[0] != tensor[1]).any() for tensor in rows.values())
    assert read_json(run.data_report)["records_kept"] == 60
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [ROWS, ROWS + 1]

    # PEFT alone, over the base resized to the tokenizer.
    base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    if not is_tied:
        FourBit(kind="nf4", double_quant=True).apply(base, compute_dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
    ours = load_for_use(str(run.path), accelerator="cpu").generator.model
    ids = tokenizer("<|ask|> What is 5 plus 1? <|reply|>", return_tensors="pt").input_ids
    assert {ROWS, ROWS + 1} <= set(ids[0].tolist())
    with torch.no_grad():
        expected = theirs(ids).logits
        assert ((ours(ids).logits - expected).abs().max() / expected.abs().max()).item() < RELATIVE

    # Gone on from the middle, the rows come out the same, bit by bit.
    shutil.copytree(adapter, tmp_path / "straight")
    shutil.rmtree(run.checkpoints / "step-00000004")
    train(name, *told, "resume=auto")
    again = rows_in(adapter)
    assert all(torch.equal(tensor, again[key]) for key, tensor in rows.items())


@pytest.mark.slow
def test_without_an_adapter_the_saved_model_holds_the_new_rows(
    train: Callable[..., RunDir], records: Path
) -> None:
    run = train("full", *SMALL, "adapter=none", "data=jsonl", f"data.path={records}", ADDED)
    config = AutoConfig.from_pretrained(run.path / "model")
    assert config.vocab_size == ROWS + 2
    loaded: Any = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert loaded.get_input_embeddings().weight.shape[0] == ROWS + 2
    assert load_for_use(str(run.path), accelerator="cpu") is not None


@pytest.mark.slow
def test_another_base_is_refused_before_it_is_resized(
    train: Callable[..., RunDir], records: Path, untied: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(untied, base)
    model = ("model=pretrained", f"model.name_or_path={base}")
    run = train("moved", *SMALL, *model, "data=jsonl", f"data.path={records}", ADDED)
    changed: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.5)
    changed.save_pretrained(base)
    with pytest.raises(UserError, match="trained on another base"):
        load_for_use(str(run.path), accelerator="cpu")


def test_the_prepared_data_follow_the_added_tokens(train: Callable[..., RunDir], records: Path) -> None:
    """One step each: the same records under another tokenizer are other data."""
    told = [
        "trainer.max_steps=1",
        "trainer.val_every_n_steps=1",
        "samples.prompts=0",
        "data=jsonl",
        f"data.path={records}",
    ]
    runs = [read_json(train(name, *told, *more).info) for name, more in (("with", [ADDED]), ("without", []))]
    assert runs[0]["tokenizer_hash"] != runs[1]["tokenizer_hash"]
    assert runs[0]["data_hash"] != runs[1]["data_hash"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['tokenizer.added_tokens=["<a>","<a>"]'], "repeated token in"),
        (['tokenizer.added_tokens=["<a> "]'], "bad token '<a> '"),
    ],
)
def test_bad_added_tokens_end_in_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    done = command("train.py", "data=skills", "logger=none", f"output_root={tmp_path / 'out'}", *overrides)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()
