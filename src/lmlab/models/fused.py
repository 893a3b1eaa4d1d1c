"""Norms, gated MLPs, activations and rotary embeddings of a model in fewer passes: the same arithmetic, checked.

transformers writes these as rows of elementwise operations, and autograd keeps nearly every result of norms and gates: of
a Llama layer's saved activations about half. Here RMSNorm (arXiv 1910.07467) is torch's kernel on CUDA and keeps its input alone
elsewhere, ``silu(gate) * up`` (arXiv 2002.05202) keeps its two inputs, a squared ReLU its positive part, GPT-2's GELU is
torch's, and a rotation is three passes forward and three back; on a GPU gates and rotations are Liger's kernels (arXiv
2410.10989) where it is installed. A layer is switched if, and only if, the fused form gives
its own forward's result on random input, so Gemma's (1 + weight), a clipped gate or an interleaved rotation stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

LIGER_WIDTH = 65536
"""The longest row that Liger's kernels take."""


def use_fused_layers(model: nn.Module, *, unchecked: bool = False, compiled: bool = False) -> int:
    """Switch what can be switched, in place; how many modules. Before adapters are put on.

    Args:
        unchecked: of tensors without content (the memory plan): gates by names alone, norms with weights made up.
        compiled: torch.compile gets the layers, which fuses rotations by itself and knows no function with globals of
            its own: those stay.
    """
    switched = 0
    with torch.no_grad():
        for module in list(model.modules()):
            fused = _fused_class(module, rotations=not compiled)
            if fused is not None and (_would_agree(module, fused) if unchecked else _agrees(module, fused)):
                module.__class__ = mixed_class(fused, type(module))
                switched += 1
    return switched


@cache
def mixed_class(fused: type, own: type) -> type:
    """``own`` with ``fused``'s forward; one class for all layers, or torch.compile would compile each anew."""
    return type(own.__name__, (fused, own), {"__module__": own.__module__})


class _FusedNorm:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype:  # under autocast the two may differ
            return super().forward(hidden_states)  # type: ignore[misc]
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, weight.shape, weight, _epsilon(self))
        return _RMSNorm.apply(hidden_states, weight, _epsilon(self))  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * weight``, where torch has no kernel for it in one; keeps x and one number a row.

    With n = x / rms(x) and d the width: ``dx = (g w - n mean(g w n)) / rms(x)``, ``dw = sum of g n``.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        exact = _exact(x)
        inverse = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = inverse.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (exact * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        exact, grad = _exact(x), _exact(grads[0])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            each = (grad * exact).mul_(inverse)
            grad_weight = each.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad * weight
            along = torch.linalg.vecdot(grad_x, exact)[..., None].mul_(inverse.pow(3)).div_(-x.shape[-1])
            grad_x = grad_x.mul_(inverse).addcmul_(exact, along).to(x.dtype)
        return grad_x, grad_weight, None


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kernel(name: str, *inputs: torch.Tensor) -> Callable[..., Any] | None:
    """Liger's autograd function ``name`` where it is installed and these are tensors of a GPU, else None.

    8B shape, 8,192 tokens, H200: rotations took 32 ms of a step of 511 without it, gates 29.
    """
    if torch.compiler.is_compiling() or not all(x.is_cuda and not isinstance(x, FakeTensor) for x in inputs):
        return None  # a compiler fuses by itself; what is imagined has no address
    try:
        from liger_kernel import ops  # type: ignore[import-not-found]
    except ImportError:
        return None
    return getattr(ops, name).apply


class _FusedGate:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        kernel = _kernel("LigerSiLUMulFunction", gate, up) if gate.shape[-1] <= LIGER_WIDTH else None
        # Its backward pass writes over gate and up, which nobody else keeps.
        return self.down_proj((kernel or _SiluMul.apply)(gate, up))


class _SiluMul(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grads[0])
        grad_gate = grads[0] * up
        torch.ops.aten.silu_backward.grad_input(
            grad_gate, gate, grad_input=grad_gate
        )  # in place: it is large
        return grad_gate, grad_up


class _FusedGelu:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate="tanh")


class _FusedReluSquared:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return _ReluSquared.apply(input)  # type: ignore[return-value]


class _ReluSquared(torch.autograd.Function):
    """``relu(x)^2`` (Primer, arXiv 2109.08668); its slope is ``2 relu(x)``, where autograd takes a power and a threshold apart."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (positive,) = ctx.saved_tensors
        return (grads[0] * positive).mul_(2)


Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]
ROTATION = "apply_rotary_pos_emb"
"""What the libraries' attention layers call, a function of the module they are written in."""


