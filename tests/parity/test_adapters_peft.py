"""LoRA as lmlab puts it on: PEFT's own arithmetic and files, a base that never moves, learning over every storage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from test_quantize_bitsandbytes import ALL, label, quantized
from tiny import documents, flat, padded, random_model, relative

from lmlab.models.adapters import Lora, NoAdapter, count_parameters
from lmlab.models.attention import use_packed_attention
from lmlab.models.build import enable_checkpointing
from lmlab.models.head import supervised_logits
from lmlab.records import UserError

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order
IDS = documents([20])[0].input_ids[None]


def lora(**changes: Any) -> Lora:
    values = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
    return Lora.model_validate(values | changes)


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_init_follows_its_seed_and_leaves_the_global_rng_alone() -> None:
    base = random_model("llama")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapter_weights(lora().apply(base, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = adapter_weights(lora().apply(random_model("llama"), seed=5))
    other = adapter_weights(lora().apply(random_model("llama"), seed=6))
    assert first.keys() == again.keys() == other.keys()
    for name, weight in first.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) == ("lora_B" in name)


@pytest.mark.parametrize("values", ALL, ids=label)
def test_adapter_at_init_is_the_base(values: dict[str, Any]) -> None:
    base = quantized(random_model("llama"), values)
    expected = logits(base)
    model = lora().apply(base, seed=0)
    assert torch.equal(logits(model), expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_weights(model))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("values", ALL, ids=label)
def test_it_trains_over_every_storage(values: dict[str, Any], checkpointing: bool) -> None:
    base = random_model("llama", std=0.08)
    if checkpointing:
        enable_checkpointing(base)
    model = lora().apply(quantized(base, values), seed=0).train()
    use_packed_attention(model)
    before = base_tensors(model)
    batch = flat(documents())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        out, labels = supervised_logits(model, batch)
        loss = F.cross_entropy(out, labels)
        loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() for p in optimizer.param_groups[0]["params"]
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses
    for name, tensor in base_tensors(model).items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), f"{name} of the frozen base moved"


@pytest.mark.parametrize("values", ALL, ids=label)
def test_against_lora_by_hand(values: dict[str, Any]) -> None:
    """y = Wx + (alpha / r) B A x with W what the storage holds."""
    base = quantized(random_model("llama"), values)
    plain = copy.deepcopy(base).model.layers[0].mlp.down_proj.eval()
    model = lora(alpha=6.0).apply(base, seed=0).eval()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        x = torch.randn(3, 96)
        assert relative(layer(x), plain(x) + 6 / 4 * x @ a.T @ b.T) < RELATIVE


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("values", [ALL[0], ALL[3], ALL[4]], ids=label)
def test_saved_adapter_loads_with_peft_alone(model_type: str, values: dict[str, Any], tmp_path: Path) -> None:
    model = lora().apply(quantized(random_model(model_type), values), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(random_model(model_type), values), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert relative(logits(model), logits(loaded)) > 0.01


@pytest.mark.parametrize("target", [["no_such_layer"], "no_such_layer", "layers\\.[5-9]\\..*"])
def test_targets_that_match_nothing(target: Any) -> None:
    with pytest.raises(UserError, match="matches no layer") as caught:
        lora(target_modules=target).apply(random_model("llama"), seed=0)
    assert "adapter.target_modules" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", ALL, ids=label)
def test_parameters_are_counted_whatever_the_storage(values: dict[str, Any]) -> None:
    plain = random_model("llama")
    linear = [(64, 64)] * 2 + [(32, 64)] * 2 + [(96, 64)] * 2 + [(64, 96)]
    size = 2 * sum(a * b for a, b in linear) + 2 * 97 * 64 + 5 * 64
    assert count_parameters(NoAdapter(kind="none").apply(plain, seed=0)) == (size, size)
    added = 2 * sum(4 * (a + b) for a, b in linear)
    model = lora().apply(quantized(plain, values), seed=0)
    assert count_parameters(model) == (size + added, added)


def test_dropout_acts_in_training_only() -> None:
    model = lora(dropout=0.5).apply(random_model("llama"), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    batch = padded(documents())
    with torch.no_grad():
        first, second = (supervised_logits(model.train(), batch).logits for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (supervised_logits(model.eval(), batch).logits for _ in range(2))
        assert torch.equal(first, second)
