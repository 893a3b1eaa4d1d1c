"""What ranks send one another in an optimizer step, from the shapes of a model's parameters alone.

By the ring algorithms (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002), which are optimal in bytes: of a tensor of
``b`` bytes on ``n`` ranks an all-gather or a reduce-scatter has each rank send, and receive, ``b (n-1)/n`` bytes, an all-reduce
twice that. ZeRO (arXiv 1910.02054, section 7) counts the same: 2 times the parameters for data parallelism, 3 times for shares of
weights, gradients and optimizer state. Here the types are those that lmlab sends (`sharding`, DDP): gradients in fp32, weights as
they are gathered, and again in every micro-batch under FSDP, where DDP reduces once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmlab.models.build import decoder_layers
from lmlab.models.head import base_model

if TYPE_CHECKING:
    import torch

REDUCED = 4
"""Bytes of a gradient's value while it is summed (`sharding.shard_model`: fp32)."""


@dataclass(frozen=True)
class Part:
    """A parameter: its shape, bytes of a value as it is stored, and whether it is trained."""

    shape: tuple[int, ...]
    stored: int
    trained: bool

    @property
    def values(self) -> int:
        """How many numbers it has."""
        return self.rows * self.row

    @property
    def rows(self) -> int:
        """Its first dimension, along which it is cut."""
        return self.shape[0] if self.shape else 1

    @property
    def row(self) -> int:
        """Numbers in one of them."""
        size = 1
        for length in self.shape[1:]:
            size *= length
        return size

    def share(self, ranks: int) -> int:
        """Numbers on the rank that has the most, as which every rank's share is sent."""
        return -(-self.rows // ranks) * self.row


@dataclass(frozen=True)
class Groups:
    """Parameters by what is gathered at once: a decoder layer, or the root (embedding, last norm, head); tied ones once."""

    layers: tuple[tuple[Part, ...], ...]
    root: tuple[Part, ...]

    @property
    def parts(self) -> Iterable[Part]:
        """All of them."""
        return (part for group in (*self.layers, self.root) for part in group)


def groups_of(model: torch.nn.Module, *, times: int = 1) -> Groups:
    """The groups that `sharding.shard_model` would make of a causal LM, whose weights may be fake.

    Args:
        times: how many layers each of its layers stands for.
    """
    base: Any = base_model(model)
    count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    layers = tuple(_parts(layer.parameters()) for layer in decoder_layers(base, count))
    inside = {id(p) for layer in decoder_layers(base, count) for p in layer.parameters()}
    return Groups(layers * times, _parts(p for p in model.parameters() if id(p) not in inside))


def _parts(parameters: Iterable[torch.nn.Parameter]) -> tuple[Part, ...]:
    return tuple(Part(tuple(p.shape), p.element_size(), p.requires_grad) for p in parameters)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step; it receives as many.

    Attributes:
        all_gather: other ranks' weights.
        reduce_scatter: gradients, to the rank whose share they are.
        all_reduce: gradients, to everybody.
    """

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    @property
    def total(self) -> int:
        """Of all collectives."""
        return self.all_gather + self.reduce_scatter + self.all_reduce


def gathered(parts: Sequence[Part], ranks: int, size: int | None) -> int:
    """Bytes of ``parts`` as a whole on one rank, padded to ``ranks`` equal shares.

    Args:
        size: bytes of a value; None: as stored.
    """
    return sum(ranks * part.share(ranks) * (size or part.stored) for part in parts)


def ddp_traffic(groups: Groups, ranks: int) -> Traffic:
    """Under DDP: one all-reduce of every trained gradient, however many micro-batches a step has."""
    whole = sum(part.values * part.stored for part in groups.parts if part.trained)
    return Traffic(all_reduce=2 * whole * (ranks - 1) // ranks)


def fsdp_traffic(groups: Groups, ranks: int, *, size: int | None, micro_batches: int) -> Traffic:
    """Under FSDP, training only (validation gathers as a forward pass does).

    In every micro-batch a layer's weights are gathered for its forward and again for its backward pass, the root's once for
    both; gradients go to their shares.

    Args:
        size: bytes of a value as it is gathered; None: as stored.
        micro_batches: of a step.
    """
    gather = 2 * sum(gathered(layer, ranks, size) for layer in groups.layers) + gathered(
        groups.root, ranks, size
    )
    scatter = gathered([part for part in groups.parts if part.trained], ranks, REDUCED)
    # A share of each: what is whole on one rank came from, or goes to, the ranks - 1 others.
    sent = [micro_batches * whole // ranks * (ranks - 1) for whole in (gather, scatter)]
    return Traffic(all_gather=sent[0], reduce_scatter=sent[1])
