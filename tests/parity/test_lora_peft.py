"""The fused LoRA product against PEFT's own layers: outputs, gradients, dropout masks, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_quantize_bitsandbytes import ALL, label, quantized
from tiny import distance, documents, flat, random_model

from lmlab.models.attention import use_packed_attention
from lmlab.models.build import enable_checkpointing
from lmlab.models.head import loss_sum
from lmlab.models.lora import FusedLora, use_fused_lora

pytestmark = pytest.mark.parity
RELATIVE = (
    1e-5  # fp32 sums in another order; measured up to 5e-6 where weights are large (gemma2), else below 1e-6
)
ARCHITECTURES = ["llama", "gpt2", "phi", "qwen2", "gemma2"]


def peft_model(base: Any, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 7,
        "init_lora_weights": False,
        "target_modules": "all-linear",
    }
    torch.manual_seed(0)
    merged: dict[str, Any] = values | {"task_type": "CAUSAL_LM"} | changes
    return get_peft_model(base, LoraConfig(**merged))


def pair(model_type: str, storage: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """(PEFT's own, ours): two models with equal weights, in flat rows."""
    models = [peft_model(quantized(random_model(model_type), storage), **changes).train() for _ in range(2)]
    for model in models:
        use_packed_attention(model)
    assert use_fused_lora(models[1]) > 0
    return models[0], models[1]


def step(model: Any, *, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradients of the trained weights in one vector)."""
    torch.manual_seed(seed)
    loss = loss_sum(model, flat(documents()))
    loss.backward()
    grads = torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    )
    model.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize("storage", ALL, ids=label)
@pytest.mark.parametrize(
    "model_type", [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
def test_against_peft_loss_and_gradients(model_type: str, storage: dict[str, Any]) -> None:
    peft, ours = pair(model_type, storage)
    (expected, reference), (found, grads) = step(peft), step(ours)
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert distance(grads, reference) < RELATIVE
    names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (peft, ours)]
    assert names[0] == names[1]


@pytest.mark.parametrize("storage", [ALL[0], ALL[4]], ids=label)
def test_against_peft_dropout_draws_the_same_masks(storage: dict[str, Any]) -> None:
    peft, ours = pair("llama", storage, lora_dropout=0.3)
    (expected, reference), (found, grads) = step(peft), step(ours)
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert distance(grads, reference) < RELATIVE
    assert distance(step(ours, seed=4)[1], grads) > 0.01, "another seed, other masks"
    for model in (peft, ours):
        model.eval()
    assert step(ours)[0].item() == pytest.approx(step(peft)[0].item(), rel=RELATIVE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("storage", [ALL[0], ALL[2], ALL[3], ALL[4]], ids=label)
def test_against_peft_checkpointing(storage: dict[str, Any], dropout: float) -> None:
    peft, ours = pair("llama", storage, lora_dropout=dropout)
    reference = step(peft)[1]
    enable_checkpointing(ours.get_base_model())
    assert distance(step(ours)[1], reference) < RELATIVE


@pytest.mark.parametrize("storage", [ALL[0], ALL[2], ALL[4]], ids=label)
def test_against_peft_bf16_autocast(storage: dict[str, Any]) -> None:
    """Both round to bf16; ours no further from the fp32 gradient than 1.5 times PEFT's."""
    peft, ours = pair("llama", storage)
    exact = step(peft)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, own = step(peft)[1], step(ours)[1]
    assert distance(own, exact) < 1.5 * distance(theirs, exact)


def test_against_peft_bf16_base_without_autocast() -> None:
    """A base wholly in bf16 under fp32 adapters, as on a GPU."""
    peft, ours = pair("llama", ALL[0])
    exact = step(peft)[1]
    for model in (peft, ours):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    theirs, own = step(peft)[1], step(ours)[1]
    assert own.dtype == torch.float32
    assert distance(own, exact) < 1.5 * distance(theirs, exact)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_against_peft_variants(changes: dict[str, Any]) -> None:
    base = "gpt2" if "lora_bias" in changes else "phi" if "bias" in changes else "llama"
    peft, ours = pair(base, ALL[0], **changes)
    (expected, reference), (found, grads) = step(peft), step(ours)
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert distance(grads, reference) < RELATIVE


def test_merge_disable_and_a_second_adapter_are_pefts() -> None:
    peft, ours = pair("llama", ALL[0])
    ids = documents([20])[0].input_ids[None]

    def logits(model: Any) -> torch.Tensor:
        from lmlab.models.attention import attention

        with torch.no_grad(), attention(model, "eager"):
            return model.eval()(ids, use_cache=False).logits

    for change in ("merge_adapter", "unmerge_adapter"):
        for model in (peft, ours):
            getattr(model, change)()
        torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    for model in (peft, ours):
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("other")
    torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    for model in (peft, ours):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    with peft.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(peft), rtol=0, atol=0)


def test_files_are_byte_for_byte_pefts(tmp_path: Path) -> None:
    peft, ours = pair("llama", ALL[4])
    for name, model in (("peft", peft), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    name = "adapter_model.safetensors"
    assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    loaded = PeftModel.from_pretrained(quantized(random_model("llama"), ALL[4]), str(tmp_path / "ours"))
    use_packed_attention(loaded)
    with torch.no_grad():
        values = [loss_sum(model.eval(), flat(documents())).item() for model in (loaded, ours)]
    assert values[0] == pytest.approx(values[1], rel=RELATIVE)


def test_only_the_input_and_a_narrow_matrix_are_kept_for_backward() -> None:
    layer = peft_model(random_model("llama"), target_modules=["down_proj"])
    use_fused_lora(layer)
    fused = next(m for m in layer.modules() if isinstance(m, FusedLora))
    kept: list[int] = []
    x = torch.randn(50, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fused.forward(x)
    assert sorted(kept) == sorted([x.numel(), 50 * 4, 4 * 96, 64 * 4])  # x, x A^T, A, B


def test_copies_are_independent() -> None:
    _, ours = pair("llama", ALL[0])
    assert torch.equal(step(copy.deepcopy(ours))[1], step(ours)[1])


def test_bitsandbytes_own_8_bit_layer_goes_pefts_way() -> None:
    """It quantizes activations in evaluation: a dense weight would give other values."""
    import bitsandbytes as bnb

    from lmlab.models.quantize import is_dense

    assert not is_dense(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    assert is_dense(torch.nn.Linear(8, 8))
    assert not is_dense(torch.nn.Embedding(8, 8))
