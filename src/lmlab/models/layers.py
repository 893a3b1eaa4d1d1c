"""What training does to each layer: how far its weight has moved, along how many directions, under what gradient.

The update of a LoRA layer is ``scale * B A``, as large as the weight, and never formed. With the r x r Gram matrices
``G_B = B^T B`` and ``G_A = A A^T = H H^T`` the squared singular values of ``B A`` are the eigenvalues of ``H^T G_B H``.
In double precision, because a Gram matrix squares the condition number: what lies below 1e-8 of the largest is lost.

Full fine-tuning moves W from W_0, and a copy of W_0 would cost as much memory as the model. Kept of it is a count sketch
S W_0 of 64 rows (each row of W_0 added to one of them under a random sign; Charikar et al. 2002, "Finding frequent items
in data streams"): ``||S (W - W_0)||`` is ``||W - W_0||`` to a standard deviation of at most 9 % (for an update of rank
one; less the more directions it has), and exact for a layer of up to 64 outputs. Its effective rank would take all
singular values of an ``[out, in]`` matrix and is left out.

Effective rank: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmlab.models.quantize import dense_weight, is_dense

SKETCH_ROWS = 64


@dataclass(frozen=True)
class LayerFigures:
    """One layer at one step.

    Attributes:
        layer: its name in the base model.
        update_ratio: Frobenius norm of the update over that of the weight before training; None of a zero weight.
        effective_rank: of the update, see `effective_rank`; None where the update is not low-rank.
        grad_norm: of what is trained in this layer (A and B together, or the weight); None if it has no gradient.
    """

    layer: str
    update_ratio: float | None
    effective_rank: float | None
    grad_norm: float | None


def effective_rank(singular_values: torch.Tensor) -> torch.Tensor:
    """Exp of the entropy of the singular values ``[..., r]`` over their sum: between 1 and r, and 0 if all are zero."""
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / torch.where(total > 0, total, 1.0)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


def product_spectrum(gram_b: torch.Tensor, gram_a: torch.Tensor) -> torch.Tensor:
    """Singular values ``[..., r]`` of ``B A``, ascending, from ``B^T B`` and ``A A^T`` (both ``[..., r, r]``, float64)."""
    values, vectors = torch.linalg.eigh(gram_a)
    half = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return torch.linalg.eigvalsh(half.mT @ gram_b @ half).clamp(min=0).sqrt()


def averages(figures: Iterable[LayerFigures]) -> dict[str, float]:
    """What a log has room for: means of update ratio and effective rank over the layers, and the largest gradient norm."""
    rows = list(figures)
    found: dict[str, float] = {}
    for name in ("update_ratio", "effective_rank"):
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values:
            found[f"layers/{name}"] = sum(values) / len(values)
    norms = [row.grad_norm for row in rows if row.grad_norm is not None]
    if norms:
        # max() would let a NaN through only where it comes first.
        found["layers/grad_norm_max"] = math.nan if any(map(math.isnan, norms)) else max(norms)
    return found


class TrackedLayers:
    """The layers of a model in training and what is known of them from before the first step.

    Made while the model has the weights that updates are measured against: a fresh adapter on its base, or full weights
    before a checkpoint of the run replaces them. Layers of an adapted model are the linear ones under plain LoRA (any
    scaling, any storage of the base); where PEFT's layer does more than add ``scale * B A`` (DoRA and its like) or has
    several adapters at once, a norm of B A would say something else, and the layer is left out. Of a model that is trained
    as a whole they are all linear layers but the head.

    Args:
        model: plain or PEFT's; with weights on one device or sharded (then every rank makes it and reads it).
    """

    def __init__(self, model: nn.Module) -> None:
        adapted = hasattr(model, "peft_config")
        self._layers: list[_LowRank | _Full] = list(_low_rank(model) if adapted else _full(model))

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def read(self, *, grad_scale: float = 1.0) -> list[LayerFigures]:
        """The figures now, in the model's order; one transfer from the device for all layers.

        Args:
            grad_scale: what the gradients are multiplied by, to undo a clipping.
        """
        norms, ranks = self._updates()
        grads = self._grad_norms()
        figures = []
        for layer, norm, rank, grad in zip(self._layers, norms, ranks, grads, strict=True):
            ratio = norm / layer.weight_norm if layer.weight_norm else None
            figures.append(LayerFigures(layer.name, ratio, rank, None if grad is None else grad * grad_scale))
        return figures

    def _updates(self) -> tuple[list[float], list[float | None]]:
        """Norm and effective rank of every layer's update."""
        norms, ranks = [0.0] * len(self), list[float | None]([None] * len(self))
        full = [(place, layer) for place, layer in enumerate(self._layers) if isinstance(layer, _Full)]
        if full:
            moved = torch.stack([layer.moved() for _, layer in full]).tolist()
            for (place, _), norm in zip(full, moved, strict=True):
                norms[place] = norm
        by_rank: dict[int, list[tuple[int, _LowRank]]] = {}
        for place, layer in enumerate(self._layers):
            if isinstance(layer, _LowRank):
                by_rank.setdefault(layer.rank, []).append((place, layer))
        for group in by_rank.values():
            # Small matrices: many of them at once, on the CPU, are decomposed sooner than on a GPU.
            grams = torch.stack([layer.grams() for _, layer in group]).cpu()
            broken = ~grams.isfinite().flatten(1).all(1)
            grams[broken] = 0.0
            spectra = product_spectrum(grams[:, 0], grams[:, 1])
            spectra[broken] = math.nan
            effective = torch.where(broken, math.nan, effective_rank(spectra)).tolist()
            for (place, layer), norm, rank in zip(
                group, spectra.norm(dim=-1).tolist(), effective, strict=True
            ):
                norms[place], ranks[place] = norm * abs(layer.scale), rank
        return norms, ranks

    def _grad_norms(self) -> list[float | None]:
        found: list[float | None] = [None] * len(self)
        present: list[int] = []
        squares: list[torch.Tensor] = []
        for place, layer in enumerate(self._layers):
            grads = [p.grad for p in layer.trained if p.grad is not None]
            if grads:
                present.append(place)
                squares.append(torch.stack([_norm(grad) for grad in grads]).square().sum())
        if squares:
            for place, square in zip(present, torch.stack(squares).tolist(), strict=True):
                found[place] = math.sqrt(square) if square >= 0 else math.nan
        return found


