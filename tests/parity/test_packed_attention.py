"""Flat rows against each document alone through transformers' own eager attention, and nothing seen across documents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    ACCEPTED,
    ILL_CONDITIONED,
    WINDOW,
    default_config,
    distance,
    documents,
    flat,
    gradients,
    padded,
    random_model,
    relative,
)

from lmlab.models.attention import (
    NAME,
    Documents,
    attention,
    packed_attention,
    use_packed_attention,
)
from lmlab.models.build import enable_checkpointing
from lmlab.models.head import supervised_logits
from lmlab.models.probe import _twin
from lmlab.records import Example

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order; measured 1e-7 .. 2e-6
ROUNDING = 1e-5  # as much again, where products over another number of rows round otherwise; measured 2e-6
TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "olmo",
    "olmo2",
    "granite",
    "smollm3",
    "starcoder2",
]
FAST = ("llama", "gpt2", "gemma2", "gpt_oss", "minicpm3", "mixtral")
EVERY = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ACCEPTED]
WINDOWED = ["mistral", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"]


@pytest.fixture(autouse=True, params=[0, 10**9], ids=["each", "rectangles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways over documents on a CPU, which otherwise their mean length decides."""
    monkeypatch.setattr("lmlab.models.attention.LONG", request.param)


def flat_logits(model: Any, examples: Any) -> list[torch.Tensor]:
    """Logits of each document out of one flat row, every position."""
    batch = flat(examples)
    assert batch.cu_seqlens is not None
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        lmlab_documents=Documents(batch.cu_seqlens),
    )
    return list(out.logits[0].split([len(e.input_ids) for e in examples]))


def alone_logits(model: Any, examples: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=e.input_ids[None], use_cache=False).logits[0] for e in examples]


@pytest.mark.parametrize("model_type", TYPES)
def test_against_eager_one_document_at_a_time_logits(model_type: str) -> None:
    reference = random_model(model_type)
    model = copy.deepcopy(reference)
    use_packed_attention(model)
    assert (reference.config._attn_implementation, model.config._attn_implementation) == ("eager", NAME)
    examples = documents()
    with torch.no_grad():
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


def padded_logits(model: Any, examples: list[Example]) -> list[torch.Tensor]:
    """Logits of each document out of padded rows, one document each."""
    rows = model(input_ids=padded(examples).input_ids, use_cache=False).logits
    return [row[: len(e.input_ids)] for row, e in zip(rows, examples, strict=True)]


def assert_apart(model: Any, logits: Any) -> None:
    """Changing any document leaves the logits of every other exactly as they were.

    Experts get all tokens routed to them as one matrix, whose product may round otherwise with another number of rows:
    of such models the last bits may move, and what is exactly 0 is the gradient between documents.
    """
    examples = documents()
    routed = any("experts" in name for name, _ in model.named_modules())
    with torch.no_grad():
        before = logits(model, examples)
        allowed = ROUNDING * max(float(one.abs().max()) for one in before) if routed else 0.0
        for changed in range(len(examples)):
            others = list(examples)
            others[changed] = documents(seed=7)[changed]
            after = logits(model, others)
            assert not torch.equal(after[changed], before[changed])
            moved = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
            assert all(m <= allowed for i, m in enumerate(moved) if i != changed), (changed, moved)
    if routed:
        assert_no_path(model, logits, examples)


