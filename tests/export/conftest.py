"""Runs to export: directories as a run leaves them, with an adapter drawn over the tiny base, or a small trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.journal import RunDir, write_json
from tests.integration.conftest import train as train  # a fixture

BRIEF = (
    "### Instruction:\n{{ instruction }}\n{% if input %}### Input:\n{{ input }}\n{% endif %}### Response:\n"
)
PROMPTS = [
    f"### Instruction:\n{text}\n### Response:\n"
    for text in ("List the parameters.", "Name it.", "What is 1?")
]
MakeRun = Callable[..., RunDir]


def leave_run(
    path: Path, *overrides: str, info: dict[str, Any], adapter: dict[str, Any] | None, seed: int
) -> RunDir:
    """What training leaves: config, run.json, summary and weights (an adapter drawn at random, or the tiny base)."""
    import torch
    from hydra import compose, initialize_config_dir
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmlab.config.compose import CONF, freeze, to_run_config
    from lmlab.models.build import ASSETS, base_fingerprint

    run = RunDir(path)
    run.path.mkdir(parents=True)
    told = [f"run_name={path.name}", f"output_root={path.parent}", "logger=none", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        freeze(run, to_run_config(compose("train", overrides=told)))
    prepared = path.parent / f"prepared-{path.name}"
    prepared.mkdir()
    write_json(
        prepared / "meta.json", {"val_prompts": [{"prompt": text, "response": ""} for text in PROMPTS]}
    )
    write_json(
        run.info,
        {
            "run_name": path.name,
            "argv": ["train.py", *told],
            "seed": 1,
            "data_hash": "d78ff16770deb2c8",
            "tokenizer_hash": "a963759c82bad994",
            "prepared": str(prepared),
            "wandb_id": "0123456789ab",
            "git_commit": "0" * 40,
            "versions": {"torch": "2.13.0"},
        },
    )
    write_json(
        run.summary,
        {"status": "finished", "steps": 6, "best/step": 3, "best/val_loss": 5.2, "final/val/loss": 5.167294},
    )
    write_json(run.data_report, {"train": {"records": 7968}, "val": {"records": 559}})
    base = ASSETS / "tiny-base"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    about = {
        "task": "sft",
        "format": "triples",
        "template": BRIEF,
        "chat_template": None,
        "base": str(base.resolve()),
        "base_revision": None,
        "base_fingerprint": base_fingerprint(model) if adapter is not None else None,
        "quant": {"kind": "none"},
        "sampler": {"kind": "greedy", "max_new_tokens": 8},
        "run": path.name,
    } | info
    folder = run.path / ("model" if adapter is None else "adapter")
    generator = torch.Generator().manual_seed(seed)
    if adapter is not None:
        config = {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        } | adapter
        model = get_peft_model(model, LoraConfig(**config))
        model.peft_config["default"].base_model_name_or_path = str(base.resolve())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or (adapter is None and name.endswith("q_proj.weight")):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.save_pretrained(folder, **({} if adapter is None else {"save_embedding_layers": False}))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "lmlab.json").write_text(json.dumps(about), encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """``runs(kind)``: qlora (over nf4), lora or full; made once."""
    root = tmp_path_factory.mktemp("runs")
    made: dict[str, RunDir] = {}

    def run(kind: str) -> RunDir:
        if kind not in made:
            nf4 = {"quant": {"kind": "nf4", "double_quant": True}}
            settings: dict[str, Any] = {
                "qlora": (("adapter=qlora",), nf4, {}),
                "lora": (("adapter=lora",), {}, {}),
                "other": (("adapter=lora",), {}, {"r": 2}),
                "full": (("adapter=none",), {}, None),
            }
            overrides, info, adapter = settings[kind]
            seed = sorted(settings).index(kind)
            made[kind] = leave_run(root / kind, *overrides, info=info, adapter=adapter, seed=seed)
        return made[kind]

    return run


@pytest.fixture(scope="session")
def exported(runs: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The qlora run, exported once."""
    from lmlab.export.job import ExportJob
    from lmlab.exporting import export

    to = tmp_path_factory.mktemp("exports") / "from-qlora"
    export(ExportJob(str(runs("qlora").path)), to, say=lambda text: None)
    return to
