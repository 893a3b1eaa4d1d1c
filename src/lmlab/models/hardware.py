"""What follows from the machine: device, compute precision, threads. Every choice can be overridden by config."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

import torch

from lmlab.records import UserError


@dataclass(frozen=True)
class Hardware:
    """The choices in force for one rank.

    Attributes:
        device: where this rank computes.
        precision: ``fp32``, ``bf16`` or ``fp16`` products.
        reason: why this precision, for the table at the start.
    """

    device: torch.device
    precision: str
    reason: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """The floating type of matrix products."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def lightning_precision(self) -> str:
        """Lightning's name for it: weights stay fp32, products go to 16 bits by autocast."""
        return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[self.precision]


def choose_hardware(accelerator: str, precision: str) -> Hardware:
    """Device and precision from ``trainer.accelerator`` and ``trainer.precision``.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    quiet_libraries()
    has_gpu = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise UserError(
            "no GPU on this machine", where="trainer.accelerator", fix="use trainer.accelerator=cpu or auto"
        )
    on_gpu = has_gpu and accelerator != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if precision != "auto":
        return Hardware(device, precision, "as configured")
    if on_gpu and torch.cuda.is_bf16_supported():
        return Hardware(device, "bf16", "the GPU has bf16")
    if not on_gpu and _has_amx():
        return Hardware(device, "bf16", "the CPU has AMX tiles")
    return Hardware(device, "fp32", "no fast bf16 here")


def quiet_libraries() -> None:
    """Silence what the libraries say about choices that are made here.

    bitsandbytes, at import on CPUs with AVX512-BF16: an optional kernel is absent (it is not used). PEFT, at every
    adapter: transformers renamed a property it reads.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")


def _has_amx() -> bool:
    # AVX512-BF16 alone is no gain: 165 against 143 GFLOP/s in fp32, measured on a 2-core Xeon; AMX is several times faster.
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())
