"""A model made fast for the time of a decode: adapters merged, stored weights read once, and all put back.

While a text is written the weights stand still, but a step over a 4-bit base dequantizes every one of them again, and
an adapter costs two thin products and some passes over the result per layer and step. Here every such layer gets, for
the time of a block, a plain product with one dense weight, W + sum of scale * B A in the compute type. Nothing is
merged *into* what is stored: the dense weights are temporaries beside it and the layer's own ``forward`` comes back
afterwards, so the model is bit for bit what it was (PEFT's ``merge_adapter`` adds to the stored weight and subtracts
again, which rounds). Where memory does not suffice for all layers, the others go on as they are: slower, not wrong.

LoRA's merge: Hu et al. 2021, arXiv 2106.09685, section 4.1. rsLoRA (arXiv 2312.03732) only has another scale. Layers
with DoRA, other variants, biases in B or PEFT methods other than LoRA are left alone, as are modules with hooks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lmlab.models.quantize import dense_weight, is_dense, is_stored, weight_shape

SHARE_OF_FREE_MEMORY = 0.5
"""Of what is free at the start of a decode, for dense weights; the rest is for the cache and everybody else."""
BLOCKED_ROWS = range(2, 257)
BLOCKED_FROM = 8192
_BLOCK_VALUES = 2**19  # 2 MB of fp32 weights: stays in a core's share of the cache


@dataclass(frozen=True)
class Ready:
    """What was done: layers with a dense weight, those that would have gained but did not fit, bytes taken."""

    dense_layers: int
    left_layers: int
    dense_bytes: int


@contextmanager
def ready_to_decode(
    model: nn.Module, *, compute_dtype: torch.dtype, num_steps: int, memory_budget: int | None = None
) -> Iterator[Ready]:
    """Let ``model`` decode faster inside the block, to the same logits up to rounding; afterwards it is unchanged.

    Do not train inside: the dense weights do not follow the adapters, and adapters' dropout is off.

    Args:
        model: a causal LM, quantized by lmlab or not, PeftModel or not. One that torch.compile compiled is left
            alone, since its code has the layers' forward in it.
        compute_dtype: of the dense weights; autocast's type where autocast is on.
        num_steps: forward passes to come; for few a merge costs more than it saves.
        memory_budget: bytes for the dense weights; None: half of what is free on the model's device.
    """
    replaced: list[tuple[Any, Any]] = []
    dense_bytes = dense = left = 0
    try:
        if not _is_compiled(model):
            budget = free_memory(model) * SHARE_OF_FREE_MEMORY if memory_budget is None else memory_budget
            for module, layer in _layers(model):
                need = math.prod(weight_shape(layer.base)) * compute_dtype.itemsize
                if not layer.pays(num_steps, compute_dtype):
                    product = _block_product(layer)
                elif dense_bytes + need <= budget:
                    product = _dense_product(layer, compute_dtype)
                    dense_bytes, dense = dense_bytes + need, dense + 1
                else:
                    product, left = _block_product(layer), left + 1
                if product is not None:
                    replaced.append((module, module.__dict__.get("forward")))
                    module.forward = product
        yield Ready(dense, left, dense_bytes)
    finally:
        for module, old in replaced:
            if old is None:
                del module.forward
            else:
                module.forward = old


@dataclass(frozen=True)
class _Layer:
    """A linear layer and the low-rank updates in force on it: (scale, B ``[out, r]``, A ``[r, in]``)."""

    base: Any
    updates: tuple[tuple[float, torch.Tensor, torch.Tensor], ...]
    is_head: bool

    def pays(self, num_steps: int, dtype: torch.dtype) -> bool:
        """Whether a dense weight is cheaper than ``num_steps`` passes without.

        A stored weight is converted in every pass anyway: the second one already gains. Merging into a float weight
        reads and writes it once, about 1 ns a value on one core, and saves some 80 us per layer and step (estimated, not measured:
        PEFT's forward beside a plain product at 32 rows, rank 16); on a GPU, writing is 100 times faster.
        """
        # fp32 weights under 16-bit autocast are converted too (and in a CUDA graph, in every step).
        if is_stored(self.base) or self.base.weight.dtype.itemsize > dtype.itemsize:
            return num_steps >= 2
        per_value = 1e-9 if self.base.weight.device.type == "cpu" else 1e-11
        cost = per_value * math.prod(weight_shape(self.base))
        return bool(self.updates) and cost < 80e-6 * num_steps


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, _Layer]]:
    """(module whose forward is to be replaced, what it computes) for every linear layer that is understood."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    heads = {id(head), id(getattr(head, "base_layer", None))}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or "original_module" in name.split("."):
            continue  # a part of a layer already handled, or a copy that PEFT keeps out of use
        if hasattr(module, "lora_A"):
            found = _adapted(module)
            inside.update(id(part) for part in module.modules())
        else:
            base = _base_of(module)
            found = None if base is None else ((), base)
        if found is not None:
            yield module, _Layer(found[1], found[0], id(module) in heads)


def _adapted(layer: Any) -> tuple[tuple[tuple[float, torch.Tensor, torch.Tensor], ...], Any] | None:
    """The updates in force on PEFT's LoRA layer and its base; None for one to be left alone."""
    base = _base_of(layer.base_layer)
    if base is None or any(_has_hooks(part) for part in layer.modules()):
        return None
    if layer.disable_adapters or layer.merged:
        return (), base
    updates = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up = layer.lora_A[name], layer.lora_B[name]
        special = name in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(
            name, False
        )
        plain = type(down) is nn.Linear and type(up) is nn.Linear and down.bias is None and up.bias is None
        if special or not plain:
            return None
        updates.append((float(layer.scaling[name]), up.weight.detach(), down.weight.detach()))
    return tuple(updates), base


def _base_of(module: Any) -> Any | None:
    """``module`` if it is a linear layer whose product a dense weight gives, and nobody listens to it."""
    return module if is_dense(module) and not _has_hooks(module) else None


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    ) or hasattr(model, "_orig_mod")


