"""Fused norms and gates against the models' own forward and backward, over every architecture."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from tiny import ACCEPTED, ILL_CONDITIONED, default_config, distance, documents, flat, gradients, random_model
from transformers import AutoConfig, AutoModelForCausalLM

from lmlab.models.attention import use_packed_attention
from lmlab.models.footprint import Footprint
from lmlab.models.fused import FusedRotary, _ReluSquared, _RMSNorm, _rotates_alike, use_fused_layers
from lmlab.models.head import loss_sum
from lmlab.models.probe import _twin

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 sums in another order
FAST = ("llama", "gemma2", "qwen3", "olmo2", "gpt2", "mixtral")
EVERY = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ACCEPTED]


def step(model: Any) -> tuple[float, torch.Tensor]:
    use_packed_attention(model)
    loss = loss_sum(model, flat(documents()))
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("model_type", EVERY)
def test_against_transformers_loss_and_gradients(model_type: str) -> None:
    model = _twin(default_config(model_type))
    fused = copy.deepcopy(model)
    use_fused_layers(fused)
    (expected, reference), (found, grads) = step(model), step(fused)
    assert found == pytest.approx(expected, rel=RELATIVE)
    assert distance(grads, reference) < ILL_CONDITIONED.get(model_type, RELATIVE)


@pytest.mark.parametrize(
    ("model_type", "count"),
    [("llama", 2 * 4 + 1), ("gpt2", 2), ("qwen3", 2 * 6 + 1), ("gemma2", 2), ("cohere", 2), ("glm4", 9)],
)
def test_only_what_computes_the_same_is_switched(model_type: str, count: int) -> None:
    assert use_fused_layers(random_model(model_type)) == count


def test_a_bf16_model_and_autocast() -> None:
    model = random_model("llama")
    fused = copy.deepcopy(model)
    assert use_fused_layers(fused) == 9
    exact = step(copy.deepcopy(model))[1]

    def error(one: Any) -> float:
        return ((step(one)[1].float() - exact).norm() / exact.norm()).item()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(fused) < 1.5 * error(model)
    assert error(fused.to(torch.bfloat16)) < 1.5 * error(model.to(torch.bfloat16))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma", "gpt2", "qwen3", "olmo2"])
def test_the_memory_plan_switches_what_a_run_switches(model_type: str) -> None:
    real = random_model(model_type)
    with Footprint().active():
        fake = AutoModelForCausalLM.from_config(real.config)
        planned = use_fused_layers(fake, unchecked=True)
    assert planned == use_fused_layers(real)


def test_a_norm_keeps_its_input_and_a_number_a_row() -> None:
    kept: dict[int, int] = {}
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(64)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
    ):
        held = _RMSNorm.apply(x, weight, 1e-6)
    assert held.requires_grad
    assert sorted(kept.values()) == [50, 64, 50 * 64]


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8), (8,), (0, 8)])
@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_s_gradient_against_differences(shape: tuple[int, ...], trained: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.double, requires_grad=trained)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-6), (x, weight))


def test_a_gate_keeps_its_two_inputs_only() -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
        ):
            held = model.model.layers[0].mlp(torch.randn(50, 64, requires_grad=True))
        assert held.requires_grad
        return sum(n for n in sizes.values() if n == 50 * 96)

    model = random_model("llama").requires_grad_(False)
    assert kept(model) == 3 * 50 * 96
    use_fused_layers(model)
    assert kept(model) == 2 * 50 * 96


def test_another_model_of_the_process_is_not_touched() -> None:
    first, other = random_model("llama"), random_model("llama")
    use_fused_layers(first)
    library = sys.modules[type(other).__module__]
    assert not isinstance(vars(library)["apply_rotary_pos_emb"], FusedRotary)
    assert type(other.model.layers[0].self_attn) is library.LlamaAttention
    assert isinstance(first.model.layers[0].self_attn, library.LlamaAttention)
    assert use_fused_layers(first) == 0, "once is enough"


def test_a_rotation_against_llama_s_own_in_every_layout() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    assert not isinstance(apply_rotary_pos_emb, FusedRotary)
    fused = FusedRotary(apply_rotary_pos_emb)
    generator = torch.Generator().manual_seed(0)
    for batch, heads, kv, width, rows in ((2, 4, 2, 8, 2), (1, 2, 2, 6, 1), (3, 4, 1, 8, 1)):
        # As the layers make them: a view of [batch, time, heads, width]; cos and sin of one row for all, or each its own.
        q, k = (torch.randn(batch, 5, n, width, generator=generator).transpose(1, 2) for n in (heads, kv))
        angles = torch.randn(rows, 5, width // 2, generator=generator).repeat(1, 1, 2)
        q, k = q.requires_grad_(), k.requires_grad_()
        found, expected = (f(q, k, angles.cos(), angles.sin()) for f in (fused, apply_rotary_pos_emb))
        upstream = [torch.randn(out.shape, generator=generator) for out in found]
        grads = [torch.autograd.grad(made, (q, k), upstream) for made in (found, expected)]
        for ours, theirs in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_rotation_of_a_part_or_in_another_type_is_the_library_s() -> None:
    called = []

    def own(*told: Any, **named: Any) -> Any:
        called.append(named)
        return told

    fused, q, cos = FusedRotary(own), torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
    fused(q, q, cos[..., :4], cos[..., :4])
    fused(q.bfloat16(), q.bfloat16(), cos, cos)
    fused(q, q, cos, cos, unsqueeze_dim=2)
    fused(q, cos=cos, sin=cos)
    fused(q[:, :, :1], q, cos, cos)  # the last positions only
    fused(q, q, cos.clone().requires_grad_(), cos)
    assert called == [{}, {}, {"unsqueeze_dim": 2}, {"cos": cos, "sin": cos}, {}, {}]
    fused(q, q, cos, cos)
    assert len(called) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_double_a_rotation_in_16_bits_is_no_worse_than_the_library_s(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 50, 64, generator=generator).to(dtype) for n in (4, 2))
    angles = torch.randn(2, 50, 32, generator=generator).repeat(1, 1, 2)
    told = (q, k, angles.cos().to(dtype), angles.sin().to(dtype))
    exact = apply_rotary_pos_emb(*[x.double() for x in told])  # type: ignore[arg-type]
    errors = [
        sum((a.double() - b).abs().mean() for a, b in zip(rotate(*told), exact, strict=True))
        for rotate in (FusedRotary(apply_rotary_pos_emb), apply_rotary_pos_emb)
    ]
    assert errors[0] <= errors[1]


def test_what_rotates_in_another_way_stays() -> None:
    def in_fp32(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        return tuple(x.to(q.dtype) for x in apply_rotary_pos_emb(*(x.float() for x in (q, k, cos, sin))))

    def refused(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        raise ValueError("pointer cannot be accessed")

    for own in (
        in_fp32,
        refused,
        lambda q, k, cos, sin: (q, k, q),
        lambda q, k, cos, sin: (q[None], k[None]),
    ):
        assert not _rotates_alike(own)


def test_a_squared_relu_against_transformers_s_own_and_against_differences() -> None:
    from transformers.activations import ACT2FN

    x = torch.randn(4, 9, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(_ReluSquared.apply, (x,))
    assert torch.equal(_ReluSquared.apply(x), ACT2FN["relu2"](x))
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=97, hidden_act="relu2",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    expected = step(copy.deepcopy(model))
    assert use_fused_layers(model) == 4, "two activations and two rotations"
    found = step(model)
    assert found[0] == pytest.approx(expected[0], rel=RELATIVE)
    assert distance(found[1], expected[1]) < RELATIVE
