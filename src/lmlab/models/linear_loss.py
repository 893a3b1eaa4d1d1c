"""Output head and loss in one: chunks of logits that live only until their gradient is taken.

Plain torch; a head that is a bare matrix takes a hand-written cross-entropy, any other (LoRA on the head, trained
rows) and any other loss go through autograd, chunk by chunk. On CUDA Liger's kernel (arXiv 2410.10989) takes the plain
case where that package is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lmlab.models.quantize import StoredLinear
from lmlab.models.whole import TrainedLinear

CHUNK_BYTES = {"cpu": 30 << 20, "cuda": 256 << 20}
"""Of a chunk's fp32 logits: large enough for nearly full-speed products (50,257 columns: 256 to 270 GFLOP/s forward for
130 rows as for 330, 2 cores), small beside the activations of a model.

On a CPU below 32 MB, from where on malloc takes fresh pages for the buffer of every step: with 64 a step of the
benchmarks' LoRA faulted in some 16,000 pages, now under 2,000.
"""

ROW_MULTIPLE = 16
"""Logits per row in memory are a multiple of this: 64 bytes."""

Total = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Tail(NamedTuple):
    """What comes after a head's product: ``softcap * tanh(scale * x / softcap)``; no cap: ``scale * x``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


PLAIN_TAIL = Tail()


class HeadLoss(NamedTuple):
    """Cross-entropy's own settings: see `head.CrossEntropy`."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


def total(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    head: nn.Module,
    tail: Tail,
    loss: Total,
    cross_entropy: HeadLoss | None = None,
) -> torch.Tensor:
    """Sum of the losses of ``tail(head(hidden))`` against ``labels``; fp32 scalar.

    Args:
        hidden: ``[n, width]``; n may be 0, the result is then a zero that still has a graph.
        labels: int64 ``[n]``.
        head: the output embedding, bare or wrapped by PEFT.
        loss: a function of fp32 ``logits [n, vocab]`` and labels that gives a sum.
        cross_entropy: the same as settings, where that is what ``loss`` is.
    """
    matrix = _matrix(head)
    if matrix is None or cross_entropy is None:
        parameters = tuple(p for p in head.parameters() if p.requires_grad)
        return _ChunkedByAutograd.apply(hidden, labels, head, tail, loss, *parameters)  # type: ignore[return-value]
    hidden = hidden.to(_product_dtype(hidden, matrix))
    weight, bias = matrix.weight, matrix.bias
    kernel = _cuda_kernel(hidden, bias, tail, cross_entropy)
    if kernel is not None:
        return kernel(hidden, weight.to(hidden.dtype), labels)
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, tail, cross_entropy)  # type: ignore[return-value]


def head_output(head: nn.Module | Any, hidden: torch.Tensor) -> torch.Tensor:
    """``head(hidden)``, with the hidden states in the type the head multiplies in."""
    matrix = _matrix(head)
    return head(hidden if matrix is None else hidden.to(_product_dtype(hidden, matrix)))


def _matrix(head: nn.Module | Any) -> nn.Linear | None:
    """The head as a bare linear layer, or None: something else happens in its forward.

    Taking ``head.weight`` of any head would silently leave an adapter on it out.
    """
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters or len(head.active_adapters) != 1:
            return None
        head = head.modules_to_save[head.active_adapters[0]]
    plain = type(head) in (nn.Linear, StoredLinear, TrainedLinear)
    return head if plain and not head._forward_hooks and not head._forward_pre_hooks else None  # type: ignore[return-value]


def _product_dtype(hidden: torch.Tensor, matrix: nn.Linear) -> torch.dtype:
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    stored = type(matrix) is not nn.Linear  # 16-bit storage multiplies in the type of its input
    return hidden.dtype if stored else matrix.weight.dtype


def _padded(vocab: int) -> int:
    return -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE


def _chunks(rows: int, vocab: int, device: torch.device) -> list[slice]:
    """Even pieces, none beyond `CHUNK_BYTES` of padded logits; one empty piece for no rows."""
    most = max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * _padded(vocab)))
    count = max(1, -(-rows // most))
    size = max(1, -(-rows // count))
    return [slice(i, min(rows, i + size)) for i in range(0, max(rows, 1), size)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``tail(hidden @ weight.T + bias)``; gradients are ready when the forward pass is over."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        tail: Tail,
        loss: HeadLoss,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        matrix = weight.to(hidden.dtype)
        shift = None if bias is None else bias.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # fp32 sums over chunks, also of 16-bit products
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        result = torch.zeros((), dtype=torch.float32, device=hidden.device)
        pieces = _chunks(len(hidden), len(weight), hidden.device)
        # One buffer for all chunks, as fresh pages cost more than the sums over them; rows of whole cache lines, as a
        # product into 50,257 columns runs at two thirds of the speed of one into 50,272 (MKL, 2 cores).
        buffer = hidden.new_empty((pieces[0].stop, _padded(len(weight))), dtype=torch.float32)
        for rows in pieces:
            part = hidden[rows]
            if not len(part):
                continue
            scores = buffer[: len(part)]
            logits = scores[:, : len(weight)]
            if hidden.dtype == torch.float32:
                torch.mm(part, matrix.t(), out=logits)
                if shift is not None:
                    logits += shift
            else:
                logits.copy_(F.linear(part, matrix, shift))
            value, slope = _loss_and_slope(
                scores, len(weight), labels[rows], tail, loss, slope=any(ctx.needs_input_grad)
            )
            result += value
            if slope is None:
                continue
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, matrix, out=grad_hidden[rows])
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(slope.t(), part)
                else:
                    grad_weight += slope.t() @ part
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        upstream = grads[0]
        # In place: the tensors are this call's own, and a second copy of a weight's gradient is large.
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(upstream)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(upstream).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(upstream).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _loss_and_slope(
    scores: torch.Tensor, vocab: int, labels: torch.Tensor, tail: Tail, loss: HeadLoss, *, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(sum of losses, its derivative by the head's own output ``[n, vocab]``), made in the place of the logits.

    With p = softmax(z), the derivative by z is p - target, where target is one-hot, smoothed; z-loss adds
    2 z_loss lse p; the cap multiplies by 1 - tanh(.)^2 and the scale by itself.

    Args:
        scores: fp32 ``[n, width]``, the head's output in its first ``vocab`` columns; used up.
    """
    logits, bent = scores[:, :vocab], None
    if tail.scale != 1:
        logits.mul_(tail.scale)
    if tail.softcap is not None:
        bent = logits.div_(tail.softcap).tanh_().clone()
        logits.mul_(tail.softcap)
    scores[:, vocab:] = -torch.inf
    at_label = logits.gather(1, labels[:, None])
    smoothing = loss.label_smoothing
    mean = logits.mean(-1, keepdim=True) if smoothing else None
    torch.log_softmax(scores, -1, out=scores)
    right = logits.gather(1, labels[:, None])
    log_z = at_label - right
    value = -(1 - smoothing) * right.sum()
    if mean is not None:
        value = value + smoothing * (log_z - mean).sum()
    if loss.z_loss:
        value = value + loss.z_loss * log_z.square().sum()
    if not slope:
        return value, None
    p = scores.exp_()[:, :vocab]
    if loss.z_loss:
        p.mul_(1 + 2 * loss.z_loss * log_z)
    p.scatter_add_(1, labels[:, None], torch.full_like(right, smoothing - 1))
    if smoothing:
        p.sub_(smoothing / vocab)
    if bent is not None:
        p.mul_(bent.square_().neg_().add_(1))
    if tail.scale != 1:
        p.mul_(tail.scale)
    return value, p


