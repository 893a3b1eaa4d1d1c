"""Modules that are trained whole beside an adapter (PEFT's ``modules_to_save``), in fp32 whatever the base is kept in.

PEFT copies a module as it is stored. Over a base in 16 bits the copy would be trained in 16 bits, where small steps are
rounded away, and values of a file would be rounded when they are loaded. Here the copy is fp32 and its result comes out
in the type of the base's, so that the layers after it see what they always see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lmlab.models.fused import mixed_class


class TrainedLinear(nn.Linear):
    """A linear layer trained in fp32 that multiplies in the type of its input (autocast's, if on)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class _KeepsType:
    """Mixed in before a module's class: its result comes out as ``result_dtype``."""

    result_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs).to(self.result_dtype)  # type: ignore[misc]


def train_in_fp32(model: nn.Module) -> int:
    """Make every module that PEFT copied to be trained fp32, in place; how many were not. Ties between copies stay."""
    from peft.utils import ModulesToSaveWrapper

    changed = 0
    kept: dict[int, nn.Parameter] = {}
    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        for copied in wrapper.modules_to_save.values():
            for part in list(copied.modules()):
                changed += _in_fp32(part, kept)
            if isinstance(copied, nn.Linear):  # PEFT swaps the two in a head tied to an embedding
                copied.out_features, copied.in_features = copied.weight.shape
    return changed


def _in_fp32(module: Any, kept: dict[int, nn.Parameter]) -> int:
    short = {
        name: p
        for name, p in module.named_parameters(recurse=False)
        if p.dtype in (torch.float16, torch.bfloat16)
    }
    if not short:
        return 0
    if isinstance(module, nn.Linear):
        module.__class__ = TrainedLinear
    elif not hasattr(module, "compute_dtype"):  # a stored embedding gives its results in that type already
        module.result_dtype = next(iter(short.values())).dtype
        module.__class__ = mixed_class(_KeepsType, type(module))
    for name, parameter in short.items():
        if id(parameter) not in kept:
            kept[id(parameter)] = nn.Parameter(parameter.data.float(), requires_grad=parameter.requires_grad)
        setattr(module, name, kept[id(parameter)])
    return 1
