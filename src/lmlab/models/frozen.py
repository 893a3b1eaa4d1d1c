"""The product with a frozen weight that is stored in another type than it is multiplied in."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from lmlab.models.int4 import dequantize_int4


def frozen_product(layer: Any, x: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """``[..., in] -> [..., out]`` in the input's type (autocast's, if on); ``scales`` as `read_stored` takes them."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    shape = (layer.out_features, layer.in_features)
    return _FrozenProduct.apply(x, bias, layer.weight, scales, shape)  # type: ignore[return-value]


def read_stored(
    stored: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight ``[out, in]`` in ``dtype``.

    Args:
        stored: 16-bit floats, int8 or `int4`'s packed codes (uint8).
        scales: None for floats; for int8 the absolute maximum of each row; those of `int4`.
    """
    if scales is None:
        return stored.to(dtype)
    if stored.dtype == torch.uint8:
        return dequantize_int4(stored, scales, shape, dtype)
    return stored.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


class _FrozenProduct(torch.autograd.Function):
    """``x @ w.T + bias`` with a frozen ``w``: its stored form is kept for the backward pass, not its upcast copy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        stored: torch.Tensor,
        scales: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(stored, scales)
        ctx.shape = shape
        return F.linear(x, read_stored(stored, scales, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        stored, scales = ctx.saved_tensors
        return grads[0] @ read_stored(stored, scales, ctx.shape, grads[0].dtype), None, None, None, None


def packed_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`frozen_product` of a layer that reads its weight by a method of its own (`quantize.PackedLinear.unpacked`)."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return _PackedProduct.apply(x, bias, layer)  # type: ignore[return-value]


class _PackedProduct(torch.autograd.Function):
    """As `_FrozenProduct`: the weight is read anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.layer.unpacked(grads[0].dtype), None, None
