"""The embedded base, and two adapters on it made by PEFT: random updates, so that each writes something else."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "tiny-base"
TEMPLATE = "### Instruction:\n{{ instruction }}\n### Response:\n"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``one`` was trained on instructions, ``two`` says nothing of its training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_pretrained(BASE)
        model = get_peft_model(
            model,
            LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
        folder = made[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(BASE)
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    about = {"format": "triples", "template": TEMPLATE, "base": str(BASE), "quant": {"kind": "none"}}
    (made["one"] / "lmlab.json").write_text(json.dumps(about), encoding="utf-8")
    return made


@pytest.fixture(scope="session")
def base() -> Any:
    """The base alone, with a chat template and no word of its training."""
    from lmlab.load import load_for_use

    return load_for_use(str(BASE), accelerator="cpu")


@pytest.fixture(scope="session")
def tuned(adapters: dict[str, Path]) -> Any:
    """The base with both adapters, ``one`` (called default) first."""
    from lmlab.load import load_for_use

    return load_for_use(str(adapters["one"]), accelerator="cpu", adapters={"two": str(adapters["two"])})


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """A script of the project as a module."""
    return _script
