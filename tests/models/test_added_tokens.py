"""Added tokens: embeddings grow for tied and untied heads, their rows train over a frozen base, and the files hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lmlab.data.packing import collate_flat, collate_padded
from lmlab.models.adapters import Lora, NoAdapter, count_parameters
from lmlab.models.attention import use_packed_attention
from lmlab.models.head import supervised_logits
from lmlab.models.quantize import QuantConfig, quants
from lmlab.models.vocabulary import TokenRows, embedding_rows, grow_embeddings
from lmlab.records import Example, UserError

RELATIVE = 1e-5  # fp32 sums in another order
OLD, NEW, WIDTH = 50, 3, 32
ADDED = [50, 51, 52]
IDS = torch.tensor([[1, 50, 7, 51, 9, 52, 50, 4]])
NONE: dict[str, Any] = {"kind": "none"}
NF4: dict[str, Any] = {"kind": "nf4", "double_quant": True}
STORAGES: list[dict[str, Any]] = [NONE, {"kind": "fp16"}, {"kind": "bf16"}, {"kind": "int8"}, NF4]
SHAPE: dict[str, Any] = {
    "vocab_size": OLD,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
both_heads = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def base(*, tied: bool, model_type: str = "llama", **changes: Any) -> Any:
    shape = {**SHAPE, "tie_word_embeddings": tied, **changes}
    if model_type == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
        shape = {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "tie_word_embeddings": tied,
            "vocab_size": OLD,
            **dropout,
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **shape)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.1)
    return model


def quantized(model: Any, values: dict[str, Any]) -> Any:
    config: QuantConfig = quants.class_of(values["kind"]).model_validate(values)  # type: ignore[assignment]
    config.apply(model, compute_dtype=torch.float32)
    return model


def lora(**changes: Any) -> Lora:
    values = {"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}
    return Lora.model_validate(values | changes)


def adapted(*, tied: bool, values: dict[str, Any] = NONE, **about: Any) -> Any:
    model = base(tied=tied, **about)
    grow_embeddings(model, OLD + NEW, seed=3)
    return lora().apply(quantized(model, values), seed=1, token_rows=ADDED)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in (6, 9, 4):
        ids = torch.randint(0, OLD + NEW, (length + 1,), generator=generator)
        ids[1], ids[2] = 50, 51
        found.append(Example(ids[:-1], ids[1:].clone(), (length,)))
    return found


def train(model: Any, steps: int, optimizer: Any = None) -> Any:
    use_packed_attention(model)
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        out, labels = supervised_logits(model, collate_flat(examples()))
        F.cross_entropy(out, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.set_attn_implementation("sdpa")
    return optimizer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def token_rows(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}


# --- growing --------------------------------------------------------------------------------------------------------


@both_heads
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_old_rows_stay_and_new_ones_follow_the_seed(model_type: str, tied: bool) -> None:
    models = [base(tied=tied, model_type=model_type) for _ in range(3)]
    before = models[0].get_input_embeddings().weight.detach().clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert [grow_embeddings(m, OLD + NEW, seed=s) for m, s in zip(models, (3, 3, 4), strict=True)] == [
        NEW
    ] * 3
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (m.get_input_embeddings().weight for m in models)
    head = models[0].get_output_embeddings().weight
    assert (head is first) is tied
    assert first.shape == head.shape == (OLD + NEW, WIDTH)
    assert models[0].config.vocab_size == OLD + NEW
    assert torch.equal(first[:OLD], before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Around the mean of the old rows: a new token is an average one, not an outlier.
    assert torch.allclose(first[OLD:], before.mean(0).expand(NEW, -1), atol=1e-3)


@both_heads
def test_logits_of_old_tokens_stay(tied: bool) -> None:
    model = base(tied=tied)
    ids = torch.tensor([[1, 2, 3, 40]])
    with torch.no_grad():
        before = model.eval()(ids).logits
        grow_embeddings(model, OLD + NEW, seed=0)
        assert torch.equal(model(ids).logits[..., :OLD], before)


def test_padded_rows_are_used_and_never_taken_away() -> None:
    model = base(tied=False)
    before = model.get_input_embeddings().weight
    assert grow_embeddings(model, OLD - 10, seed=0) == 0
    assert grow_embeddings(model, OLD, seed=0) == 0
    assert model.get_input_embeddings().weight is before
    assert embedding_rows(model) == OLD


@both_heads
def test_full_training_reaches_the_new_rows_and_saves_them(tied: bool, tmp_path: Path) -> None:
    model = base(tied=tied)
    grow_embeddings(model, OLD + NEW, seed=0)
    model: Any = NoAdapter(kind="none").apply(model, seed=0, token_rows=ADDED)
    before = model.get_input_embeddings().weight.detach().clone()
    train(model, 2)
    assert (model.get_input_embeddings().weight[50:52] != before[50:52]).any(1).all()
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# --- rows trained over a frozen base ----------------------------------------------------------------------------------


@both_heads
@pytest.mark.parametrize("values", STORAGES, ids=lambda v: v["kind"])
def test_only_the_rows_of_added_tokens_move(values: dict[str, Any], tied: bool) -> None:
    model = adapted(tied=tied, values=values)
    parameters = dict(model.named_parameters())
    rows = token_rows(model)
    assert len(rows) == (1 if tied else 2)
    assert all(p.dtype == torch.float32 and p.shape == (NEW, WIDTH) for p in rows.values())
    plain = lora().apply(quantized(base(tied=tied), values), seed=1)
    assert count_parameters(model)[1] == count_parameters(plain)[1] + len(rows) * NEW * WIDTH
    before = {name: p.detach().clone() for name, p in parameters.items()}
    out, labels = supervised_logits(model, collate_padded(examples()))
    F.cross_entropy(out, labels).backward()
    for row in rows.values():  # 50 and 51 are in the text, and as labels and as wrong answers
        assert row.grad is not None
        assert row.grad[:2].abs().amax(1).min() > 0
    model.zero_grad()
    train(model, 5)
    for name, parameter in parameters.items():
        if name in rows:
            assert (parameter[:2] != before[name][:2]).any(1).all()
        elif not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), f"{name} of the frozen base moved"


@both_heads
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_against_peft_own_layer_of_trained_rows(model_type: str, tied: bool) -> None:
    """Logits and gradients as PEFT has them, scaled embeddings (Gemma 3) among them."""
    extra: Any = {} if model_type == "gpt2" else {"head_dim": 8}
    ours, theirs = (adapted(tied=tied, model_type=model_type, **extra) for _ in range(2))
    swapped = 0
    for layer in theirs.modules():
        if type(layer) is TokenRows:
            object.__setattr__(layer, "__class__", TrainableTokensLayer)
            swapped += 1
    assert swapped == 2
    with torch.no_grad():
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.normal_(std=0.3, generator=generator)
    found, expected = logits(ours), logits(theirs)
    assert relative(found, expected) < RELATIVE
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))
        assert relative(logits(ours), found) > 0.01
    for model in (ours, theirs):
        out, labels = supervised_logits(model.train(), collate_padded(examples()))
        F.cross_entropy(out, labels).backward()
    for (name, mine), (_, other) in zip(token_rows(ours).items(), token_rows(theirs).items(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert relative(mine.grad, other.grad) < RELATIVE, name


@both_heads
def test_packed_rows_and_single_documents_give_the_same(tied: bool) -> None:
    model = adapted(tied=tied)
    train(model, 3)
    padded = supervised_logits(model.eval(), collate_padded(examples())).logits
    use_packed_attention(model)
    packed = supervised_logits(model, collate_flat(examples())).logits
    assert relative(packed, padded) < RELATIVE


@both_heads
@pytest.mark.parametrize("values", [NONE, {"kind": "bf16"}, NF4], ids=lambda v: v["kind"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_file_loads_with_peft_alone_over_a_resized_base(
    model_type: str, values: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = adapted(tied=tied, values=values, model_type=model_type)
    train(model, 3)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in stored.items() if "trainable_tokens" in name}
    assert len(rows) == (1 if tied else 2)
    assert all(tensor.shape == (NEW, WIDTH) for tensor in rows.values())
    again = base(tied=tied, model_type=model_type)
    with torch.random.fork_rng():
        torch.manual_seed(99)  # whatever the new rows of this base hold, the file has its own
        again.resize_token_embeddings(OLD + NEW, mean_resizing=False)
    loaded = PeftModel.from_pretrained(
        quantized(again, values if values["kind"] != "bf16" else NONE), str(tmp_path)
    )
    if values["kind"] == "bf16":  # a 16-bit base is lmlab's own storage; PEFT alone has the base in 32 bits
        assert all(
            torch.equal(a, b)
            for a, b in zip(token_rows(loaded).values(), token_rows(model).values(), strict=True)
        )
    else:
        assert relative(logits(loaded), logits(model)) < RELATIVE


@both_heads
def test_a_state_of_trainable_values_goes_on_exactly(tied: bool) -> None:
    """What a checkpoint holds (the trainable parameters by name and the optimizer's state) is enough."""
    straight = adapted(tied=tied)
    train(straight, 4)
    first = adapted(tied=tied)
    optimizer = train(first, 2)
    state = {name: p.detach().clone() for name, p in first.named_parameters() if p.requires_grad}
    second = lora().apply(grown(base(tied=tied), seed=77), seed=8, token_rows=ADDED)
    assert not second.load_state_dict(state, strict=False).unexpected_keys
    resumed = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, 2, resumed)
    assert torch.equal(logits(second), logits(straight))


