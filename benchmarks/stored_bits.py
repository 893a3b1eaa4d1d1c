"""Bits per parameter of each quantized linear layer, all state counted, beside what the formats promise.

nf4 with double quantization: 4 bits a value, an 8-bit scale per 64 values, 32 bits per 256 scales, and per layer the two
code tables and an offset: 4.127 + 8704 / parameters. int8: 8 bits a value and a 32-bit scale a row: 8 + 32 / in_features.
A layer may be at most 0.005 bits above that; the command fails (exit 1) if one is.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from finetune_setting import MODEL
from side_by_side import markdown, save

ALLOWED = 0.005


def promised(kind: str, shape: tuple[int, int]) -> float:
    """Bits per parameter of a layer [out_features, in_features]."""
    return 8 + 32 / shape[1] if kind == "int8" else 4.127 + 8704 / (shape[0] * shape[1])


def layers(kind: str) -> list[Any]:
    """What the linear layers of the suite's model take, quantized as in a run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmlab.models.quantize import EightBit, FourBit, linear_storage

    quant = EightBit(kind="int8") if kind == "int8" else FourBit(kind="nf4", double_quant=True)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))  # type: ignore[arg-type]
    quant.apply(model, compute_dtype=torch.float32)
    return linear_storage(model)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows, result, wrong = [], [], 0
    for kind in ("nf4", "int8"):
        seen: dict[tuple[int, int], Any] = {layer.shape: layer for layer in layers(kind)}
        for shape, layer in sorted(seen.items()):
            target = promised(kind, shape)
            over = layer.bits_per_param - target
            wrong += over > ALLOWED
            rows.append(
                [
                    kind,
                    f"{shape[1]} -> {shape[0]}",
                    f"{layer.bits_per_param:.4f}",
                    f"{target:.4f}",
                    f"{over:+.4f}",
                ]
            )
            result.append(
                {"kind": kind, "shape": shape, "bits_per_param": layer.bits_per_param, "promised": target}
            )
    text = markdown(("stored as", "layer", "bits per parameter", "promised", "difference"), rows)
    save("stored_bits", {"layers": result, "allowed": ALLOWED}, text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
