"""How the frozen base is stored: really stored, so the bytes can be counted.

int8, nf4 and fp4 use bitsandbytes' modules, with two of its CPU paths avoided because they change the numbers:
int8 always takes the weight-only product (bitsandbytes' eval path also quantizes activations, and then training and
evaluation differ), and 4-bit layers never repack themselves in eval mode (on CPUs with AVX512-BF16 bitsandbytes
rewrites the weights in place with bf16 scales at the first forward without gradients). fp16 and bf16 store weights
in 16 bits and multiply in the input's type. The output head keeps its precision, as in transformers.

QLoRA: Dettmers et al. 2023, arXiv 2305.14314; LLM.int8(): arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from lmlab.registry import Config, quants

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantConfig(Config):
    """Storage of the base's linear layers (and, for 16 bits, of its embeddings)."""

    kind: str

    @property
    def load_dtype(self) -> torch.dtype:
        """Floating type the weights are loaded in, before `apply`."""
        return torch.float32

    def apply(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        """Replace the linear layers in place; ``compute_dtype`` is what products are made in."""


@quants.register
class Unquantized(QuantConfig):
    """32-bit floats."""

    kind: Literal["none"]


@quants.register
class SixteenBit(QuantConfig):
    """fp16 or bf16 storage of linear layers, embeddings and head; norms stay fp32."""

    kind: Literal["fp16", "bf16"]

    def apply(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        dtype = torch.float16 if self.kind == "fp16" else torch.bfloat16
        stored: dict[
            int, nn.Parameter
        ] = {}  # a tied head shares its parameter with the embedding, also afterwards
        for parent, name, module in _replaceable(model, include_head=True, include_embeddings=True):
            weight = stored.setdefault(
                id(module.weight), nn.Parameter(module.weight.data.to(dtype), requires_grad=False)
            )
            setattr(parent, name, _stored(module, weight, compute_dtype))


@quants.register
class EightBit(QuantConfig):
    """LLM.int8() row-wise absmax storage, weight-only product."""

    kind: Literal["int8"]

    def apply(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        bnb = _bitsandbytes()
        layer = _int8_class()
        for parent, name, module in _replaceable(model):
            weight, bias = _linear_weight(module)
            new = layer(weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            setattr(parent, name, _finish(new, bias, weight.device))
        model.is_loaded_in_8bit = True  # type: ignore[assignment]  # what PEFT looks at to wrap these layers


@quants.register
class FourBit(QuantConfig):
    """Block-wise 4-bit storage, blocks of 64.

    Attributes:
        double_quant: the blocks' scales are themselves stored in 8 bits (saves 0.373 bits per parameter).
    """

    kind: Literal["nf4", "fp4"]
    double_quant: bool

    def apply(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        bnb = _bitsandbytes()
        for parent, name, module in _replaceable(model):
            weight, bias = _linear_weight(module)
            new = bnb.nn.Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=self.double_quant,
                quant_type=self.kind,
            )
            new.weight = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=self.double_quant,
                quant_type=self.kind,
                module=new,
            )
            new.support_avx512bf16_for_cpu = False  # see the module docstring
            setattr(parent, name, _finish(new, bias, weight.device))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def _int8_class() -> Any:
    bnb = _bitsandbytes()
    from bitsandbytes.autograd._functions import MatMul8bitFp

    class WeightOnlyLinear8bit(bnb.nn.Linear8bitLt):
        """The same product in training and evaluation: dequantized weight times unquantized input."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.CB is not None:
                self.init_8bit_state()
            bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
            return MatMul8bitFp.apply(x, self.weight, None, bias, self.state)

    return WeightOnlyLinear8bit


def _replaceable(
    model: PreTrainedModel, *, include_head: bool = False, include_embeddings: bool = False
) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, attribute, module) of every linear layer, the head and the embeddings only where asked."""
    head = model.get_output_embeddings()
    kinds: tuple[type, ...] = (nn.Linear, nn.Embedding) if include_embeddings else (nn.Linear,)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            wanted = isinstance(module, kinds) or type(module).__name__ == "Conv1D"
            if wanted and (module is not head or include_head):
                yield parent, name, module


def _linear_weight(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight as ``[out, in]`` and bias; GPT-2's Conv1D keeps its own transposed."""
    weight = module.weight.data
    if not isinstance(module, nn.Linear):
        weight = weight.t().contiguous()
    return weight, None if module.bias is None else module.bias.data


def _finish(new: nn.Module, bias: torch.Tensor | None, device: torch.device) -> nn.Module:
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.to(device)  # bitsandbytes quantizes on the move


class _FrozenProduct(torch.autograd.Function):
    """``x @ w.T`` with a frozen 16-bit ``w``: only ``w`` itself is kept for the backward pass, not its upcast copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.to(grads[0].dtype), None


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in 16 bits and multiplied in the input's type."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        out = _FrozenProduct.apply(input, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # type: ignore[operator, return-value]


class StoredEmbedding(nn.Embedding):
    """An embedding stored in 16 bits whose rows come out in ``compute_dtype``."""

    compute_dtype = torch.float32

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.compute_dtype)


def _stored(module: Any, weight: nn.Parameter, compute_dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        new: Any = StoredEmbedding(*module.weight.shape, padding_idx=module.padding_idx, device="meta")
        new.compute_dtype = compute_dtype
        new.weight = weight
        return new
    if not isinstance(module, nn.Linear):  # Conv1D
        weight = nn.Parameter(weight.data.t().contiguous(), requires_grad=False)
    new = StoredLinear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    new.weight = weight
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.data, requires_grad=False)
    return new


@dataclass(frozen=True)
class LinearStorage:
    """What one linear layer of the base takes, all quantization state counted."""

    name: str
    shape: tuple[int, int]
    bits: int

    @property
    def bits_per_param(self) -> float:
        """Stored bits divided by the parameters of the weight."""
        return self.bits / (self.shape[0] * self.shape[1])


def linear_storage(model: nn.Module | Any) -> list[LinearStorage]:
    """Storage of every linear layer of the (unadapted) base except its output head, bias not counted."""
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if not is_linear or module is head:
            continue
        shape = (
            (module.out_features, module.in_features)
            if isinstance(module, nn.Linear)
            else tuple(module.weight.shape)
        )
        found.append(
            LinearStorage(name, shape, 8 * sum(t.numel() * t.element_size() for t in _weight_tensors(module)))
        )  # type: ignore[arg-type]
    return found


def _weight_tensors(module: Any) -> list[torch.Tensor]:
    """The weight and every tensor needed to read it."""
    tensors = [module.weight.data]
    state = getattr(module.weight, "quant_state", None)
    if (
        state is not None
    ):  # 4 bits: scales, code table and, under double quantization, the scales' own scales and table
        tensors += [v for v in (state.absmax, state.code) if v is not None]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    scales = getattr(module.weight, "SCB", None)
    if scales is None and hasattr(module, "state"):
        scales = getattr(module.state, "SCB", None)
    return tensors if scales is None else [*tensors, scales]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and quantization state of the base; a shared (tied) parameter counts once."""
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for tensor in _weight_tensors(module)[1:]:
                total += tensor.numel() * tensor.element_size()
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel() * parameter.element_size()
    return total
