"""Head and loss in chunks against F.cross_entropy on the model's own logits: values, gradients, memory held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import ACCEPTED, VOCAB, default_config, distance, documents, flat, gradients, padded, random_model

from lmlab.models import head, linear_loss
from lmlab.models.attention import NAME, attention
from lmlab.models.hardware import Hardware
from lmlab.models.head import CrossEntropy, loss_sum
from lmlab.models.probe import _twin
from lmlab.models.quantize import SixteenBit
from lmlab.records import IGNORE_INDEX

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order
FAST = ("llama", "gpt2", "gemma2", "granite", "cohere", "phi", "nanochat", "opt")
EVERY = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ACCEPTED]
LOSSES = {
    "plain": CrossEntropy(kind="cross_entropy", label_smoothing=0.0, z_loss=0.0),
    "smooth": CrossEntropy(kind="cross_entropy", label_smoothing=0.1, z_loss=0.0),
    "z": CrossEntropy(kind="cross_entropy", label_smoothing=0.1, z_loss=0.01),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks even for these few tokens (16 positions each, the least there is)."""
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", {"cpu": 1})


def own_loss(model: Any, examples: Any, loss: CrossEntropy) -> torch.Tensor:
    """Every logit by the model itself, padded rows, torch's cross-entropy."""
    rectangle = padded(examples)
    mask = (torch.arange(13)[None] < torch.tensor([[len(e.input_ids)] for e in examples])).long()
    logits = model(input_ids=rectangle.input_ids, attention_mask=mask, use_cache=False).logits
    kept = rectangle.labels.flatten() != IGNORE_INDEX
    logits, labels = logits.flatten(0, 1)[kept].float(), rectangle.labels.flatten()[kept]
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=loss.label_smoothing)
    return total + loss.z_loss * logits.logsumexp(-1).square().sum()


def assert_same_loss(model: Any, loss: CrossEntropy, *, tolerance: float = RELATIVE) -> None:
    examples = documents()
    with attention(model, "eager"):
        expected = own_loss(model, examples, loss)
        expected.backward()
        reference = gradients(model)
    with attention(model, NAME):
        found = loss_sum(model, flat(examples), loss)
        assert found.dtype == torch.float32
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        assert distance(gradients(model), reference) < tolerance
        with torch.no_grad():
            assert loss_sum(model, flat(examples), loss).item() == found.item()


@pytest.mark.parametrize("model_type", EVERY)
def test_against_cross_entropy_of_own_logits_by_architecture(model_type: str) -> None:
    model = _twin(default_config(model_type)).train()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "attn_dropout", "resid_pdrop", "embd_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    assert_same_loss(model, LOSSES["plain"])