def grown(model: Any, *, seed: int) -> Any:
    grow_embeddings(model, OLD + NEW, seed=seed)
    return model


@both_heads
def test_generation_reads_and_writes_added_tokens(tied: bool) -> None:
    model = adapted(tied=tied)
    with torch.no_grad():
        for row in token_rows(model).values():
            row[1] = 20 * row[1].sign()  # such a row wins or loses everywhere
        best = logits(model)[0, -1].argmax()
        cached = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, IDS.shape[1] :]
        text = IDS
        for _ in range(4):
            text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert cached[0] == best
    assert torch.equal(cached, text[0, IDS.shape[1] :])


@both_heads
def test_merging_puts_the_rows_into_the_base(tied: bool) -> None:
    model = adapted(tied=tied)
    train(model, 3)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert relative(logits(merged), expected) < RELATIVE


def test_a_head_with_a_bias_is_refused_in_one_line() -> None:
    """PEFT would leave the bias out, in training and wherever the adapter is loaded."""
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("phi", **{k: v for k, v in SHAPE.items() if not k.startswith("tie")})
    )
    grow_embeddings(model, OLD + NEW, seed=0)
    with pytest.raises(UserError, match="phi head, which has a bias") as caught:
        lora().apply(model, seed=0, token_rows=ADDED)
    assert "\n" not in str(caught.value)
    assert lora().apply(model, seed=0) is not None