@torch.no_grad()
def _dense_product(layer: _Layer, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """``x -> x W'^T + bias`` with W' = W + sum of scale * B A, summed in fp32 and rounded once to ``dtype``."""
    weight = dense_weight(layer.base, torch.float32 if layer.updates else dtype)
    if weight.data_ptr() == layer.base.weight.data_ptr():
        weight = weight.clone(memory_format=torch.contiguous_format)  # nothing is merged into what is stored
    for scale, up, down in layer.updates:
        weight.addmm_(up.to(weight), down.to(weight), alpha=scale)
    return _product(weight.to(dtype), layer.base.bias)


def _block_product(layer: _Layer) -> Callable[..., torch.Tensor] | None:
    """The layer's own product cut into blocks, where that is all it computes and it gains; None elsewhere."""
    weight = layer.base.weight
    gains = weight.device.type == "cpu" and len(weight) >= BLOCKED_FROM
    if layer.updates or type(layer.base) is not nn.Linear or not gains:
        return None
    return _product(weight, layer.base.bias)


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    blocked = (
        weight.device.type == "cpu" and weight.shape[0] >= BLOCKED_FROM and weight.dtype == torch.float32
    )
    plain_bias = None if bias is None else bias.detach().to(weight.dtype)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, plain_bias)
        if x.dtype != weight.dtype:
            return F.linear(x.to(weight.dtype), weight, plain_bias).to(x.dtype)
        if blocked and not torch.is_grad_enabled() and x.numel() // x.shape[-1] in BLOCKED_ROWS:
            return _in_blocks(x, weight, plain_bias)
        return F.linear(x, weight, plain_bias)

    return forward


def _in_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` for a few rows and a very long weight, block by block of the weight.

    In one piece MKL's product leaves the cache: at 50,257 x 512 on one core 60 ms against 40 ms at 32 rows, 30 against
    18 at 4, 172 against 133 at 128, with the same bits.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    step = max(256, _BLOCK_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        torch.mm(rows, weight[start : start + step].t(), out=out[:, start : start + step])
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], weight.shape[0])


def free_memory(model: nn.Module) -> int:
    """Bytes that can still be allocated on the model's device; 0 where that cannot be told."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = 0
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free
