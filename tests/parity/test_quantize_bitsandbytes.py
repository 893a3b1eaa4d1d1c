"""Stored weights against transformers' own bitsandbytes loading bit by bit, products against the dequantized weight.

CPUs with AVX512-BF16 matter here: bitsandbytes there repacks 4-bit weights in place at the first forward in eval
mode, with bf16 scales. lmlab turns that off on its layers, and so do these tests on transformers'.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from tiny import documents, padded, random_model, relative
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lmlab.models.build import enable_checkpointing
from lmlab.models.head import supervised_logits
from lmlab.models.quantize import QuantConfig, StoredLinear, linear_storage, quants, stored_bytes

pytestmark = pytest.mark.parity
RELATIVE = 1e-5  # fp32 products of equal weights in another order
ALL = [
    {"kind": "none"},
    {"kind": "fp16"},
    {"kind": "bf16"},
    {"kind": "int8"},
    {"kind": "nf4", "double_quant": True},
    {"kind": "nf4", "double_quant": False},
    {"kind": "fp4", "double_quant": True},
]
FEW_BITS = ALL[3:]  # bitsandbytes'
ALL = [*ALL, {"kind": "int4"}]


def label(values: dict[str, Any]) -> str:
    return values["kind"] + ("" if values.get("double_quant", True) else "-single")


def quant(values: dict[str, Any]) -> QuantConfig:
    config: Any = quants.class_of(values["kind"]).model_validate(values)
    return config


def quantized(model: Any, values: dict[str, Any]) -> Any:
    quant(values).apply(model.requires_grad_(False), compute_dtype=torch.float32)
    return model


def linears(model: Any) -> dict[str, Any]:
    """The quantized layers by name."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def state(layer: Any) -> dict[str, torch.Tensor]:
    """Everything that is stored for a layer's weight."""
    values = {"weight": layer.weight.data}
    inner = getattr(layer.weight, "quant_state", None)
    if inner is None:
        return values | {"SCB": layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB}
    values |= {"absmax": inner.absmax, "code": inner.code}
    if inner.nested:
        values |= {
            "offset": inner.offset,
            "absmax2": inner.state2.absmax,
            "code2": inner.state2.code,
        }
    return values


