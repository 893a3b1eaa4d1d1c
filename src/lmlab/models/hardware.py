"""What follows from the machine: device, compute precision, threads. Every choice can be overridden by config."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lmlab.models.memory import can_tune_malloc
from lmlab.records import UserError


@dataclass(frozen=True)
class Hardware:
    """The choices in force for one rank.

    Attributes:
        device: where this rank computes.
        precision: ``fp32``, ``bf16`` or ``fp16`` products.
        reason: why this precision, for the table at the start.
        mixed: 16-bit products by autocast over fp32 weights. False: the frozen base lies in the compute type as a
            whole, activations too, and only the trained adapter is fp32; no cast of a weight in any step.
    """

    device: torch.device
    precision: str
    reason: str
    mixed: bool = True

    @property
    def compute_dtype(self) -> torch.dtype:
        """The floating type of matrix products."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def autocast(self) -> bool:
        """Whether products need an autocast region to be in 16 bits."""
        return self.precision != "fp32" and self.mixed

    def computing(self) -> AbstractContextManager[Any]:
        """Products inside are made in `compute_dtype`, as in training."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype) if self.autocast else nullcontext()

    @property
    def lightning_precision(self) -> str:
        """Lightning's name for it: weights stay as they are, products go to 16 bits by autocast if at all."""
        if not self.autocast:
            return "32-true"
        return {"bf16": "bf16-mixed", "fp16": "16-mixed"}[self.precision]

    def table(
        self, *, flat: bool, checkpointing: bool, compiled: bool, optimizer: str, chunked: bool, adapter: str
    ) -> list[tuple[str, str]]:
        """(what, choice and the key that changes it) of all that follows from the machine, for the start of a run."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"{torch.get_num_threads()} threads"
        products = f"{self.precision} products"
        if self.precision != "fp32":
            products += ", fp32 weights" if self.mixed else ", base and activations too"
        kernel = (
            "variable-length flash where it serves"
            if cuda and self.precision != "fp32"
            else "SDPA per document"
        )
        attention = f"packed documents, {kernel}" if flat else "padded or full rows, SDPA"
        head = "in chunks" if chunked else "all logits at once: only the model itself knows its head"
        lora = "fused LoRA, " if adapter in ("lora", "qlora") else ""
        returned = not cuda and can_tune_malloc()
        memory = "off" if not checkpointing else "on, freed blocks returned at once" if returned else "on"
        fused = optimizer == "adamw" and self.precision != "fp16"
        return [
            (
                "device",
                f"{self.device.type}, {name} (trainer.accelerator{'' if cuda else ', OMP_NUM_THREADS'})",
            ),
            ("precision", f"{products}: {self.reason} (trainer.precision)"),
            ("attention", f"{attention} (data.packing)"),
            ("head, loss", f"supervised positions only, {head}"),
            ("memory", f"checkpointing {memory} (model.gradient_checkpointing)"),
            (
                "kernels",
                f"compiled layers {'on' if compiled else 'off'} (trainer.compile), {lora}{'fused ' if fused else ''}{optimizer}",
            ),
        ]


AMX_WIDTH = 256
"""Hidden size from which products in AMX's bf16 gain more than casting costs.

A training step against fp32, 1,000 tokens, 2 cores: 0.8 of its speed at a width of 128, 1.3 to 1.4 times at 256, 1.4 to 3 times at
2,048 (a head of 32,000 rows, but at 128).
"""


def choose_hardware(
    accelerator: str,
    precision: str,
    *,
    frozen_storage: str | None = None,
    hidden_size: Callable[[], int | None] = lambda: None,
) -> Hardware:
    """Device and precision from ``trainer.accelerator`` and ``trainer.precision``.

    Args:
        frozen_storage: how a frozen base is stored (``quant.kind``), None if it is trained. A base that is stored in
            few bits anyway keeps its other weights in bf16 where bf16 is what products are made in.
        hidden_size: of the model, asked for only where it decides; None: large enough for whatever the machine has.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise UserError(
            "no GPU on this machine", where="trainer.accelerator", fix="use trainer.accelerator=cpu or auto"
        )
    on_gpu = has_gpu and accelerator != "cpu"
    device = torch.device("cuda", _own_gpu()) if on_gpu else torch.device("cpu")
    if precision != "auto":
        reason = "as configured"
    elif on_gpu and torch.cuda.is_bf16_supported():
        precision, reason = "bf16", "the GPU has bf16"
    elif not on_gpu and _has_amx():
        wide = (hidden_size() or AMX_WIDTH) >= AMX_WIDTH
        precision = "bf16" if wide else "fp32"
        reason = "the CPU has AMX tiles" if wide else f"narrower than {AMX_WIDTH}, bf16 gains nothing"
    else:
        precision, reason = "fp32", "no fast bf16 here"
    return Hardware(device, precision, reason, is_mixed(precision, frozen_storage))


def _own_gpu() -> int:
    """This rank's GPU among those it sees.

    Raises:
        UserError: it is not among them.
    """
    rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= visible:
        raise UserError(
            f"process {rank} of this machine needs a GPU of its own and sees {visible}",
            where="trainer.devices",
            fix=f"use trainer.devices={visible}; under SLURM give GPUs to the node (--gpus-per-node), not to its tasks",
        )
    return rank


def is_mixed(precision: str, frozen_storage: str | None) -> bool:
    """`Hardware.mixed`; fp16 needs its loss scale, which Lightning ties to autocast."""
    return not (precision == "bf16" and frozen_storage not in (None, "none"))


def move_rest_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Every floating parameter of a frozen base that is still fp32 (embeddings, head, norms) in ``dtype``, in place.

    A tied head stays tied: the parameter is the same object. Quantized weights and their scales are not touched.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def _has_amx() -> bool:
    # AVX512-BF16 alone is no gain: 165 against 143 GFLOP/s in fp32, measured on a 2-core Xeon; AMX is several times faster.
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())
