"""Fused norms and gates against the models' own forward and backward, over every architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import ACCEPTED, ILL_CONDITIONED, default_config, distance, documents, flat, gradients, random_model
from transformers import AutoModelForCausalLM

from lmlab.models.attention import use_packed_attention
from lmlab.models.footprint import Footprint
from lmlab.models.fused import _RMSNorm, use_fused_layers
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
    ("model_type", "count"), [("llama", 2 * 3 + 1), ("gpt2", 2), ("qwen3", 2 * 5 + 1), ("gemma2", 0)]
)
def test_only_what_computes_the_same_is_switched(model_type: str, count: int) -> None:
    assert use_fused_layers(random_model(model_type)) == count


def test_a_bf16_model_and_autocast() -> None:
    model = random_model("llama")
    fused = copy.deepcopy(model)
    assert use_fused_layers(fused) == 7
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
