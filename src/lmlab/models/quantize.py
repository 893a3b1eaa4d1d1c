"""How the frozen base is stored: really stored, so the bytes can be counted.

int8, nf4 and fp4 use bitsandbytes' modules, with two of its CPU paths avoided because they change the numbers:
int8 always takes the weight-only product (bitsandbytes' eval path also quantizes activations, and then training and
evaluation differ), and 4-bit layers never repack themselves in eval mode (on CPUs with AVX512-BF16 bitsandbytes
rewrites the weights in place with bf16 scales at the first forward without gradients). fp16 and bf16 store weights
in 16 bits and multiply in the input's type; int4 is `int4`'s packed integers under the same kind of product. The output
head keeps its precision, as in transformers.

QLoRA: Dettmers et al. 2023, arXiv 2305.14314; LLM.int8(): arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lmlab.models.frozen import frozen_product, packed_product, read_stored
from lmlab.models.int4 import quantize_int4
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
        for parent, name, module in replaceable(model, include_head=True, include_embeddings=True):
            # The parameter stays the same object, so a head tied to the embedding stays tied.
            module.weight.data = module.weight.data.to(dtype)
            setattr(parent, name, _stored(module, compute_dtype))


@quants.register
class EightBit(QuantConfig):
    """LLM.int8() row-wise absmax storage, weight-only product."""

    kind: Literal["int8"]

    def apply(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        bnb = _bitsandbytes()
        layer = int8_class()
        for parent, name, module in replaceable(model):
            weight, bias = linear_weight(module)
            new = layer(
                weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False, device="meta"
            )
            # Quantized here and not by the move to a device: bitsandbytes does that only for weights on the CPU.
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            new.weight = bnb.nn.Int8Params(
                codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
            )
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
        for parent, name, module in replaceable(model):
            weight, bias = linear_weight(module)
            new = bnb.nn.Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=self.double_quant,
                quant_type=self.kind,
                device="meta",  # no weights drawn only to be thrown away
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


@quants.register
class FourBitInteger(QuantConfig):
    """4-bit integers in blocks of 64 with a 32-bit scale each (4.5 bits per parameter), see `int4`."""

    kind: Literal["int4"]

    def apply(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        for parent, name, module in replaceable(model):
            setattr(parent, name, Int4Linear(*linear_weight(module)))


def load_dtype(quant: QuantConfig, compute_dtype: torch.dtype, *, mixed: bool) -> torch.dtype:
    """What a base is loaded in: 16 bits at once where all of it ends in them (not `mixed`), half the memory of loading."""
    return quant.load_dtype if mixed or quant.kind == "fp16" else compute_dtype


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def int8_class() -> Any:
    """bitsandbytes' 8-bit linear layer with the weight-only product; a function, as bitsandbytes is imported late."""
    bnb = _bitsandbytes()

    class WeightOnlyLinear8bit(bnb.nn.Linear8bitLt):
        """The same product in training and evaluation: dequantized weight times unquantized input.

        The arithmetic is bitsandbytes' MatMul8bitFp, which however keeps its input for the backward pass, where a
        frozen weight has no use for it and gradient checkpointing cannot drop it.
        """

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.CB is not None:
                self.init_8bit_state()
            return frozen_product(self, x, self.state.SCB)

    return WeightOnlyLinear8bit


def replaceable(
    model: PreTrainedModel, *, include_head: bool = False, include_embeddings: bool = False
) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, attribute, module) of every linear layer, the head and the embeddings only where asked."""
    head = model.get_output_embeddings()
    kinds: tuple[type, ...] = (nn.Linear, nn.Embedding) if include_embeddings else (nn.Linear,)
    places = [
        (parent, name)
        for parent in model.modules()
        for name, module in parent.named_children()
        if (isinstance(module, kinds) or _is_conv1d(module)) and (module is not head or include_head)
    ]
    for parent, name in places:  # by name: no list here keeps a replaced layer's 32-bit weight in memory
        yield parent, name, getattr(parent, name)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer, its weight is [in, out]


def linear_weight(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight as ``[out, in]`` and bias; GPT-2's Conv1D keeps its own transposed."""
    weight = module.weight.data
    if not isinstance(module, nn.Linear):
        weight = weight.t().contiguous()
    return weight, None if module.bias is None else module.bias.data


