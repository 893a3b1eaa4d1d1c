"""A model made ready to decode: the same logits inside, bit for bit the same model afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lmlab.models import decoding
from lmlab.models.decoding import ready_to_decode
from lmlab.models.quantize import EightBit, FourBit, FourBitInteger, SixteenBit

ROUNDING = 2e-5
"""Of logits, relative: W x + s B (A x) is summed in another order than (W + s B A) x, in fp32 (seen: up to 2e-6)."""
IDS = torch.randint(5, 97, (3, 7), generator=torch.Generator().manual_seed(0))
STORAGE: dict[str, Callable[[Any], None]] = {
    "fp32": lambda model: None,
    "fp16": lambda model: SixteenBit(kind="fp16").apply(model, compute_dtype=torch.float32),
    "int8": lambda model: EightBit(kind="int8").apply(model, compute_dtype=torch.float32),
    "nf4": lambda model: FourBit(kind="nf4", double_quant=True).apply(model, compute_dtype=torch.float32),
    "fp4": lambda model: FourBit(kind="fp4", double_quant=False).apply(model, compute_dtype=torch.float32),
    "int4": lambda model: FourBitInteger(kind="int4").apply(model, compute_dtype=torch.float32),
}


def base(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = (
        hf.GPT2Config(**shape, n_positions=64, bos_token_id=None, eos_token_id=None)
        if kind == "gpt2"
        else hf.LlamaConfig(**shape, num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64)
    )
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(model: Any, **options: Any) -> Any:
    """LoRA whose B is not zero, so that it changes the logits."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.3,
    }
    found: Any = get_peft_model(model, LoraConfig(**settings | options))
    _fill(found)
    return found


def _fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model: Any) -> dict[str, Any]:
    """Everything that could have changed: bits of all tensors, flags, and which module defines its forward itself."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bits": {
            name: t.detach().cpu().contiguous().view(torch.uint8).tolist() for name, t in tensors.items()
        },
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "own": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("storage", list(STORAGE))
@pytest.mark.parametrize("with_adapter", [True, False], ids=["lora", "base"])
def test_logits_agree_and_the_model_is_unchanged(kind: str, storage: str, with_adapter: bool) -> None:
    model = base(kind)
    STORAGE[storage](model)
    if with_adapter:
        model = adapted(model, fan_in_fan_out=kind == "gpt2" and storage == "fp32")
    model.eval()
    expected, before = logits(model), state(model)
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64, memory_budget=1 << 30) as ready:
        # Every linear layer of both blocks; in 16 bits the head too.
        per_block = 7 if kind == "llama" else 4
        count = 2 * per_block * (with_adapter or storage != "fp32") + (storage == "fp16")
        assert (ready.dense_layers, ready.left_layers) == (count, 0)
        assert same(logits(model), expected)
        if not with_adapter:
            assert torch.equal(logits(model), expected)
    assert state(model) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"trainable_token_indices": [3, 4]}, True),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}}, True),
    ],
    ids=["rslora", "dora", "modules_to_save", "token_rows", "patterns"],
)
def test_kinds_of_lora_are_honoured_or_left_alone(options: dict[str, Any], changed: bool) -> None:
    model = adapted(base(), **options).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            parameter.data.add_(0.05)
    expected, before = logits(model), state(model)
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64) as ready:
        assert bool(ready.dense_layers) == changed
        assert same(logits(model), expected)
    assert state(model) == before


def test_the_adapters_in_force_count_and_no_others() -> None:
    from peft import LoraConfig

    model = adapted(base())
    second = LoraConfig(r=2, lora_alpha=9, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", second)
    _fill(model)
    model.eval()
    seen = []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        expected = logits(model)
        with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64):
            assert same(logits(model), expected)
        seen.append(expected)
    assert not same(seen[0], seen[1])
    assert not same(seen[0], seen[2])
    with model.disable_adapter():
        expected = logits(model)
        with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64):
            assert torch.equal(logits(model), expected)


def test_an_exception_puts_everything_back() -> None:
    model = base()
    STORAGE["nf4"](model)
    model = adapted(model).train()
    before = state(model)

    def interrupted() -> None:
        with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64) as ready:
            assert ready.dense_layers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state(model) == before


def test_an_exception_while_weights_are_read_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base())
    before, real, calls = state(model), decoding._dense_product, []

    def fails_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(decoding, "_dense_product", fails_third)
    with pytest.raises(MemoryError), ready_to_decode(model, compute_dtype=torch.float32, num_steps=64):
        pass
    assert state(model) == before


def test_training_goes_on_with_the_same_losses() -> None:
    def losses(decodes: bool) -> list[float]:
        model = base()
        STORAGE["nf4"](model)
        model = adapted(model).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        torch.manual_seed(3)  # dropout
        found = []
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if decodes:
                with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64):
                    model.eval()
                    logits(model)
                    model.train()
        return found

    without = losses(False)
    assert losses(True) == without
    assert without[-1] < without[0]


def test_as_many_layers_as_fit() -> None:
    model = base()
    STORAGE["nf4"](model)
    model = adapted(model).eval()
    expected = logits(model)
    room = (64 * 64 + 32 * 64) * 4  # q_proj and k_proj of the first block
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64, memory_budget=room) as ready:
        assert (ready.dense_layers, ready.left_layers, ready.dense_bytes) == (2, 12, room)
        assert same(logits(model), expected)
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64, memory_budget=0) as ready:
        assert ready.dense_layers == 0
        assert torch.equal(logits(model), expected)


def test_for_one_step_nothing_is_merged() -> None:
    model = adapted(base()).eval()
    expected = logits(model)
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=0) as ready:
        assert ready.dense_layers == 0
        assert torch.equal(logits(model), expected)


def test_a_layer_with_hooks_keeps_its_forward() -> None:
    model = adapted(base()).eval()
    expected, seen = logits(model), []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    handle = layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    with ready_to_decode(model, compute_dtype=torch.float32, num_steps=64) as ready:
        assert ready.dense_layers == 13
        assert same(logits(model), expected)
    handle.remove()
    assert seen == [1]


def test_16_bit_dense_weights_under_autocast_and_without() -> None:
    # bf16 has 8 bits: W + s B A is rounded to them once, the sum of two products twice.
    model = adapted(base()).eval()
    expected = logits(model)
    with ready_to_decode(model, compute_dtype=torch.bfloat16, num_steps=64):
        found = logits(model)
        assert found.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            automatic = logits(model)
    for result in (found, automatic.float()):
        assert (result - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 2, 3, 32, 256, 300])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_large_head_in_blocks_gives_the_same_logits(rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(160, decoding.BLOCKED_FROM + 77, bias=has_bias)
    x = torch.randn(rows, 1, 160)
    model = nn.Sequential(head)
    with torch.no_grad():
        expected = model(x)
        with ready_to_decode(model, compute_dtype=torch.float32, num_steps=1):
            assert "forward" in head.__dict__
            assert same(model(x), expected)
    assert "forward" not in head.__dict__