CAPPED = {
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "phi": {},
    "llama": {"tie_word_embeddings": True},
    "gpt2": {},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model_type", CAPPED)
def test_against_cross_entropy_scales_caps_biases_and_ties(model_type: str, loss: str) -> None:
    model = random_model(model_type, **CAPPED[model_type])
    assert head.in_chunks(model), "the chunked path is what is tested"
    assert_same_loss(model, LOSSES[loss])


@pytest.mark.parametrize("name", ["logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_a_setting_of_the_head_is_seen_in_the_loss(name: str) -> None:
    """The comparison above would notice one left out."""
    where = {"logit_scale": "cohere", "logits_scaling": "granite", "final_logit_softcapping": "gemma2"}[name]
    batch = flat(documents())
    values = []
    for value in (0.5, 3.0):
        model = random_model(where, **{name: value})
        with attention(model, NAME):
            values.append(loss_sum(model, batch).item())
    assert abs(values[0] - values[1]) > 0.01 * abs(values[0])


def test_a_head_of_unknown_arithmetic_falls_back_to_the_models_own_logits() -> None:
    from transformers import LlamaForCausalLM

    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output: Any = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
            return output

    plain = random_model("llama")
    odd = Odd(plain.config)
    odd.load_state_dict(plain.state_dict())
    assert_same_loss(odd.train(), LOSSES["plain"])
    assert not head.in_chunks(odd)
    said = [
        dict(
            Hardware(torch.device("cpu"), "fp32", "test").table(
                flat=True,
                checkpointing=False,
                compiled=False,
                optimizer="adamw",
                chunked=chunked,
                adapter="none",
            )
        )["head, loss"]
        for chunked in (True, head.in_chunks(odd))
    ]
    assert "in chunks" in said[0]
    assert "all logits at once" in said[1], "a fallback is said"


def lora(model: Any, **changes: Any) -> Any:
    values = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**(values | changes)))


PEFT: dict[str, Any] = {
    "body": lambda m: lora(m, target_modules="all-linear"),
    "head": lambda m: lora(m, target_modules=["lm_head", "q_proj"]),
    "head-saved": lambda m: lora(m, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "rows": lambda m: lora(m, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 9]}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", PEFT)
def test_against_cross_entropy_of_own_logits_under_peft(kind: str, tied: bool) -> None:
    model = PEFT[kind](random_model("llama", tie_word_embeddings=tied))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert_same_loss(model, LOSSES["z"])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_against_cross_entropy_of_own_logits_stored_head(kind: str) -> None:
    model = random_model("llama")
    SixteenBit(kind=kind).apply(model, compute_dtype=torch.float32)  # type: ignore[arg-type]
    assert_same_loss(lora(model, target_modules="all-linear"), LOSSES["plain"])


def test_a_loss_of_a_plugin_sees_all_logits_of_its_positions() -> None:
    class Focal(head.LossConfig):
        def total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            nll = F.cross_entropy(logits, labels, reduction="none")
            return ((1 - (-nll).exp()) ** 2 * nll).sum()

    model = random_model("gemma2", final_logit_softcapping=2.0)
    loss, batch = Focal(kind="focal"), flat(documents())
    with attention(model, NAME):
        found = loss_sum(model, batch, loss)
        found.backward()
        reference = gradients(model)
        expected = loss.total(*head.supervised_logits(model, batch))
        expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert distance(gradients(model), reference) < RELATIVE


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi"])
def test_against_fp64_cross_entropy_bf16_autocast(model_type: str) -> None:
    """16-bit products: no further from the exact gradient than twice torch's own path under the same autocast."""
    model = random_model(model_type)
    examples = documents()
    with attention(model, "eager"):
        exact = own_loss(model, examples, LOSSES["plain"])
        exact.backward()
        reference = gradients(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = own_loss(model, examples, LOSSES["plain"])
        rounded.backward()
        theirs = distance(gradients(model), reference)
    with attention(model, NAME):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss_sum(model, flat(examples))
        found.backward()
        assert distance(gradients(model), reference) < 2 * theirs
    allowed = max(2 * abs(rounded.item() - exact.item()), 1e-3 * exact.item())
    assert abs(found.item() - exact.item()) < allowed


def test_no_supervised_position_gives_a_zero_with_a_graph() -> None:
    model = random_model("llama")
    batch = flat(documents())
    batch.labels.fill_(IGNORE_INDEX)
    batch.supervised_index = batch.supervised_index[:0]
    with attention(model, NAME):
        loss = loss_sum(model, batch)
        loss.backward()
    assert loss.item() == 0
    assert gradients(model).count_nonzero() == 0


def test_no_more_than_one_chunk_of_logits_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way is a chunk's, not the batch's; a frozen head makes none of its own size."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    matrix = torch.nn.Linear(8, 1000, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(400, 8, requires_grad=True), torch.randint(0, 1000, (400,))
    with Watch():
        total = linear_loss.total(
            hidden,
            labels,
            head=matrix,
            tail=linear_loss.PLAIN_TAIL,
            loss=head.NLL.total,
            cross_entropy=linear_loss.HeadLoss(),
        )
        total.backward()
    made = [n for n in sizes if n != matrix.weight.numel()]  # .t() and .to() are views of the weight
    assert max(made) == 16 * 1008  # 1,000 logits in rows of whole cache lines
    assert VOCAB < 1000
