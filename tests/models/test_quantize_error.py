"""Error of each storage on normal weights against its expectation by numerical integration, and what double quantization saves."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from lmlab.models.quantize import dense_weight, linear_storage, quants

SIDE = 1024
SAMPLING = 0.01
"""Relative: of the error's norm over a million normal values (standard deviation about 0.001), int8's fp16 weights included."""


def levels(kind: str) -> torch.Tensor:
    """Values a weight may take over its block's absolute maximum, ascending."""
    if kind in ("int8", "int4"):
        largest = 127 if kind == "int8" else 7
        return torch.arange(-largest, largest + 1, dtype=torch.float64) / largest
    from bitsandbytes.functional import get_4bit_type

    return torch.as_tensor(get_4bit_type(kind, device="cpu")).double().sort().values.unique()


@cache
def expected_error(kind: str, block: int) -> float:
    """RMS error over RMS weight of normal weights in blocks scaled by their largest magnitude M, integrated over M.

    The density of M is ``block * 2 phi(M) * (2 Phi(M) - 1)^(block - 1)``; the other values of the block are normal,
    cut off at M; the largest itself is kept exactly.
    """
    code = levels(kind)
    largest = torch.linspace(0.5, 7.0, 400, dtype=torch.float64)[:, None]
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    inside = 2 * normal.cdf(largest) - 1
    density = block * 2 * normal.log_prob(largest).exp() * inside ** (block - 1)
    share = (torch.arange(8000, dtype=torch.float64) + 0.5)[None] / 4000 - 1  # midpoints of [-1, 1]
    middle = (code[1:] + code[:-1]) / 2
    nearest = code[torch.bucketize(share, middle)]
    squared = (share - nearest).square() * largest.square()
    within = (normal.log_prob(share * largest).exp() * largest / 4000 / inside * squared).sum(1, keepdim=True)
    weights = density / density.sum()
    return math.sqrt((weights * within).sum().item() * (block - 1) / block)


class One(nn.Module):
    """One layer of the weights wanted, and a head."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.layer = nn.Linear(side, side, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.layer.weight.data = torch.randn(side, side, generator=generator) * 0.02

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def stored(side: int, kind: str, **values: Any) -> Any:
    model: Any = One(side)
    quants.class_of(kind).model_validate({"kind": kind, **values}).apply(model, compute_dtype=torch.float32)  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize(("kind", "percent"), [("nf4", 9.2), ("fp4", 12.2), ("int4", 10.8), ("int8", 0.75)])
def test_against_integrated_error_of_normal_weights(kind: str, percent: float) -> None:
    """int4's levels lie more evenly than fp4's, and on normal weights it is the better of the two by this measure."""
    expected = expected_error(kind, SIDE if kind == "int8" else 64)
    assert 100 * expected == pytest.approx(percent, abs=0.05)
    before = One(SIDE).layer.weight.data
    model = stored(SIDE, kind, **({"double_quant": False} if kind in ("nf4", "fp4") else {}))
    error = dense_weight(model.layer, torch.float32) - before
    assert (error.norm() / before.norm()).item() == pytest.approx(expected, rel=SAMPLING)


@pytest.mark.parametrize(("side", "saved"), [(512, 0.342), (2048, 0.371)])
def test_double_quantization_saves_what_the_formula_says(side: int, saved: float) -> None:
    """Scales of 8 bits for 32, less their own scales, and per layer an offset and a second table of 256 floats."""
    single, double = (
        linear_storage(stored(side, "nf4", double_quant=on))[0].bits_per_param for on in (False, True)
    )
    assert single - double == pytest.approx(0.373 - 8704 / side**2 + 512 / side**2, abs=0.005)
    assert single - double == pytest.approx(saved, abs=0.005)