class FusedRotary:
    """In the place of a library's `ROTATION` (arXiv 2104.09864): q and k rotated in three passes where it is the plain case.

    That is one type for q, k, cos and sin: under autocast q and k often come in 16 bits and cos in fp32, and it is the
    library's.

    Args:
        own: the library's.
    """

    def __init__(self, own: Rotation) -> None:
        self.own = own

    def __call__(self, *told: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(told) != 4 or named or not _is_plain(*told):
            return self.own(*told, **named)
        q, k, cos, sin = told
        if (kernel := _kernel("LigerRopeFunction", q, k, cos, sin)) is not None:
            return kernel(q, k, cos, sin)  # in place where it can: q and k are results of products or norms
        return _Rotate.apply(q, k, cos[:, None], sin[:, None])  # type: ignore[return-value]


def _is_plain(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    return (
        all(isinstance(x, torch.Tensor) for x in (q, k, cos, sin))
        and q.ndim == k.ndim == 4
        and cos.ndim == 3
        and sin.shape == cos.shape
        and q.shape[-2:] == k.shape[-2:] == cos.shape[-2:]
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )


class _Rotate(torch.autograd.Function):
    """``x cos + (-x2, x1) sin`` of q and k ``[batch, heads, time, width]`` with x = (x1, x2)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(q, cos, -1, first, second), _turned(k, cos, -1, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return *(_turned(grad, cos, 1, second, first) for grad in grads), None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sign: int, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """``x cos + sign (x2 first, -x1 second)``."""
    out = x * cos
    (left, right), (x1, x2) = out.chunk(2, -1), x.chunk(2, -1)
    left.addcmul_(x2, first, value=sign)
    right.addcmul_(x1, second, value=-sign)
    return out


@cache
def _rotating(own: type) -> type | None:
    """A class whose ``forward`` is that of ``own`` with `FusedRotary` for its rotation; None: it has none, or another.

    The function is the same code with a global of its own, so that no other model of the process is touched.
    """
    forward = inspect.getattr_static(own, "forward", None)
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    rotation = forward.__globals__.get(ROTATION)
    if rotation is None or isinstance(rotation, FusedRotary) or not _rotates_alike(rotation):
        return None
    names = {**forward.__globals__, ROTATION: FusedRotary(rotation)}
    code = forward.__code__.replace()  # another object, as torch.compile keeps what it knows by code object
    switched = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    switched.__kwdefaults__ = forward.__kwdefaults__
    return type("_FusedRotation", (), {"forward": switched})


def _rotates_alike(own: Callable[..., Any]) -> bool:
    """Whether ``own`` gives what `_Rotate` gives: in fp32, and in bf16 no nearer to the exact result."""
    generator = torch.Generator().manual_seed(0)
    with _disable_current_modes(), torch.no_grad():
        q, k = (torch.randn(2, heads, 3, 32, generator=generator) for heads in (4, 2))
        angles = torch.randn(2, 3, 16, generator=generator).repeat(1, 1, 2)
        exact = (q, k, angles.cos(), angles.sin())
        rounded = tuple(x.bfloat16() for x in exact)
        try:
            owns, short = own(*exact), own(*rounded)
            if len(owns) != 2 or any(
                o.shape != x.shape or o.dtype != x.dtype for o, x in zip(owns, exact, strict=False)
            ):
                return False
            fused, fused_short = FusedRotary(own)(*exact), FusedRotary(own)(*rounded)
            reference = FusedRotary(own)(*(x.double() for x in rounded))
            # Some rotate in fp32 whatever they are given: these stay.
            errors = [_error(found, reference) for found in (fused_short, short)]
            return all(map(torch.allclose, owns, fused, [1e-5] * 2, [1e-5] * 2)) and errors[0] <= errors[1]
        except Exception:  # it takes or gives something else
            return False


def _error(found: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> float:
    return sum((f.double() - r).abs().mean().item() for f, r in zip(found, reference, strict=True))


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _fused_class(module: Any, *, rotations: bool) -> type | None:
    """By what a module has; whether it also does the same is `_agrees`'s business."""
    if isinstance(module, (_FusedNorm, _FusedGate, _FusedGelu, _FusedReluSquared)):
        return None
    if rotations and (rotating := _rotating(type(module))) is not None:
        return rotating
    if isinstance(module, _activation("gelu_new")):
        return _FusedGelu
    if isinstance(module, _activation("relu2")):
        return _FusedReluSquared
    if type(module).__name__.endswith("RMSNorm"):
        weight = getattr(module, "weight", None)
        plain = isinstance(weight, nn.Parameter) and weight.ndim == 1 and isinstance(_epsilon(module), float)
        return _FusedNorm if plain else None
    gated = all(
        isinstance(getattr(module, n, None), nn.Module) for n in ("gate_proj", "up_proj", "down_proj")
    )
    return (
        _FusedGate
        if gated and isinstance(getattr(module, "act_fn", None), nn.SiLU | _activation("silu"))
        else None
    )


def _activation(name: str) -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN[name])


def _would_agree(module: Any, fused: type) -> bool:
    """`_agrees` of a module whose tensors have no content, tried with a weight that does not hide Gemma's 1 + weight."""
    if fused is not _FusedNorm:
        return True
    with _disable_current_modes():
        real = copy.copy(module)
        weight = torch.linspace(0.5, 1.5, module.weight.shape[0], dtype=module.weight.dtype)
        real.__dict__["_parameters"] = {**module._parameters, "weight": nn.Parameter(weight)}
        return _agrees(real, fused)


def _agrees(module: Any, fused: type) -> bool:
    """Whether the module's own forward gives the same on a random row, in eval mode."""
    if fused.__name__ == "_FusedRotation":
        return True  # tried out by itself, as its layer takes more than a row
    if fused in (_FusedGelu, _FusedReluSquared):
        weight, width = torch.empty(0), 64
    elif fused is _FusedNorm:
        weight, width = module.weight, module.weight.shape[0]
    else:
        weight, width = next(module.gate_proj.parameters()), module.gate_proj.in_features
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, width, generator=generator).to(weight.device, dtype)
    own = module(x).float()
    found = fused.forward(module, x).float()  # type: ignore[attr-defined]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # 16 bits: rounded at another place
    return bool((own - found).abs().max() <= tolerance * own.abs().max().clamp(min=1e-30))