def _finish(new: nn.Module, bias: torch.Tensor | None, device: torch.device) -> nn.Module:
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new.to(device)  # bitsandbytes quantizes on the move


def is_dense(module: Any) -> bool:
    """Whether `dense_weight` gives this layer's own product; by exact class, as a subclass may compute something else.

    bitsandbytes' own 8-bit layer also quantizes activations, so no dense weight gives its results. By name: to know
    that a layer is none of bitsandbytes', that library need not be imported.
    """
    if getattr(module, "weight", None) is None:
        return False
    if type(module).__name__ == "Linear4bit":
        return getattr(module.weight, "quant_state", None) is not None
    if isinstance(module, PackedLinear):
        return True
    return type(module) in (nn.Linear, StoredLinear) or type(module).__name__ in (
        "Conv1D",
        "WeightOnlyLinear8bit",
    )


def is_stored(module: Any) -> bool:
    """Whether `dense_weight` converts: the weight is stored in another type than it is multiplied in."""
    return type(module) is not nn.Linear and not _is_conv1d(module)


def weight_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, whatever it is stored in."""
    if _is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def dense_weight(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[out, in]`` of a linear layer as its product uses it, whatever it is stored in."""
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if isinstance(module, PackedLinear):
        return module.unpacked(dtype)
    if weight.dtype == torch.int8:
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        return read_stored(weight.data, scales, weight_shape(module), dtype)
    return (weight.t() if _is_conv1d(module) else weight).detach().to(dtype)


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in 16 bits and multiplied in the input's type (autocast's, if on)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_product(self, input)


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in a form of its own: what a `QuantConfig.apply` puts in place.

    A subclass says how the weight is read (`unpacked`) and keeps whatever that needs besides in buffers, which count as
    stored. LoRA, DoRA, merging, evaluation, export and the memory plan then work on it. A subclass of `nn.Linear`, so
    that PEFT takes it for one; its weight is of no linear layer's shape, so that whoever adds to it (PEFT's own merge)
    fails instead of spoiling it.

    Args:
        packed: uint8, of any shape; becomes ``weight``.
        shape: ``(out, in)`` of the weight that it stands for.
        bias: kept as it is, frozen.
    """

    def __init__(self, packed: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__(shape[1], shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[out, in]`` as products use it."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return packed_product(self, input)


class Int4Linear(PackedLinear):
    """A linear layer stored as `int4` says, multiplied in the input's type (autocast's, if on).

    Args:
        weight: ``[out, in]``, of any floating type.
        bias: kept as it is, frozen.
    """

    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        packed, scales = quantize_int4(weight)
        super().__init__(packed, (weight.shape[0], weight.shape[1]), bias)
        # A buffer, as `move_rest_to` casts parameters: scales stay in 32 bits.
        self.register_buffer("scales", scales)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        return read_stored(self.weight.data, self.scales, weight_shape(self), dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return frozen_product(self, input, self.scales)


class StoredEmbedding(nn.Embedding):
    """An embedding stored in 16 bits whose rows come out in ``compute_dtype``."""

    compute_dtype = torch.float32

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.compute_dtype)


def _stored(module: Any, compute_dtype: torch.dtype) -> nn.Module:
    weight = module.weight.requires_grad_(False)
    if isinstance(module, nn.Embedding):
        # In place, under a class of both: some embeddings scale or shift in a forward of their own (Gemma 3, OPT).
        own: Any = type(module)
        bases = (StoredEmbedding,) if own is nn.Embedding else (own, StoredEmbedding)
        module.__class__ = type("Stored" + own.__name__, bases, {"compute_dtype": compute_dtype})
        return module
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


def linear_storage(model: Any) -> list[LinearStorage]:
    """Storage of every linear layer of the (unadapted) base except its output head, bias not counted."""
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if module is head or not (isinstance(module, nn.Linear) or _is_conv1d(module)):
            continue
        layer: Any = module
        bits = 8 * sum(t.numel() * t.element_size() for t in _weight_tensors(layer))
        found.append(LinearStorage(name, weight_shape(layer), bits))
    return found


def _weight_tensors(module: Any) -> list[torch.Tensor]:
    """The weight and every tensor needed to read it."""
    tensors = [module.weight.data]
    if isinstance(module, PackedLinear):
        return [*tensors, *module.buffers(recurse=False)]
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
