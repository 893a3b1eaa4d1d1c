"""Arithmetic of a training step, counted from the model's shape.

Per token through a matrix of P parameters: 2P forward, 2P backward to the input, 2P for the weight's gradient if it is
trained (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, without its attention term; that is added here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per token by part.

    Attributes:
        body: per token through the layers, forward and backward.
        head: per supervised token through the output head.
        attention: per token and per token of its context (scores and values, causal half).
    """

    body: float
    head: float
    attention: float

    def of(self, tokens: float, supervised: float, mean_context: float) -> float:
        """FLOPs of a step over ``tokens``, of which ``supervised`` reach the head."""
        return tokens * (self.body + self.attention * mean_context) + supervised * self.head


def step_flops(model: Any, *, checkpointing: bool) -> StepFlops:
    """Count ``model`` (a transformers model or a PEFT model over one; quantized linears count by their shape)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    of_head = (
        set() if head is None else set(head.modules())
    )  # with an adapter on it: the parts of its wrapper
    body = head_flops = 0.0
    for name, module in model.named_modules():
        matrix = _matrix_size(module)
        if not matrix or name.endswith("original_module"):  # PEFT keeps the untrained original, unused
            continue
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        passes = 2 + 2 + (2 if trained else 0)
        if module in of_head:
            head_flops += passes * matrix
        else:
            body += (passes + (2 if checkpointing else 0)) * matrix
    config = base.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None)
    width = head_dim * heads if head_dim else width
    factor = 3 + (1 if checkpointing else 0)  # forward once, backward twice
    return StepFlops(body, head_flops, factor * 4 * layers * width / 2)


def _matrix_size(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's transposed linear
        return module.weight.numel()  # type: ignore[union-attr, operator]
    return 0