def dequantized(layer: Any) -> torch.Tensor:
    """The weight as bitsandbytes reads it."""
    values = state(layer)
    if "SCB" in values:
        return values["weight"].float() * (values["SCB"][:, None] / 127)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def by_transformers(folder: Path, values: dict[str, Any]) -> Any:
    if values["kind"] == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=values["kind"],
            bnb_4bit_use_double_quant=values["double_quant"],
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    for layer in linears(model).values():
        layer.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("values", FEW_BITS, ids=label)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_against_transformers_bitsandbytes_loading(
    model_type: str, values: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(model_type).eval()
    model.save_pretrained(tmp_path)
    reference, ours = by_transformers(tmp_path, values), quantized(model, values)
    theirs = linears(reference)
    assert set(linears(ours)) == set(theirs)
    for name, layer in linears(ours).items():
        expected = state(theirs[name])
        for part, tensor in state(layer).items():
            assert tensor.dtype == expected[part].dtype
            assert torch.equal(tensor.flatten(), expected[part].flatten()), (name, part)
    ids = documents([20])[0].input_ids[None]
    # transformers' int8 eval path also quantizes activations; its training path is the weight-only product.
    reference.train(values["kind"] == "int8")
    with torch.no_grad():
        assert relative(ours(ids).logits, reference(ids).logits) < RELATIVE


@pytest.mark.parametrize("values", FEW_BITS, ids=label)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_against_dequantized_product(model_type: str, values: dict[str, Any]) -> None:
    """Train, eval and no_grad give one and the same output, and eval leaves every stored byte as it is."""
    model = quantized(random_model(model_type), values)
    before = {name: {k: v.clone() for k, v in state(layer).items()} for name, layer in linears(model).items()}
    for layer in linears(model).values():
        x = torch.randn(2, 3, layer.in_features)
        expected = F.linear(x, dequantized(layer), layer.bias)
        outputs = [layer.train()(x), layer.eval()(x)]
        with torch.no_grad():
            outputs += [layer(x), layer(x)]
        assert all(torch.equal(out, outputs[0]) for out in outputs)
        assert relative(outputs[0], expected) < RELATIVE
        x.requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        assert (
            relative(x.grad, 2 * F.linear(x, dequantized(layer), layer.bias) @ dequantized(layer)) < RELATIVE
        )
    with torch.no_grad():
        for _ in range(2):
            model.eval()(documents([20])[0].input_ids[None])
    for name, layer in linears(model).items():
        for part, tensor in state(layer).items():
            assert torch.equal(tensor, before[name][part]), (name, part)


@pytest.mark.parametrize("values", ALL, ids=label)
def test_checkpointing_gives_the_same_gradients(values: dict[str, Any]) -> None:
    plain = quantized(random_model("llama"), values)
    again = copy.deepcopy(plain)
    enable_checkpointing(again)
    found = []
    for model in (plain, again):
        embedded = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.train()(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        assert embedded.grad is not None
        found.append(embedded.grad)
    assert relative(found[1], found[0]) < RELATIVE


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "opt"])
def test_against_fp32_model_with_rounded_weights(model_type: str, kind: str) -> None:
    """Gemma 3 scales and OPT shifts in an embedding class of its own; both must survive."""
    shape = {"word_embed_proj_dim": 64, "ffn_dim": 96} if model_type == "opt" else {}
    model = random_model(model_type, **shape).eval()
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for module in reference.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
                weight: Any = module.weight
                weight.copy_(weight.to(dtype))
    quantized(model, {"kind": kind})
    ids = documents([20])[0].input_ids[None]
    with torch.no_grad():
        assert relative(model(ids).logits, reference(ids).logits) < RELATIVE
    stored = [m for m in model.modules() if isinstance(m, (StoredLinear, nn.Embedding))]
    assert {m.weight.dtype for m in stored} == {dtype}
    assert {t.bits_per_param for t in linear_storage(model)} == {16}

    embedding, expected = (
        m.get_input_embeddings()(ids).detach().requires_grad_() for m in (model, reference)
    )
    for m, x in ((model, embedding), (reference, expected)):
        m(inputs_embeds=x).logits.square().sum().backward()
    assert embedding.grad is not None
    assert expected.grad is not None
    assert embedding.grad.dtype == torch.float32
    assert relative(embedding.grad, expected.grad) < RELATIVE


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_stored_linear_under_autocast(kind: str) -> None:
    model = quantized(random_model("phi"), {"kind": kind})
    layer = next(m for m in model.modules() if isinstance(m, StoredLinear))
    x = torch.randn(4, layer.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        expected = F.linear(x, layer.weight, layer.bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.float().sum(), x)
    assert gradient.dtype == torch.float32
    assert relative(gradient, layer.weight.float().sum(0).expand_as(x)) < 2e-2  # bf16 sums


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tied_embeddings_stay_tied(model_type: str, kind: str) -> None:
    model = random_model(model_type, tie_word_embeddings=True)
    full = stored_bytes(model)
    quantized(model, {"kind": kind})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    wide = sum(4 * p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert stored_bytes(model) == (full - wide) // 2 + wide
    assert len(list(model.parameters())) == len({p.data_ptr() for p in model.parameters()})


def test_padded_batch_through_every_kind() -> None:
    """The kinds in order of their error against fp32, on one batch."""
    losses = []
    for values in ALL:
        model = quantized(random_model("llama", std=0.05), values).eval()
        with torch.no_grad():
            logits, labels = supervised_logits(model, padded(documents()))
            losses.append(F.cross_entropy(logits, labels).item())
    errors = [abs(loss - losses[0]) for loss in losses]
    assert max(errors[1:3]) < 1e-3
    assert errors[3] < 0.01
    assert max(errors[4:]) < 0.2
