"""4-bit integers in blocks of 64 with one absolute maximum each: what ``quant=int4`` stores, as plain tensors.

``code = round(7 w / absmax)``, so -7 to 7: the symmetric absmax integer of LLM.int8() (arXiv 2208.07339, equation 1, with
7 in place of 127) and of QLoRA's Int4 (arXiv 2305.14314, table 2). As with nf4 and fp4 a block is 64 values of the
flattened weight and its scale is a 32-bit float, so the three differ in their sixteen levels only (here one of the
sixteen stays unused): 4 + 32 / 64 = 4.5 bits per parameter.

The arithmetic is torchao's (`choose_qparams_affine`, `quantize_affine`, `dequantize_affine`: plain torch on any device, no
compiler), and so is nothing else, because no layer of a library trains under LoRA on a CPU and a GPU alike: PEFT refuses
torchao's Int4Tensor ("only supports int8 weights for now"), which in 0.18 needs kernels of MSLK, a GPU and bf16; its
tensors for int4 values that run anywhere keep them in 8 bits each; optimum-quanto 0.2.7 compiles C++ when a CPU first
unpacks a weight, and its 4 bits are not symmetric (a scale and a shift per group).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from lmlab.records import UserError

BLOCK = 64
LARGEST = 7


def require_torchao() -> None:
    """Nothing, where torchao is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("quant=int4 needs torchao", where="quant", fix="pip install 'lmlab[int4]'")


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, uint8 ``[ceil(numel / 64) * 32]``, and fp32 scales ``[ceil(numel / 64)]`` (absmax / 7)."""
    from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

    flat = weight.detach().flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    bounds: Any = (torch.int8, -LARGEST, LARGEST)
    block: Any = (1, BLOCK)
    scales, zero = choose_qparams_affine(blocks, MappingType.SYMMETRIC, block, *bounds)
    codes = quantize_affine(blocks, block, scales, zero, *bounds)  # zero is 0, and wanted
    halves = (codes + 8).view(torch.uint8).view(-1, 2)
    return halves[:, 0] << 4 | halves[:, 1], scales


def dequantize_int4(
    packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight ``[out, in]``; products of code and scale are made in fp32 and rounded to ``dtype`` once."""
    from torchao.quantization import dequantize_affine

    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(torch.int8).sub_(8).view(-1, BLOCK)
    dense = dequantize_affine(
        codes, (1, BLOCK), scales, None, torch.int8, -LARGEST, LARGEST, output_dtype=dtype
    )
    return dense.view(-1)[: math.prod(shape)].view(shape)