def assert_no_path(model: Any, logits: Any, examples: list[Example]) -> None:
    """The logits of each document have a gradient in its own embeddings and exactly 0 in those of every other."""
    embedded: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(output.detach().requires_grad_()) or embedded[-1]
    )
    try:
        made = logits(model, examples)
    finally:
        hook.remove()
    lengths = [len(e.input_ids) for e in examples]
    for own, one in enumerate(made):
        (gradient,) = torch.autograd.grad(one.square().sum(), embedded[0], retain_graph=True)
        parts = list(gradient[0].split(lengths)) if len(gradient) == 1 else list(gradient)
        assert [bool(part.any()) for part in parts] == [i == own for i in range(len(parts))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", EVERY)
def test_a_document_in_a_pack_never_moves_another(model_type: str, dtype: torch.dtype) -> None:
    model = _twin(default_config(model_type)).to(dtype)
    use_packed_attention(model)
    assert_apart(model, flat_logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", EVERY)
def test_a_document_in_padded_rows_never_moves_another(model_type: str, implementation: str) -> None:
    model = _twin(default_config(model_type))
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {model_type}")
    with attention(model, implementation):
        assert_apart(model, padded_logits)


@pytest.mark.parametrize("model_type", EVERY)
def test_against_eager_loss_and_gradient_of_single_documents(model_type: str) -> None:
    """The loss sum of a pack is the sum of its documents' losses, and so is the gradient."""
    model = _twin(default_config(model_type)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in (
            "attention_dropout",
            "attn_dropout",
            "dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
        ):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    examples = documents()
    expected = torch.zeros(())
    with attention(model, "eager"):
        for example in examples:
            out = model(input_ids=example.input_ids[None], use_cache=False).logits[0].float()
            expected = expected + F.cross_entropy(out, example.labels, reduction="sum")
        expected.backward()
    reference = gradients(model)
    with attention(model, NAME):
        loss = F.cross_entropy(*supervised_logits(model, flat(examples)), reduction="sum")
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=RELATIVE)
    assert distance(gradients(model), reference) < ILL_CONDITIONED.get(model_type, RELATIVE)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_documents_stay_apart_under_lora_and_checkpointing(storage: str) -> None:
    from lmlab.models.adapters import Lora
    from lmlab.models.quantize import FourBit

    model = _twin(default_config("llama"))
    if storage == "nf4":
        FourBit(kind="nf4", double_quant=True).apply(model, compute_dtype=torch.float32)
    enable_checkpointing(model)
    model = Lora(kind="lora", rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear").apply(
        model, seed=0
    )
    with torch.no_grad():  # B is zero at the start, and the adapter then without effect
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    use_packed_attention(model)
    assert_apart(model.train(), flat_logits)
    examples = documents()
    loss = F.cross_entropy(*supervised_logits(model, flat(examples)), reduction="sum")
    loss.backward()
    found = gradients(model)
    alone = [F.cross_entropy(*supervised_logits(model, flat([e])), reduction="sum") for e in examples]
    torch.stack(alone).sum().backward()
    assert loss.item() == pytest.approx(torch.stack(alone).sum().item(), rel=RELATIVE)
    assert distance(found, gradients(model)) < RELATIVE
    assert len(found) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_against_transformers_softcap_and_sinks(dropout: float) -> None:
    """The explicit path: dropout acts, and without it the values are those of Gemma 2's and gpt-oss's own functions."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    module: Any = torch.nn.Identity()
    module.num_key_value_groups, module.sinks = 2, torch.randn(4)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 6, 8) * 3, torch.randn(1, 2, 6, 8) * 3, torch.randn(1, 2, 6, 8)
    mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    groups = Documents(torch.tensor([0, 6], dtype=torch.int32))
    cases: list[tuple[Any, dict[str, Any]]] = [(gemma2, {"softcap": 2.0}), (gpt_oss, {"s_aux": module.sinks})]
    for own, arguments in cases:
        found, _ = packed_attention(
            module, q, k, v, None, scaling=0.4, dropout=dropout, lmlab_documents=groups, **arguments
        )
        expected = own(module, q, k, v, mask, scaling=0.4, dropout=0.0, **arguments)[0]
        assert (relative(found, expected) < RELATIVE) == (dropout == 0.0)


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
        {"alibi": torch.zeros(2)},
        {"is_causal": False},
        {"position_bias": torch.zeros(1)},
        {"attention_mask": torch.ones(1, 1, 5, 5)},
    ],
    ids=lambda a: next(iter(a)),
)
def test_an_argument_it_does_not_honour_raises(argument: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 5, 8)
    documents_ = Documents(torch.tensor([0, 5], dtype=torch.int32))
    given: dict[str, Any] = {"attention_mask": None, "lmlab_documents": documents_} | argument
    with pytest.raises(RuntimeError, match="cannot honour"):
        packed_attention(torch.nn.Identity(), q, q, q, **given)
    good: dict[str, Any] = (
        given | {next(iter(argument)): None} | {"is_causal": True, "sliding_window": WINDOW}
    )
    packed_attention(torch.nn.Identity(), q, q, q, **good)
    with pytest.raises(RuntimeError, match="does not pass on where the documents lie"):
        packed_attention(torch.nn.Identity(), q, q, q, **{**good, "lmlab_documents": None})


def test_value_heads_may_have_another_width() -> None:
    q, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    groups = Documents(torch.tensor([0, 3, 5], dtype=torch.int32))
    found, _ = packed_attention(torch.nn.Identity(), q, q, v, None, lmlab_documents=groups)
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(q[:, :, a:b], q[:, :, a:b], v[:, :, a:b], is_causal=True)
            for a, b in ((0, 3), (3, 5))
        ],
        dim=2,
    )
    assert relative(found, expected.transpose(1, 2)) < RELATIVE
