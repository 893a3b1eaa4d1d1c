"""Logits of supervised positions and their loss against F.cross_entropy on the model's own full, padded logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import documents, flat, gradients, padded, random_model, relative

from lmlab.models.attention import NAME, attention
from lmlab.models.head import CrossEntropy, supervised_logits
from lmlab.records import IGNORE_INDEX

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order
LOSS = CrossEntropy(kind="cross_entropy", label_smoothing=0.0, z_loss=0.0)


def with_lora(model: Any, targets: Any) -> Any:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def llama_lora_everywhere() -> Any:
    return with_lora(random_model("llama"), "all-linear")


def llama_lora_on_head() -> Any:
    return with_lora(random_model("llama"), ["lm_head", "q_proj"])


def llama_lora_on_tied_head() -> Any:
    return with_lora(random_model("llama", tie_word_embeddings=True), ["lm_head", "q_proj"])


MODELS = {
    "llama": lambda: random_model("llama"),
    "llama-tied": lambda: random_model("llama", tie_word_embeddings=True),
    "gpt2-tied-learned-positions": lambda: random_model("gpt2"),
    "granite-scaled-logits": lambda: random_model("granite"),
    "phi-head-bias": lambda: random_model("phi"),
    "llama-lora": llama_lora_everywhere,
    "llama-lora-on-head": llama_lora_on_head,
    "llama-lora-on-tied-head": llama_lora_on_tied_head,
}


@pytest.mark.parametrize("layout", [flat, padded])
@pytest.mark.parametrize("name", MODELS)
def test_against_full_logits_nll_and_gradients(name: str, layout: Any) -> None:
    model = MODELS[name]().train()
    examples = documents()
    rectangle = padded(examples)
    mask = (torch.arange(13)[None] < torch.tensor([[len(e.input_ids)] for e in examples])).long()
    full = model(input_ids=rectangle.input_ids, attention_mask=mask, use_cache=False).logits.float()
    expected = F.cross_entropy(
        full.flatten(0, 1), rectangle.labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )
    expected.backward()
    reference = gradients(model)

    with attention(model, NAME if layout is flat else "eager"):
        logits, labels = supervised_logits(model, layout(examples))
        loss = LOSS.total(logits, labels)
        loss.backward()
    assert logits.dtype == torch.float32
    assert logits.shape == (len(labels), 97)
    assert labels.tolist() == [int(x) for e in examples for x in e.labels if x != IGNORE_INDEX]
    assert loss.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert relative(gradients(model), reference) < RELATIVE


@pytest.mark.parametrize("layout", [flat, padded])
def test_every_position_supervised(layout: Any) -> None:
    """The path where no row of the logits is left out."""
    model = random_model("llama")
    examples = documents([9, 9], ignore=0.0)
    with torch.no_grad(), attention(model, NAME if layout is flat else "eager"):
        logits, labels = supervised_logits(model, layout(examples))
        alone = torch.cat([supervised_logits(model, layout([e])).logits for e in examples])
    assert len(labels) == 18
    assert relative(logits, alone) < RELATIVE


def test_against_torch_label_smoothing_and_z_loss() -> None:
    logits, labels = torch.randn(7, 11, dtype=torch.float64), torch.randint(0, 11, (7,))
    log_z = logits.exp().sum(-1).log()
    log_p = logits - log_z[:, None]
    right = log_p[torch.arange(7), labels]
    smooth = -(0.9 * right + 0.1 * log_p.mean(-1)).sum() + 0.01 * (log_z**2).sum()
    loss = CrossEntropy(kind="cross_entropy", label_smoothing=0.1, z_loss=0.01)
    assert loss.total(logits, labels).item() == pytest.approx(smooth.item(), rel=1e-12)
