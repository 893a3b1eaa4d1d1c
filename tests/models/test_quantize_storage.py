"""Bits per parameter and bytes against the formulas, every piece of quantization state counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lmlab.models.adapters import count_parameters
from lmlab.models.build import Scratch, build_model
from lmlab.models.quantize import linear_storage, quants, stored_bytes

SHAPES = [(192, 192), (512, 192), (192, 512), (96, 192)]
SLACK = 0.005  # a block of scales begun and not filled, and the 32 bits of double quantization's offset


class Layers(nn.Module):
    """Linear layers of the shapes wanted, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in SHAPES)
        self.head = nn.Linear(192, 50, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def apply(model: Any, kind: str, **values: Any) -> Any:
    config: Any = quants.class_of(kind).model_validate({"kind": kind, **values})
    config.apply(model, compute_dtype=torch.float32)
    return model


def expected_bits(kind: str, double: bool, rows: int, cols: int) -> float:
    if kind in ("none", "fp16", "bf16"):
        return 32 if kind == "none" else 16
    if kind == "int8":
        return 8 + 32 / cols
    # per 64 values one scale: fp32, or 8 bits and per 256 of them an fp32 scale; tables of 16 and 256 fp32 values
    scales, tables = (8 / 64 + 32 / (64 * 256), 8704) if double else (32 / 64, 512)
    return 4 + scales + tables / (rows * cols)


CASES = [
    ("none", None),
    ("fp16", None),
    ("bf16", None),
    ("int8", None),
    ("nf4", True),
    ("nf4", False),
    ("fp4", True),
    ("fp4", False),
]


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_bits_per_parameter(kind: str, double: bool | None) -> None:
    model = apply(Layers(), kind, **({} if double is None else {"double_quant": double}))
    storage = linear_storage(model)
    assert [layer.shape for layer in storage] == SHAPES
    for layer in storage:
        expected = expected_bits(kind, bool(double), *layer.shape)
        assert expected <= layer.bits_per_param + 1e-9, layer
        assert layer.bits_per_param <= expected + SLACK, layer
        if double:
            assert layer.bits_per_param < 4.127 + 8704 / (layer.shape[0] * layer.shape[1]) + SLACK


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_stored_bytes_are_the_linears_and_the_rest(kind: str, double: bool | None) -> None:
    model = apply(Layers(), kind, **({} if double is None else {"double_quant": double}))
    head = sum(p.numel() * p.element_size() for p in model.head.parameters())
    assert stored_bytes(model) == sum(layer.bits for layer in linear_storage(model)) // 8 + head
    again = stored_bytes(model)
    with torch.no_grad():  # int8 moves its scales at the first product
        for layer in model.layers:
            layer(torch.randn(2, layer.in_features))
    assert stored_bytes(model) == again
    assert count_parameters(model)[0] == sum(r * c for r, c in SHAPES) + 192 * 50


def scratch(architecture: str, **config: Any) -> Any:
    about = Scratch(
        kind="scratch", name="tiny", architecture=architecture, config=config, gradient_checkpointing=False
    )
    return build_model(about, about.hf_config(97), seed=0, dtype=torch.float32)


def gpt2() -> Any:
    return scratch("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=32)


@pytest.mark.parametrize("kind", ["none", "fp16", "int8", "nf4"])
def test_gpt2_layers_are_named_out_by_in(kind: str) -> None:
    model = apply(gpt2(), kind, **({"double_quant": True} if kind == "nf4" else {}))
    shapes = {
        layer.name.rsplit(".", 2)[-2:][0] + layer.name[-6:]: layer.shape for layer in linear_storage(model)
    }
    assert set(shapes.values()) == {(192, 64), (64, 64), (256, 64), (64, 256)}
    assert len(linear_storage(model)) == 8


@pytest.mark.parametrize("kind", ["fp16", "int8", "nf4"])
def test_quantizing_draws_nothing_from_the_global_rng(kind: str) -> None:
    model = gpt2()
    before = torch.get_rng_state()
    apply(model, kind, **({"double_quant": True} if kind == "nf4" else {}))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_head_counts_once() -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert stored_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_no_input_is_kept_for_the_backward_pass(kind: str) -> None:
    """A frozen product needs its weight only; bitsandbytes' own int8 function holds on to the input."""
    import gc
    import weakref

    layer = apply(Layers(), kind).layers[0]
    x = torch.randn(3, 192, requires_grad=True) * 1
    held = weakref.ref(x)
    out = layer(x)
    del x
    gc.collect()
    assert held() is None
    out.sum().backward()
