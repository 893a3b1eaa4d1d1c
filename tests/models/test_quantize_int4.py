"""int4: codes by hand, bits, exact products, training over it, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lmlab.models.adapters import Lora, count_parameters
from lmlab.models.build import Scratch, base_fingerprint, build_model
from lmlab.models.hardware import move_rest_to
from lmlab.models.int4 import dequantize_int4, quantize_int4
from lmlab.models.lora import FusedLora
from lmlab.models.quantize import (
    FourBitInteger,
    Int4Linear,
    dense_weight,
    is_dense,
    linear_storage,
    stored_bytes,
)

INT4 = FourBitInteger(kind="int4")
LORA = Lora(kind="lora", rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear")
ROUNDING = 1e-5
"""Relative, of fp32 sums of equal values in another order."""


def weight(rows: int, cols: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def scratch(architecture: str, **config: Any) -> Any:
    about = Scratch(
        kind="scratch", name="tiny", architecture=architecture, config=config, gradient_checkpointing=False
    )
    return build_model(about, about.hf_config(97), seed=0, dtype=torch.float32)


def gpt2() -> Any:
    """A model with biases and with Conv1D layers."""
    return scratch(
        "gpt2",
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    )


def llama() -> Any:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return scratch("llama", **shape, intermediate_size=172)  # 172 is no multiple of the block


def stored(model: Any) -> Any:
    INT4.apply(model.requires_grad_(False), compute_dtype=torch.float32)
    return model


def test_a_block_by_hand() -> None:
    """Its largest value is 7: the others go to the nearest seventh, as -8 would be beyond the absolute maximum."""
    values = torch.zeros(1, 64)
    values[0, :5] = torch.tensor([-7.0, 3.4, -3.6, 0.4, 6.9])
    packed, scales = quantize_int4(values)
    assert (packed.dtype, packed.shape, scales.tolist()) == (torch.uint8, (32,), [1.0])
    assert packed[:3].tolist() == [(1 << 4) | 11, (4 << 4) | 8, (15 << 4) | 8]
    found = dequantize_int4(packed, scales, (1, 64), torch.float32)
    assert found[0, :5].tolist() == [-7, 3, -4, 0, 7]
    assert not found[0, 5:].any()


def test_against_plain_torch() -> None:
    """Every value is the nearest seventh of its block's absolute maximum."""
    dense = weight(172, 64)
    found = dequantize_int4(*quantize_int4(dense), (172, 64), torch.float32)
    blocks = dense.view(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    nearest = ((blocks / step).round() * step).view_as(dense)
    assert torch.allclose(found, nearest, rtol=1e-6, atol=1e-9)
    assert (found - dense).abs().view(-1, 64).le(step * 0.5001).all()


@pytest.mark.parametrize("shape", [(3, 7), (64, 64), (5, 172)])
def test_what_was_stored_once_is_stored_alike_again(shape: tuple[int, int]) -> None:
    """Also where blocks do not fill the weight, and where one is all zero."""
    dense = weight(*shape)
    dense.view(-1)[:64] = 0
    packed, scales = quantize_int4(dense)
    once = dequantize_int4(packed, scales, shape, torch.float32)
    again, scales_again = quantize_int4(once)
    assert once.isfinite().all()
    assert torch.equal(again, packed)
    assert torch.allclose(scales_again, scales, rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (512, 192), (96, 172)])
def test_bits_per_parameter(shape: tuple[int, int]) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(shape[1], shape[0], bias=False)
            self.head = nn.Linear(4, 4, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model: Any = One()
    INT4.apply(model, compute_dtype=torch.float32)
    (layer,) = linear_storage(model)
    assert layer.shape == shape
    assert layer.bits_per_param == pytest.approx(4 + 32 / 64, abs=0.005)
    assert stored_bytes(model) == layer.bits // 8 + 4 * 16
    assert count_parameters(model)[0] == shape[0] * shape[1] + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_product_is_that_of_the_dequantized_weight_exactly(build: Any, dtype: torch.dtype) -> None:
    model = stored(build())
    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    assert len(layers) == len(linear_storage(model)) > 0
    for layer in layers:
        assert is_dense(layer)
        dense = dense_weight(layer, dtype)
        assert dense.shape == (layer.out_features, layer.in_features)
        x = torch.randn(2, 3, layer.in_features, dtype=dtype, requires_grad=True)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        for training in (True, False):
            assert torch.equal(layer.train(training)(x), F.linear(x, dense, bias))
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(gradient, torch.ones_like(out) @ dense)


def test_under_autocast_products_are_in_its_type() -> None:
    layer = Int4Linear(weight(32, 64), None)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, F.linear(x.bfloat16(), dense_weight(layer, torch.bfloat16)))


def test_the_scales_stay_in_32_bits_where_the_rest_of_the_base_goes_to_16() -> None:
    model = stored(gpt2())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    move_rest_to(model, torch.bfloat16)
    layer = next(module for module in model.modules() if isinstance(module, Int4Linear))
    assert layer.scales.dtype == torch.float32
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_copy_and_a_state_dict_hold_the_same_weight() -> None:
    model = stored(gpt2())
    again = copy.deepcopy(model)
    other = stored(scratch("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=32))
    for parameter in other.parameters():  # whatever was there
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    for found in (again, other):
        assert torch.equal(found.eval()(ids).logits, model.eval()(ids).logits)


def loss_of(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("build", [gpt2, llama])
def test_lora_over_it_has_the_gradients_of_lora_over_the_dequantized_base(build: Any) -> None:
    model, dense = stored(build()), build().requires_grad_(False)
    ours = {name: module for name, module in model.named_modules() if isinstance(module, Int4Linear)}
    for name, module in dense.named_modules():
        if name in ours:
            values = dense_weight(ours[name], torch.float32)
            module.weight.data = values if isinstance(module, nn.Linear) else values.t().contiguous()
    pairs = []
    for base in (model, dense):
        adapted = LORA.apply(base, seed=0)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # else A has no gradient
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        loss = loss_of(adapted)
        loss.backward()
        assert sum(isinstance(module, FusedLora) for module in adapted.modules()) == len(ours)
        pairs.append((loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}))
    (found, grads), (expected, reference) = pairs
    assert found.item() == pytest.approx(expected.item(), rel=ROUNDING)
    assert set(grads) == set(reference)
    for name, gradient in grads.items():
        assert reference[name].abs().max() > 0
        assert (gradient - reference[name]).norm() <= ROUNDING * reference[name].norm(), name


def test_lora_over_it_learns_and_leaves_it_alone() -> None:
    model = LORA.apply(stored(llama()), seed=0)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name


def test_pefts_own_merge_fails_instead_of_spoiling_the_codes() -> None:
    model = LORA.apply(stored(llama()), seed=0)
    layer = next(module for module in model.modules() if isinstance(module, Int4Linear))
    before = layer.weight.clone()
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    assert torch.equal(layer.weight, before)


def test_the_fingerprint_is_taken_of_the_base_before_it_is_stored() -> None:
    assert base_fingerprint(gpt2()) == base_fingerprint(gpt2())
    assert base_fingerprint(stored(gpt2())) != base_fingerprint(gpt2())
