"""What a model that is being trained is like to whoever looks at it: in evaluation mode for a block, whole or sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own flag back (a frozen submodule may have been in eval)."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are cut over ranks (`models.sharding`): then all ranks must run it together."""
    return any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
