"""Quantized storage of bitsandbytes, of the right shapes, on tensors without content.

bitsandbytes' own parameter classes cannot wrap a fake tensor, and its table for double quantization reads values while
it is made. Here the same tensors hang on a plain parameter with the same attributes, and the table is made beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from lmlab.models.quantize import EightBit, FourBit, int8_class, linear_weight, replaceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmlab.models.quantize import QuantConfig


def prepare() -> None:
    """Make bitsandbytes' table for double quantization, which it keeps for the process; outside of fake tensors."""
    import bitsandbytes.functional as functional

    functional.quantize_blockwise(torch.zeros(256))


def apply(quant: QuantConfig, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
    """`QuantConfig.apply` for a fake model."""
    if not isinstance(quant, EightBit | FourBit):
        quant.apply(model, compute_dtype=compute_dtype)
        return
    for parent, name, module in replaceable(model):
        weight, bias = linear_weight(module)
        new = _four_bit(quant, weight, compute_dtype) if isinstance(quant, FourBit) else _eight_bit(weight)
        new.out_features, new.in_features = weight.shape
        if bias is not None:
            new.bias = nn.Parameter(bias, requires_grad=False)
        setattr(parent, name, new)
    setattr(model, "is_loaded_in_4bit" if isinstance(quant, FourBit) else "is_loaded_in_8bit", True)


def _bitsandbytes() -> Any:
    import bitsandbytes.functional

    return bitsandbytes


def _four_bit(quant: FourBit, weight: torch.Tensor, compute_dtype: torch.dtype) -> Any:
    bnb = _bitsandbytes()
    with _disable_current_modes():  # a shell of the right class
        new: Any = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=compute_dtype)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=quant.double_quant, quant_type=quant.kind
    )
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = new.quant_state = state
    parameter.compress_statistics, parameter.quant_type = quant.double_quant, quant.kind
    new.weight = parameter
    new.support_avx512bf16_for_cpu = False
    return new


def _eight_bit(weight: torch.Tensor) -> Any:
    bnb = _bitsandbytes()
    with _disable_current_modes():
        new: Any = int8_class()(1, 1, bias=False, has_fp16_weights=False)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.CB, parameter.SCB = codes, scales
    new.weight = parameter
    return new
