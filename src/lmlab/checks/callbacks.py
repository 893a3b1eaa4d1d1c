"""What is different in the runs of checks, as a plugin of theirs (``plugins: [lmlab.checks.callbacks]``).

Without dropout, for comparisons in which random numbers fall otherwise: other micro-batches, several ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lmlab.registry import callbacks
from lmlab.training.options import CallbackConfig

if TYPE_CHECKING:
    from torch import nn


def without_dropout(model: nn.Module) -> float:
    """Set every dropout in ``model`` to zero, in place; the largest that there was.

    Attention and some blocks have it as a number of their own (``attention_dropout``), not as a layer.
    """
    from torch import nn

    layers = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    largest = 0.0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, layers))
            if is_rate and isinstance(value, float) and value:
                largest = max(largest, value)
                setattr(module, name, 0.0)
    return largest


@callbacks.register
class WithoutDropout(CallbackConfig):
    """`without_dropout` when the fit begins."""

    kind: Literal["without_dropout"]

    def build(self) -> Any:
        from lmlab.training.callbacks import Callback

        class Without(Callback):
            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                without_dropout(pl_module)

        return Without()
