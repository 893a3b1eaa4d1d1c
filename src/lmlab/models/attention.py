"""Packed attention: documents lie one after another in a flat row and never see one another.

The linear layers of the model then run without any padding. On CUDA in 16 bits torch's variable-length flash
attention takes the row as it is (`torch.nn.attention.varlen`). On a CPU each document goes through a causal SDPA call of
its own, as a view of the row. Where documents are short (`LONG`), and on CUDA in fp32, those of similar length are
gathered into one right-padded rectangle and go through one call; right padding needs no mask, because a causal query
never looks to its right. Documents are grouped so that a rectangle is at most `MAX_WASTE` times what it holds.

Sliding windows, soft-capped scores, attention sinks and values of another width are honoured. An argument of an
architecture that is not honoured raises instead of being dropped, as an ignored one would be silently wrong; which
architectures come through with every document on its own is found out by `probe`.

Where RoPE depends on the length (dynamic, longrope), the longest document of a batch sets the angles of all beyond
the original context, in flat rows as in transformers' padded ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lmlab_packed"
MAX_WASTE = 1.25
LONG = 32
"""Mean tokens of documents from which, on a CPU, a call for each costs less than gathering them into rectangles."""
_HARMLESS = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "cache_position",
    "return_dict",
    "labels",
}


class Documents:
    """Where the documents of a flat row lie, in the forms attention wants; each is made when first asked for.

    Args:
        cu_seqlens: int32 ``[documents + 1]`` on the CPU, cumulative lengths.
        device: of the row.
    """

    def __init__(self, cu_seqlens: torch.Tensor, device: torch.device | str = "cpu") -> None:
        self.cu_seqlens, self.device = cu_seqlens, torch.device(device)
        self.lengths: list[int] = cu_seqlens.diff().tolist()
        self.longest = max(self.lengths, default=0)

    @property
    def long(self) -> bool:
        """Whether the documents are long enough to be attended to one by one on a CPU."""
        return sum(self.lengths) >= LONG * len(self.lengths)

    @cached_property
    def on_device(self) -> torch.Tensor:
        """``cu_seqlens`` beside the row."""
        return self.cu_seqlens.to(self.device, non_blocking=True)

    @cached_property
    def rectangles(self) -> Rectangles:
        """Documents of similar length together, longest first."""
        return _rectangles(self.cu_seqlens.tolist(), self.device)


class Rectangles(NamedTuple):
    """Documents gathered into right-padded rectangles.

    Attributes:
        gather: per rectangle the flat position of each cell, int64 ``[documents, width]``; a padding cell repeats
            its document's first position.
        scatter: for each flat position its cell in the concatenated rectangles, int64 ``[tokens]``; None where that
            is the position itself.
    """

    gather: tuple[torch.Tensor, ...]
    scatter: torch.Tensor | None


def _rectangles(bounds: list[int], device: torch.device) -> Rectangles:
    starts, ends = bounds[:-1], bounds[1:]
    order = sorted(range(len(starts)), key=lambda i: starts[i] - ends[i])
    groups: list[list[int]] = []
    filled = 0
    for document in order:
        length = ends[document] - starts[document]
        width = ends[groups[-1][0]] - starts[groups[-1][0]] if groups else 0
        if groups and width * (len(groups[-1]) + 1) <= MAX_WASTE * (filled + length):
            groups[-1].append(document)
            filled += length
        else:
            groups.append([document])
            filled = length
    scatter = torch.empty(ends[-1], dtype=torch.int64)
    gather, cells = [], 0
    for group in groups:
        width = ends[group[0]] - starts[group[0]]
        columns = torch.arange(width)
        first = torch.tensor([starts[d] for d in group])[:, None]
        real = columns[None] < torch.tensor([ends[d] - starts[d] for d in group])[:, None]
        index = torch.where(real, first + columns, first)
        scatter[index[real]] = (cells + torch.arange(len(group) * width).view(len(group), width))[real]
        gather.append(index.to(device))
        cells += index.numel()
    whole = cells == len(scatter) and bool((scatter == torch.arange(cells)).all())
    return Rectangles(tuple(gather), None if whole else scatter.to(device))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    lmlab_documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each document on itself; transformers' attention interface.

    Shapes: query ``[1, heads, tokens, d]``, key ``[1, kv_heads, tokens, d]``, value ``[1, kv_heads, tokens, d_v]``
    -> ``[1, tokens, heads, d_v]``.

    Args:
        sliding_window: a position sees itself and the ``sliding_window - 1`` before it.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        s_aux: one more score per head that takes its share of the softmax and gives no value (gpt-oss), ``[heads]``.

    Raises:
        RuntimeError: no documents were given, or an argument that is not honoured here.
    """
    ignored = [name for name, v in kwargs.items() if v is not None and name not in _HARMLESS]
    if kwargs.get("is_causal", False):
        ignored.remove("is_causal")  # causal is what this is
    if ignored or attention_mask is not None:
        raise RuntimeError(
            f"packed attention cannot honour {ignored or 'an attention mask'} of {type(module).__name__}"
        )
    if lmlab_documents is None:
        raise RuntimeError(f"{type(module).__name__} does not pass on where the documents lie")
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [tokens, heads, d]
    if dropout == 0 and softcap is None and s_aux is None and _varlen_serves(query, value):
        out = _varlen(flat[0], flat[1], flat[2], lmlab_documents, scaling=scaling, window=sliding_window)
        return out[None], None
    rectangle = partial(
        _rectangle, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    # Compiled code would be unrolled over the documents, and made anew for another number of them.
    if not query.is_cuda and lmlab_documents.long and not torch.compiler.is_compiling():
        # Views of the row, whose backward is one concatenation: nothing is gathered, padded or scattered.
        documents = zip(*(t.split(lmlab_documents.lengths, dim=2) for t in (query, key, value)), strict=True)
        return torch.cat([rectangle(*parts).transpose(1, 2) for parts in documents], dim=1), None
    gather, scatter = lmlab_documents.rectangles
    apart = len(gather) > 1 or scatter is not None
    cells = []
    for index in gather:
        parts = [
            (t.index_select(0, index.flatten()) if apart else t).reshape(*index.shape, *t.shape[1:])
            for t in flat
        ]
        out = rectangle(*(t.transpose(1, 2) for t in parts))
        cells.append(out.transpose(1, 2).reshape(index.numel(), out.shape[1], out.shape[3]))
    together = cells[0] if len(cells) == 1 else torch.cat(cells)
    return (together if scatter is None else together.index_select(0, scatter))[None], None


def _rectangle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of right-padded rows, ``[rows, heads, width, d]`` (fewer heads of keys and values) and out."""
    width, repeat = query.shape[2], query.shape[1] // key.shape[1]
    plain = softcap is None and sinks is None
    # The CPU's flash kernel reads a head of keys for several of queries; on CUDA in fp32 none does but the slowest.
    shares_heads = repeat > 1 and plain and not query.is_cuda
    if repeat > 1 and not shares_heads:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    mask = None
    if window is not None and window < width:
        mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    if plain:
        return F.scaled_dot_product_attention(
            query, key, value,
            attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=shares_heads,
        )  # fmt: skip
    if mask is None:
        mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    return _explicit(query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=sinks)


@cache
def _varlen_attention() -> tuple[Any, frozenset[str]] | None:
    """torch's variable-length attention and the names of its arguments, which change from release to release."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return (varlen_attn, names) if {"scale", "window_size"} <= names else None


def _varlen_serves(query: torch.Tensor, value: torch.Tensor) -> bool:
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.dtype == query.dtype
        and value.shape[-1] == width
        and width % 8 == 0
        and width <= 256  # flash attention's own limits
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _varlen_attention() is not None
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """``[tokens, heads, d]`` each, and out; no rectangle, no mask."""
    found = _varlen_attention()
    assert found is not None
    function, names = found
    gqa: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in names:
            gqa["enable_gqa"] = True
        else:
            repeat = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    left = -1 if window is None else window - 1  # positions seen besides one's own
    bounds, longest = documents.on_device, documents.longest
    out = function(
        query.contiguous(), key.contiguous(), value.contiguous(), bounds, bounds, longest, longest,
        scale=scaling, window_size=(left, 0), **gqa,
    )  # fmt: skip
    return out


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What SDPA has no argument for; scores ``[rows, heads, width, width]`` exist as in transformers' eager attention."""
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, dropout) @ value


def use_packed_attention(model: PreTrainedModel | Any) -> None:
    """Switch a model to flat rows for good; generation switches back for its own time by `attention`."""
    _set(model, NAME)


@contextmanager
def attention(model: PreTrainedModel | Any, implementation: str) -> Iterator[None]:
    """Run a block under another attention implementation and put the old one back."""
    old = _base(model).config._attn_implementation
    if old == implementation:
        yield
        return
    _set(model, implementation)
    try:
        yield
    finally:
        _set(model, old)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _set(model: Any, implementation: str) -> None:
    register()
    _base(model).set_attn_implementation(implementation)


def register() -> None:
    """Make packed attention known to transformers under `NAME`; again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None  # the documents are in `Documents`; a dense mask would cost tokens squared
