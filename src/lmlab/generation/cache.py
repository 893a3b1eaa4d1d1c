"""Keys and values of a decode in buffers allocated once, filled in place; for transformers' models.

transformers' ``DynamicCache`` concatenates, so that every step copies the whole cache once; its ``StaticCache`` makes
attention run over the empty slots. Here a step writes one column and attention sees a view of the filled ones. Rows
that leave are overwritten by the last ones, in place. Prompts may be read in groups of similar length, each group
into its own rows and right-aligned columns.

A layer with a sliding window keeps all columns and shows attention the last ones (memory for a simpler buffer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

GROW = 256
"""Columns are allocated in steps of this many: a row that ends early costs no more than it used."""

ALIGNED = 64
"""Columns are a multiple of this: attention kernels on GPUs want their masks aligned."""


class FilledLayer(CacheLayerMixin):
    """One layer's keys ``[rows, kv_heads, columns, d]`` and values, of which a part is in use.

    Attributes:
        rows: the rows that the next forward pass reads and writes.
        base: the first column of those rows' text; what lies left of it is zero and must be masked.
        filled: columns from ``base`` on that hold keys.
        window: a query sees itself and the ``window - 1`` columns before it; None: all.
        column: in fixed mode (for a captured CUDA graph) the column to write next, int64 ``[1]`` on the device;
            the layer then shows all its columns, and the caller masks the empty ones.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, *, num_rows: int, columns: int, window: int | None) -> None:
        super().__init__()
        self.num_rows, self.columns, self.window = num_rows, -(-columns // ALIGNED) * ALIGNED, window
        self.is_sliding = window is not None
        self.rows, self.base, self.filled = slice(0, num_rows), 0, 0
        self.column: torch.Tensor | None = None

    def place(self, rows: slice, base: int, *, filled: int = 0) -> None:
        """Let the next forward passes use ``rows``, whose text begins at column ``base``."""
        self.rows, self.base, self.filled = rows, base, filled

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate both buffers, zero (an unwritten NaN would come through a mask: 0 times NaN is NaN)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            t.new_zeros(self.num_rows, t.shape[1], self.columns, t.shape[3])
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[rows, kv_heads, new, d]`` behind what is there; the keys and values that the queries may see."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None  # noqa: PT018 - for the type checker
        if self.column is not None:
            self.keys[self.rows].index_copy_(2, self.column, key_states)
            self.values[self.rows].index_copy_(2, self.column, value_states)
            return self.keys[self.rows], self.values[self.rows]
        _, offset = self.get_mask_sizes(key_states.shape[2])
        begin = self.base + self.filled
        end = begin + key_states.shape[2]
        self.reserve(end)
        self.keys[self.rows, :, begin:end] = key_states
        self.values[self.rows, :, begin:end] = value_states
        first, self.filled = self.filled == 0, end - self.base
        if first:
            return key_states, value_states
        seen = slice(self.base + offset, end)
        return self.keys[self.rows, :, seen], self.values[self.rows, :, seen]

    def reserve(self, columns: int) -> None:
        """Make room for at least ``columns`` columns."""
        if columns <= self.columns or self.keys is None or self.values is None:
            self.columns = max(self.columns, columns)
            return
        self.columns = -(-max(columns + GROW, self.columns + self.columns // 2) // ALIGNED) * ALIGNED
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(self.num_rows, old.shape[1], self.columns, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def keep(self, order: list[int]) -> None:
        """Row i becomes what row ``order[i]`` was; the sources of moved rows lie at or behind ``len(order)``."""
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved and self.keys is not None and self.values is not None:
            to, source = torch.tensor(moved, device=self.keys.device).T
            self.keys[to, :, : self.base + self.filled] = self.keys[source, :, : self.base + self.filled]
            self.values[to, :, : self.base + self.filled] = self.values[source, :, : self.base + self.filled]
        self.rows = slice(0, len(order))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """`keep`, under transformers' name for it."""
        self.keep(beam_idx.tolist())

    def get_seq_length(self) -> int:
        """Columns filled, of the rows in use."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that attention will see, the first of them), for ``query_length`` new ones."""
        if self.column is not None:
            return self.columns, 0
        offset = 0 if self.window is None else max(self.filled - self.window + 1, 0)
        return self.filled + query_length - offset, offset

    def get_max_length(self) -> int:
        """-1: the buffers grow."""
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.20 or so


def filled_cache(model: nn.Module, *, num_rows: int, columns: int) -> DynamicCache | None:
    """A cache of `FilledLayer` for ``model`` (transformers' own class), or None if it needs another kind.

    State-space, convolutional and hybrid layers, compressed caches and models that make their own are such: they
    are given none and make what they need.
    """
    config: Any = getattr(model, "config", None)
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if config is None or not hasattr(config, "get_text_config") or supported is None or not supported():
        return None
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    layers = []
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layers.append(FilledLayer(num_rows=num_rows, columns=columns, window=None))
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(FilledLayer(num_rows=num_rows, columns=columns, window=layer.sliding_window))
        elif type(layer).__name__ == "DummyLayer":
            layers.append(layer)  # reads another layer's keys, or has no attention
        else:
            return None
    if not any(isinstance(layer, FilledLayer) for layer in layers):
        return None
    cache.layers = layers
    return cache


def filled_layers(cache: Any) -> list[FilledLayer]:
    """The layers of ``cache`` that are `FilledLayer`; [] for another kind of cache, or none."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, FilledLayer)]
