"""The baseline of benchmarks/shakespeare.py: a lean GPT-2 and a plain torch loop, one character a token, on a CPU.

The model is GPT-2's (pre-norm, learned positions, GELU in its tanh form, tied head) with nothing around it: one matrix
for queries, keys and values, causal SDPA, fused AdamW, batches sliced at random places. No framework, no logging in
the loop. Size and settings are nanoGPT's CPU ones: 4 layers, 4 heads, 128 wide, context 64, batch 12, no dropout.

    python benchmarks/lean_gpt.py tinyshakespeare.txt --steps 2000
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import write_figures
from torch import nn


@dataclass(frozen=True)
class Shape:
    """nanoGPT's CPU shape."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    vocab: int = 65


@dataclass(frozen=True)
class Recipe:
    """nanoGPT's settings for it."""

    batch: int = 12
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.99
    clip: float = 1.0


class Block(nn.Module):
    """``[batch, time, width]`` to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention, then the MLP, each added to its input."""
        batch, time_, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time_, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LeanGPT(nn.Module):
    """Ids ``[batch, time]`` to logits ``[batch, time, vocab]``; initialised as GPT-2 is (std 0.02, residual ends less)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(shape.vocab, shape.width),
            nn.Embedding(shape.context, shape.width),
        )
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if ends_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next character at every position."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def split(text: str, val_fraction: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids of the training and validation part (the text's end), and how many different characters there are."""
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    cut = len(data) - int(len(data) * val_fraction)
    return data[:cut], data[cut:], len(ids)


@torch.inference_mode()
def validation_loss(model: nn.Module, data: torch.Tensor, context: int) -> float:
    """Nats per character over all of ``data``, in windows of ``context`` that each begin without a past."""
    windows = (len(data) - 1) // context
    ids, labels = (data[i : i + windows * context].view(windows, context) for i in (0, 1))
    pairs = zip(ids.split(128), labels.split(128), strict=True)
    nll = sum(float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")) for x, y in pairs)
    return nll / ids.numel()


def train(
    text: str, *, steps: int, seed: int, val_every: int = 0, shape: Shape | None = None
) -> dict[str, Any]:
    """Train and measure.

    Returns:
        ``seconds`` of training (validation left out), ``ms_per_step`` (median over means of ten steps), ``parameters``,
        and ``curve``: ``[step, seconds, validation loss]`` every ``val_every`` steps and at the end.
    """
    torch.manual_seed(seed)
    recipe = Recipe()
    train_ids, val_ids, vocab = split(text)
    shape = shape or Shape(vocab=vocab)
    model = LeanGPT(shape)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
    parameters = list(model.parameters())
    window = torch.arange(shape.context + 1)
    curve, times, done = [], [], 0.0
    for step in range(1, steps + 1):
        began = time.perf_counter()
        progress = min(1.0, max(0.0, (step - recipe.warmup) / max(1, steps - recipe.warmup)))
        lr = recipe.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (recipe.lr - recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / recipe.warmup)
        places = torch.randint(len(train_ids) - shape.context, (recipe.batch, 1))
        rows = train_ids[places + window]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.view(-1, shape.vocab), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
        done += times[-1]
        if step == steps or (val_every and step % val_every == 0):
            curve.append([step, done, validation_loss(model, val_ids, shape.context)])
    # Means of ten steps, as lmlab's log has them: a median of single steps would leave out what disturbs a few of ten.
    windows = [times[i : i + 10] for i in range(0, len(times), 10)]
    return {
        "seconds": done,
        "ms_per_step": 1e3 * statistics.median(statistics.mean(w) for w in windows),
        "parameters": sum(p.numel() for p in parameters),
        "curve": curve,
    }


def main() -> None:
    """Print the figures, or hand them to the harness."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--val-every", type=int, default=0)
    told = parser.parse_args()
    text = told.text.read_text(encoding="utf-8")
    write_figures(train(text, steps=told.steps, seed=told.seed, val_every=told.val_every))


if __name__ == "__main__":
    main()
