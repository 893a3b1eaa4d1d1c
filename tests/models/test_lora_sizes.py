"""Sizes that the LoRA paper states (arXiv 2106.09685), counted on models of the real shapes without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from lmlab.models.adapters import Lora, count_parameters
from lmlab.models.quantize import weight_shape


def on_meta(architecture: str, rank: int, targets: list[str], dtype: torch.dtype, **shape: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape), dtype=dtype)
        lora = Lora(kind="lora", rank=rank, alpha=8.0, dropout=0.0, target_modules=targets)
        return lora.apply(model, seed=0)


def test_rank_8_on_a_4096_square_trains_65536_parameters() -> None:
    model = on_meta("llama", 8, ["q_proj"], torch.float32, hidden_size=4096, num_hidden_layers=1)
    (layer,) = (module for module in model.modules() if hasattr(module, "lora_A"))
    assert weight_shape(layer.get_base_layer()) == (4096, 4096)
    _, trained = count_parameters(model)
    assert trained == 65_536
    assert 100 * trained / 4096**2 == pytest.approx(0.39, abs=0.005)


def test_an_adapter_of_gpt3_is_a_ten_thousandth_of_it() -> None:
    """Section 4.2: from 350 GB to 35 MB with r = 4 on the query and value projections, in 16 bits.

    OPT 175B has GPT-3's shape with these projections apart. 36.0 MiB is what the paper rounds to 35 MB.
    """
    model = on_meta(
        "opt",
        4,
        ["q_proj", "v_proj"],
        torch.float16,
        hidden_size=12288,
        word_embed_proj_dim=12288,
        ffn_dim=49152,
        num_hidden_layers=96,
        num_attention_heads=96,
        max_position_embeddings=2048,
    )
    base = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" not in name)
    adapter = sum(2 * tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    assert base / 1e9 == pytest.approx(350, rel=0.01)
    assert adapter / 2**20 == pytest.approx(36.0, abs=0.01)
    assert base / adapter == pytest.approx(10_000, rel=0.1)
    assert adapter == 2 * count_parameters(model)[1]