class _LowRank:
    """A linear layer under one plain LoRA adapter."""

    def __init__(self, name: str, module: Any, adapter: str) -> None:
        self.name, self.module, self.adapter = name, module, adapter
        self.rank = int(module.r[adapter])
        self.weight_norm = _norm(dense_weight(module.get_base_layer(), torch.float32)).item()

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight

    @property
    def scale(self) -> float:
        return float(self.module.scaling[self.adapter])

    def grams(self) -> torch.Tensor:
        """``[2, r, r]``: B^T B and A A^T, in float64."""
        a, b = (_whole(weight).double() for weight in self.trained)
        return torch.stack([b.t() @ b, a @ a.t()])


class _Full:
    """A linear layer trained as a whole, with a sketch of what it was."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        weight = self._weight()
        self.weight_norm = _norm(weight).item()
        generator = torch.Generator().manual_seed(0)  # its own: training's draws are not touched
        outputs = weight.shape[0]
        self._bucket = torch.randint(SKETCH_ROWS, (outputs,), generator=generator).to(weight.device)
        self._sign = (torch.randint(2, (outputs, 1), generator=generator) * 2.0 - 1.0).to(weight.device)
        self._before = self._sketch(weight)

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return (self.module.weight,)

    def _weight(self) -> torch.Tensor:
        return _whole(dense_weight(self.module, torch.float32))

    def _sketch(self, weight: torch.Tensor) -> torch.Tensor:
        """``[64, in]``, or a copy of a weight that has no more rows than that."""
        if len(weight) <= SKETCH_ROWS:
            return weight.clone()
        # Sums, not a matrix product: TF32 would round the weights, and small updates away.
        self._bucket, self._sign = self._bucket.to(weight.device), self._sign.to(weight.device)
        return weight.new_zeros(SKETCH_ROWS, weight.shape[1]).index_add_(0, self._bucket, weight * self._sign)

    def moved(self) -> torch.Tensor:
        """Frobenius norm of the way from the first weight to the one it has now, as far as the sketch tells."""
        now = self._sketch(self._weight())
        self._before = self._before.to(now.device)  # sharding moves the weights after this was made
        return _norm(now - self._before)


def _low_rank(model: Any) -> Iterable[_LowRank]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or len(module.active_adapters) != 1:
            continue
        adapter = module.active_adapters[0]
        plain = adapter in module.lora_A and adapter not in module.lora_variant
        if plain and is_dense(module.get_base_layer()):
            yield _LowRank(name.removeprefix("base_model.model."), module, adapter)


def _full(model: Any) -> Iterable[_Full]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if module is not head and is_dense(module) and module.weight.requires_grad:
            yield _Full(name, module)


def _whole(tensor: Any) -> torch.Tensor:
    """A sharded tensor gathered from all ranks, any other as it is."""
    return (
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    )  # a DTensor, without importing its package


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    """Frobenius norm in fp32, over all ranks where the tensor is sharded."""
    return _whole(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))
