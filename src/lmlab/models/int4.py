"""4-bit integers in blocks of 64 with one absolute maximum each: what ``quant=int4`` stores, as plain tensors.

``code = round(7 w / absmax)``, so -7 to 7: the symmetric absmax integer of LLM.int8() (arXiv 2208.07339, equation 1, with
7 in place of 127) and of QLoRA's Int4 (arXiv 2305.14314, table 2). As with nf4 and fp4 a block is 64 values of the
flattened weight and its scale is a 32-bit float, so the three differ in their sixteen levels only (here one of the
sixteen stays unused): 4 + 32 / 64 = 4.5 bits per parameter.

Own arithmetic, as no library's layer trains under LoRA on a CPU and a GPU alike (docs/quantization.md), and torchao's
three functions for it, to which this is equal bit for bit, cost every process 1.7 s of imports where torchao is installed.
"""

from __future__ import annotations

import math

import torch

BLOCK = 64
LARGEST = 7


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, uint8 ``[ceil(numel / 64) * 32]``, and fp32 scales ``[ceil(numel / 64)]`` (absmax / 7)."""
    flat = weight.detach().flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    # A block of zeros has a scale too: it is divided by.
    scales = (blocks.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).smallest_normal)
    codes = (blocks * (1 / scales)[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    halves = (codes + 8).view(torch.uint8).view(-1, 2)
    return halves[:, 0] << 4 | halves[:, 1], scales


def dequantize_int4(
    packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight ``[out, in]``; products of code and scale are made in fp32 and rounded to ``dtype`` once."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(torch.int8).sub_(8).view(-1, BLOCK)
    dense = (codes.float() * scales[:, None]).to(dtype)
    return dense.view(-1)[: math.prod(shape)].view(shape)
