"""PEFT's LoRA layers with one fused product: the same parameters, names and files, fewer passes over memory.

PEFT's own forward makes the base's result, clones it, casts the input, multiplies twice, scales, adds and casts back;
each step reads and writes ``[tokens, width]`` once more, and autograd keeps what it needs of each. Here the update is
added in place by the product itself and the backward pass keeps the input and a ``[tokens, rank]`` matrix; the frozen
weight is read from its storage (16 bits, int8, 4 bits) and never gets a gradient. As in Unsloth's and Axolotl's
kernels, in plain torch. DoRA is PEFT's arithmetic over any storage, with the norms of the summed weight in fp32. What is
neither (other variants, several active adapters, merged, a bias on B) goes PEFT's way.

LoRA: arXiv 2106.09685, equation 3; QLoRA: arXiv 2305.14314, equation 5; rsLoRA (2312.03732): another scale; DoRA: arXiv
2402.09353, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lmlab.models.fused import mixed_class
from lmlab.models.quantize import dense_weight, is_dense


def use_fused_lora(model: nn.Module) -> int:
    """Switch every LoRA layer over a linear layer to the fused product, in place; how many.

    A layer keeps its class's name, parameters and PEFT's methods (merge, save, disable); only forward is another.
    """
    switched = 0
    for module in list(model.modules()):
        if (
            not isinstance(module, LoraLayer)
            or isinstance(module, FusedLora)
            or not isinstance(module, nn.Module)
        ):
            continue
        if is_dense(module.get_base_layer()):
            module.__class__ = mixed_class(FusedLora, type(module))
            switched += 1
    return switched


class FusedLora:
    """Mixed in before PEFT's layer class; see `use_fused_lora`."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        name: Any = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        one = name in self.lora_A and not (
            self.disable_adapters or self.merged or args or kwargs or self.lora_bias[name]
        )
        if one and type(self.lora_variant.get(name)) is DoraLinearVariant:
            return _dora(self, x, name)
        if not one or name in self.lora_variant:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return super().forward(x)  # type: ignore[misc]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _FusedLoraLinear.apply(x, a, b, base, float(self.scaling[name]), p)  # type: ignore[return-value]


@contextmanager
def reading_any_storage() -> Iterator[None]:
    """Inside, PEFT makes DoRA's first magnitudes of the weights as products use them, in fp32.

    Its own way reads bitsandbytes' parameters only, moves them about, and takes norms of 16-bit weights in 16 bits, so
    that a new adapter would not be its base.
    """
    own = dora.dequantize_module_weight, dora.deepcopy

    def weight(module: Any) -> Any:
        if not is_dense(module):
            return own[0](module)
        dense = dense_weight(module, torch.float32)
        return dense.t() if type(module).__name__ == "Conv1D" else dense

    dora.dequantize_module_weight, dora.deepcopy = weight, lambda module: module
    try:
        yield
    finally:
        dora.dequantize_module_weight, dora.deepcopy = own


def _dora(layer: Any, x: torch.Tensor, name: str) -> torch.Tensor:
    """``f (W x + scale B A x) + bias`` with ``f = magnitude / ||W + scale B A||``, norms over each row of ``[out, in]``.

    The norms get no gradient (DoRA's section 4.3). Under dropout, as in PEFT, only what is added to ``W x`` is dropped.
    """
    base, dropout, scale = layer.get_base_layer(), layer.lora_dropout[name], float(layer.scaling[name])
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        whole = torch.addmm(dense_weight(base, torch.float32), b.float(), a.float(), alpha=scale)
        norms = torch.linalg.norm(whole, dim=1)
        del whole
    factor = layer.lora_magnitude_vector[name].weight.float() / norms
    result = base(x)
    kept = isinstance(dropout, nn.Identity) or not dropout.training
    dropped = x if kept else dropout(x)
    product = result if kept else base(dropped)
    if base.bias is not None:
        product = product - base.bias.to(product.dtype)
    if torch.is_autocast_enabled(x.device.type):
        update = F.linear(F.linear(dropped, a), b)
    else:
        update = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    return result + ((factor - 1).to(result.dtype) * product + (factor * scale).to(result.dtype) * update)


class _FusedLoraLinear(torch.autograd.Function):
    """``y = x W^T + bias + scale * drop(x) A^T B^T`` with W frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: nn.Module, scale: float, p: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        bias: Any = base.bias
        weight = dense_weight(base, x.dtype)
        if bias is None:
            y = flat @ weight.t()
        else:
            y = torch.addmm(bias.to(x.dtype), flat, weight.t())
        del weight
        dropped, mask = torch.native_dropout(flat, p, True) if p else (flat, None)
        # The scale goes into A, the smallest of all: no pass over [tokens, ...] for it.
        narrow, wide = (a * scale).to(x.dtype), b.to(x.dtype)
        inner = dropped @ narrow.t()
        y.addmm_(inner, wide.t())
        ctx.save_for_backward(flat, inner, narrow, wide, mask)
        ctx.base, ctx.scale, ctx.p, ctx.shape, ctx.dtypes = base, scale, p, x.shape, (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, inner, narrow, wide, mask = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        keep = 1.0 if ctx.p == 1 else 1 / (1 - ctx.p)
        grad_inner = grad @ wide
        grad_x = grad_a = grad_b = None
        if wants_b:
            grad_b = (grad.t() @ inner).to(ctx.dtypes[1])
        if wants_a:
            dropped = x if mask is None else (x * mask).mul_(keep)
            grad_a = (grad_inner.t() @ dropped).to(ctx.dtypes[0]).mul_(ctx.scale)
        if wants_x:
            grad_x = grad @ dense_weight(ctx.base, grad.dtype)
            if mask is None:
                grad_x.addmm_(grad_inner, narrow)
            else:
                grad_x.add_((grad_inner @ narrow).mul_(mask).mul_(keep))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None
