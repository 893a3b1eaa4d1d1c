"""Whole runs with each of LoRA's settings: trained, gone on with to the last bit, and loaded by PEFT alone."""

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
from transformers import AutoModelForCausalLM

from lmlab.journal import RunDir, read_json
from lmlab.load import load_for_use
from lmlab.models.build import ASSETS
from lmlab.models.merge import merged

from .conftest import SMALL, command

Train = Callable[..., RunDir]
IDS = torch.arange(5, 17)[None]
QUICK = (
    *SMALL,
    "data=skills",
    "data.num_records=60",
    "trainer.batch_size=2",
    "metrics=none",
    "optim.lr=0.01",
)
SETTINGS: dict[str, list[str]] = {
    "dora over nf4": ["adapter=qlora", "adapter.dora=true", "adapter.dropout=0.1"],
    "rslora in one layer": ["adapter.rslora=true", "adapter.layers=[-1]", "adapter.exclude_modules=[o_proj]"],
    "whole tied head": ["adapter.modules_to_save=[lm_head]"],
    "whole tied head over bf16": [
        "adapter.modules_to_save=[lm_head]",
        "quant=bf16",
        "model.gradient_checkpointing=true",
    ],
    "whole norm over int8": ["adapter.modules_to_save=[model.norm]", "quant=int8", "adapter.dora=true"],
    "added tokens in a whole matrix": [
        "adapter.modules_to_save=[embed_tokens]",
        "tokenizer.added_tokens=['<|ask|>']",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_trained_gone_on_with_and_loaded(train: Train, name: str, tmp_path: Path) -> None:
    told = [*QUICK, *SETTINGS[name], "checkpoint.every_n_steps=2", "checkpoint.keep=3"]
    run = train(name.replace(" ", "-"), *told)
    straight = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in straight.values())
    shutil.rmtree(run.checkpoints / "step-00000004")
    train(run.path.name, *told, "resume=auto")
    again = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert again.keys() == straight.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in straight.items())

    usable = load_for_use(str(run.path), accelerator="cpu")
    with torch.no_grad():
        ours = usable.model(IDS).logits
        with usable.using(None):
            assert (usable.model(IDS).logits - ours).abs().max() > 1e-3  # it learned something
        plain = merged(usable.model)(IDS).logits
    assert (plain - ours).abs().max() / ours.abs().max() < 1e-4
    if "over" not in name or "bf16" in name:  # the others need a base quantized as here
        base = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-base", dtype=torch.float32)
        base.resize_token_embeddings(len(usable.tokenizer)) if "added" in name else None
        theirs: Any = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
        with torch.no_grad():
            expected = theirs(IDS).logits
        assert (ours - expected).abs().max() / expected.abs().max() < 1e-4
    assert read_json(run.summary)["status"] == "finished"


@pytest.mark.slow
def test_two_runs_on_one_base_in_one_process(train: Train) -> None:
    """As the chat page does it: two trained adapters with rows of added tokens each, switched while text is written."""
    told = [*QUICK, "tokenizer.added_tokens=['<|ask|>']"]
    runs = [train(f"two-{seed}", *told, f"seed={seed}") for seed in (1, 2)]
    alone = [load_for_use(str(run.path), accelerator="cpu").model(IDS).logits for run in runs]
    usable = load_for_use(str(runs[0].path), accelerator="cpu", adapters={"second": str(runs[1].path)})
    assert not torch.equal(alone[0], alone[1])
    for _ in range(2):
        assert torch.equal(usable.model(IDS).logits, alone[0])
        with usable.using("second") as current:
            assert torch.equal(current.model(IDS).logits, alone[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("adapter.target_modules=[q_proj,typo]",),
            "target_modules=typo matches no layer (adapter.target_modules): its linear layers are q_proj",
        ),
        (("adapter.layers=[0,99]",), "adapter.layers has 99"),
        (("adapter.modules_to_save=[typo]",), "modules_to_save=typo matches no module"),
        (("adapter.modules_to_save=[q_proj]", "quant=int8"), "packed weights cannot be trained"),
        (
            ("trainer.strategy=fsdp", "trainer.devices=2", "adapter.dora=true"),
            "trainer.strategy=fsdp with adapter.dora",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_before_anything_is_made(overrides: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = command(
        "train.py",
        *QUICK,
        *overrides,
        "logger=none",
        "trainer.accelerator=cpu",
        f"output_root={tmp_path / 'out'}",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_config_frozen_before_these_settings_goes_on(train: Train) -> None:
    """Runs made before `adapter.dora` and its like have no such keys in their config.yaml."""
    import yaml

    told = [*QUICK, "checkpoint.every_n_steps=2", "checkpoint.keep=3"]
    run = train("older", *told)
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    for key in ("dora", "rslora", "layers", "exclude_modules", "modules_to_save", "init"):
        del config["adapter"][key]
    run.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.rmtree(run.checkpoints / "step-00000004")
    train("older", *told, "resume=auto")
    assert json.loads(run.summary.read_text(encoding="utf-8"))["status"] == "finished"
