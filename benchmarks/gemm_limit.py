"""The time a training step cannot go below on this machine: its matrix products, timed at the very shapes of the step.

Counted for each step: every linear layer's product forward and, where its input needs a gradient, backward; LoRA's six
small products where there are adapters; weight gradients in full fine-tuning; the head forward and backward at the
supervised positions alone. Not counted, so that the limit is on the strict side: attention's own products, norms,
softmax, the optimizer, reading memory between them. Each product is timed with its output allocated before.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

REPEATS = 3
Shape = tuple[int, int, int]


def step_seconds(run_dir: Path, tokens: int, supervised: int) -> float:
    """Seconds of all products of one optimizer step of a run with ``tokens`` positions, of which ``supervised`` are trained."""
    from lmlab.config.compose import load_frozen
    from lmlab.journal import RunDir

    config: Any = load_frozen(RunDir(run_dir).config)
    rank = getattr(config.adapter, "rank", None)
    return sum(
        count * product_seconds(shape)
        for shape, count in step_products(base_config(config), tokens, supervised, rank).items()
    )


def base_config(config: Any) -> Any:
    """The model's transformers config."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(config.model.name_or_path).get_text_config()


def step_products(model: Any, tokens: int, supervised: int, rank: int | None) -> dict[Shape, int]:
    """(m, k, n) of each product ``[m, k] @ [k, n]`` of a step and how often it is made.

    Args:
        model: a Llama-like config.
        rank: of LoRA over a frozen base; None where everything is trained.
    """
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    heads = hidden // model.num_attention_heads
    kv = heads * model.num_key_value_heads
    linears = [
        *[(hidden, width, "first") for width in (hidden, kv, kv)],
        (hidden, hidden, ""),
        (hidden, inner, ""),
        (hidden, inner, ""),
        (inner, hidden, ""),
    ]
    products: dict[Shape, int] = {}

    def add(shape: Shape, count: int) -> None:
        products[shape] = products.get(shape, 0) + count

    for read, made, place in linears:
        add((tokens, read, made), layers)
        # The first layer's input comes from a frozen embedding: nobody needs its gradient.
        backward = layers - (1 if place == "first" and rank is not None else 0)
        add((tokens, made, read), backward)
        if rank is None:
            add((made, tokens, read), layers)
            continue
        add((tokens, read, rank), layers)  # A x
        add((tokens, rank, made), layers)  # B (A x)
        add((made, tokens, rank), layers)  # the gradient of B
        add((tokens, made, rank), layers)  # that of A x
        add((rank, tokens, read), layers)  # that of A
        add((tokens, rank, read), backward)  # that of x through A
    add((supervised, hidden, model.vocab_size), 1)
    add((supervised, model.vocab_size, hidden), 1)
    if rank is None:
        add((model.vocab_size, supervised, hidden), 1)
    return products


def product_seconds(shape: Shape) -> float:
    """Best of a few of one product in fp32 on this process's threads."""
    m, k, n = shape
    # The values do not matter to the time, and drawing some would take longer than the product.
    left, right, out = torch.full((m, k), 0.5), torch.full((k, n), 0.5), torch.empty(m, n)
    torch.mm(left, right, out=out)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - began)
    return best


def sgemm_rate(size: int = 2048) -> float:
    """GFLOP/s of a square product, for the record."""
    return 2 * size**3 / product_seconds((size, size, size)) / 1e9
