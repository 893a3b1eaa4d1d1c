"""Flat rows against each document alone through transformers' own eager attention, for every architecture allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import WINDOW, documents, flat, gradients, padded, random_model, relative

from lmlab.models.attention import (
    FLAT_MODEL_TYPES,
    NAME,
    attention,
    document_groups,
    packed_attention,
    supports_flat,
    use_packed_attention,
)
from lmlab.models.build import enable_checkpointing
from lmlab.models.head import supervised_logits

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order; measured 1e-7 .. 2e-6
TYPES = sorted(FLAT_MODEL_TYPES)
WINDOWED = ["mistral", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"]


def flat_logits(model: Any, examples: Any) -> list[torch.Tensor]:
    """Logits of each document out of one flat row, every position."""
    batch = flat(examples)
    assert batch.cu_seqlens is not None
    with torch.no_grad():
        out = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            lmlab_documents=document_groups(batch.cu_seqlens),
        )
    return list(out.logits[0].split([len(e.input_ids) for e in examples]))


def alone_logits(model: Any, examples: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=e.input_ids[None], use_cache=False).logits[0] for e in examples]


@pytest.mark.parametrize("model_type", TYPES)
def test_against_eager_one_document_at_a_time_logits(model_type: str) -> None:
    reference = random_model(model_type)
    model = copy.deepcopy(reference)
    assert supports_flat(model.config)
    use_packed_attention(model)
    assert (reference.config._attn_implementation, model.config._attn_implementation) == ("eager", NAME)
    examples = documents()
    found, expected = flat_logits(model, examples), alone_logits(reference, examples)
    assert relative(torch.cat(found), torch.cat(expected)) < RELATIVE

    examples[0].input_ids.copy_(documents(seed=9)[0].input_ids)
    changed = flat_logits(model, examples)
    assert not torch.equal(changed[0], found[0])
    assert all(torch.equal(a, b) for a, b in zip(changed[1:], found[1:], strict=True)), (
        "a document sees another"
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("model_type", TYPES)
def test_against_eager_one_document_at_a_time_gradients(model_type: str, checkpointing: bool) -> None:
    reference = random_model(model_type)
    model = copy.deepcopy(reference)
    use_packed_attention(model)
    if checkpointing:
        enable_checkpointing(model)
        assert model.is_activation_checkpointing
    examples = documents()
    logits, labels = supervised_logits(model, flat(examples))
    loss = F.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    expected = torch.zeros(())
    for example in examples:
        out = reference(input_ids=example.input_ids[None], use_cache=False).logits[0]
        expected = expected + F.cross_entropy(out, example.labels, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert relative(gradients(model), gradients(reference)) < RELATIVE


@pytest.mark.parametrize("model_type", WINDOWED)
def test_sliding_window_is_active_in_these_tests(model_type: str) -> None:
    """Without the window the logits are others, so the comparison above would see it ignored."""
    windowed = random_model(model_type)
    full = random_model(model_type, sliding_window=64)
    examples = documents()
    assert relative(flat_under(windowed, examples), flat_under(full, examples)) > 0.01


def flat_under(model: Any, examples: Any) -> torch.Tensor:
    with attention(model, NAME):
        return torch.cat(flat_logits(model, examples))


@pytest.mark.parametrize("position", ["dynamic", "longrope"])
def test_against_eager_padded_batch_length_dependent_rope(position: str) -> None:
    """Here the longest document of a batch sets the angles of all, so documents alone differ; padded rows do not."""
    if position == "dynamic":
        rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        reference = random_model("llama", rope_parameters=rope, max_position_embeddings=8)
    else:
        rope = {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
            "rope_theta": 1e4,
        }
        rope["original_max_position_embeddings"] = 8
        reference = random_model("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    model = copy.deepcopy(reference)
    use_packed_attention(model)
    examples = documents()
    with torch.no_grad():
        rows = reference(padded(examples).input_ids, use_cache=False).logits
    expected = torch.cat([row[: len(e.input_ids)] for row, e in zip(rows, examples, strict=True)])
    assert relative(torch.cat(flat_logits(model, examples)), expected) < RELATIVE
    assert relative(torch.cat(alone_logits(reference, examples)), expected) > 0.01


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("mistral", {"head_dim": 24}),
        ("olmo", {"clip_qkv": 0.5}),
        ("phi", {"qk_layernorm": True}),
    ],
)
def test_against_eager_one_document_at_a_time_variants(where: str, changes: dict[str, Any]) -> None:
    reference = random_model(where, **changes)
    model = copy.deepcopy(reference)
    use_packed_attention(model)
    examples = documents()
    expected = torch.cat(alone_logits(reference, examples))
    assert relative(torch.cat(flat_logits(model, examples)), expected) < RELATIVE


@pytest.mark.parametrize("where", ["gpt2", "llama", "gpt_neox"])
def test_dropout_in_attention_is_honoured(where: str) -> None:
    model = random_model(where, **{"attn_pdrop" if where == "gpt2" else "attention_dropout": 0.5})
    use_packed_attention(model)
    examples = documents()
    first, second = (torch.cat(flat_logits(model, examples)) for _ in range(2))
    assert relative(first, second) > 0.01
    model.eval()
    first, second = (torch.cat(flat_logits(model, examples)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "starcoder2"])
def test_against_eager_bf16_autocast(model_type: str) -> None:
    reference = random_model(model_type).eval()
    model = copy.deepcopy(reference)
    use_packed_attention(model)
    examples = documents()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.cat(flat_logits(model, examples)).float()
    exact = torch.cat(alone_logits(reference, examples))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.cat(alone_logits(reference, examples)).float()
    # Both round; the packed one must not be further from the fp32 values than twice the eager one.
    assert relative(found, exact) < 2 * relative(expected, exact)


def test_against_eager_attention_with_wider_window_than_documents() -> None:
    reference = random_model("mistral", sliding_window=13)
    model = copy.deepcopy(reference)
    use_packed_attention(model)
    examples = documents([13, 14, 2])
    assert (
        relative(torch.cat(flat_logits(model, examples)), torch.cat(alone_logits(reference, examples)))
        < RELATIVE
    )


def test_generation_switches_back_and_forth() -> None:
    model = random_model("llama")
    before = torch.cat(alone_logits(model, documents()))
    use_packed_attention(model)
    with attention(model, "eager"):
        assert torch.equal(torch.cat(alone_logits(model, documents())), before)
    assert model.config._attn_implementation == NAME
    with pytest.raises(RuntimeError), attention(model, "eager"):
        raise RuntimeError
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize(
    "argument",
    [
        {"softcap": 50.0},
        {"s_aux": torch.zeros(2)},
        {"is_causal": False},
        {"position_bias": torch.zeros(1)},
        {"attention_mask": torch.ones(1, 1, 5, 5)},
        {"lmlab_documents": None},
    ],
    ids=lambda a: next(iter(a)),
)
def test_an_argument_it_does_not_honour_raises(argument: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 5, 8)
    documents_ = document_groups(torch.tensor([0, 5], dtype=torch.int32))
    given = {"attention_mask": None, "lmlab_documents": documents_} | argument
    with pytest.raises(RuntimeError, match="cannot honour"):
        packed_attention(torch.nn.Identity(), q, q, q, **given)
    good = given | {"attention_mask": None, "lmlab_documents": documents_, next(iter(argument)): None}
    good |= {"lmlab_documents": documents_, "is_causal": True, "sliding_window": WINDOW}
    packed_attention(torch.nn.Identity(), q, q, q, **good)


def test_value_heads_may_have_another_width() -> None:
    q, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    groups = document_groups(torch.tensor([0, 3, 5], dtype=torch.int32))
    found, _ = packed_attention(torch.nn.Identity(), q, q, v, None, lmlab_documents=groups)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(q[:, :, a:b], q[:, :, a:b], v[:, :, a:b], is_causal=True)
            for a, b in ((0, 3), (3, 5))
        ],
        dim=2,
    )
    assert relative(found, expected.transpose(1, 2)) < RELATIVE