class _ChunkedByAutograd(torch.autograd.Function):
    """Any head module and any loss; each chunk's graph is gone before the next one begins."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        head: nn.Module,
        tail: Tail,
        loss: Total,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        result = torch.zeros((), dtype=torch.float32, device=hidden.device)
        vocab = int(getattr(head, "out_features", 0) or head.weight.shape[0])  # type: ignore[index]
        for rows in _chunks(len(hidden), vocab, hidden.device):
            if rows.stop == 0:
                continue
            part = hidden[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value = loss(tail(head_output(head, part).float()), labels[rows])
            result += value.detach()
            if not wanted:
                continue
            first, *others = torch.autograd.grad(value, (part, *parameters), allow_unused=True)
            if grad_hidden is not None and first is not None:
                grad_hidden[rows] = first
            sums = [
                old if new is None else new if old is None else old + new
                for old, new in zip(sums, others, strict=True)
            ]
        ctx.save_for_backward(grad_hidden, *sums)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, *sums = (None if t is None else t.mul(grads[0]).to(t.dtype) for t in ctx.saved_tensors)
        return grad_hidden, None, None, None, None, *sums


def _cuda_kernel(
    hidden: torch.Tensor, bias: torch.Tensor | None, tail: Tail, loss: HeadLoss
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Liger's kernel where it is installed and knows the case (CUDA, 16 bits, no bias, plain loss), else None.

    8,192 positions, 4,096 wide, vocabulary 128,256 on an H200: Liger 30 ms, this module 36 (head trained: 56 and 82), as exact.
    cut-cross-entropy 25.1 took 82 ms and its gradient was ten times as far from the exact one: not used.
    """
    if not hidden.is_cuda or hidden.dtype == torch.float32 or bias is not None or loss != HeadLoss():
        return None
    if not len(hidden):
        return None
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        return None
    kernel = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=tail.softcap)

    def run(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return kernel(weight, hidden if tail.scale == 1 else hidden * tail.scale, labels).float()

    return run
