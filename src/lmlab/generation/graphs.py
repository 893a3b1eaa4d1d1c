"""One-token steps as a CUDA graph: one launch instead of some hundreds, over buffers whose addresses stand still.

A step reads its ids, positions and column from static tensors, writes keys at that column and attends over all columns
allocated (in steps of `GROW`), the unfilled ones masked; so one graph serves until the buffers grow or half of the
rows have left. The first graph of a decode is checked: two steps are also run without it and the logits compared,
since an architecture could read a Python number in its forward pass that the graph then holds fixed. What cannot be
captured, or does not agree, decodes without graphs, and that is said once on stderr.

Without a GPU the same step runs uncaptured, which is how the tests on a CPU reach everything but the capture itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lmlab.generation.cache import FilledLayer

MIN_STEPS = 16
"""A graph costs about three steps and its check two."""
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.02}
"""Largest difference of logits over the largest logit: masked and unmasked attention are other kernels, and rounding
adds up over the layers. A wrong mask or position is off by a good part of the largest logit."""


class StaticSteps:
    """Runs the one-token steps of a batch from static buffers.

    Args:
        call: the model, called with keyword arguments; returns fp32 logits ``[rows, vocab]``.
        layers: the cache's layers, all of them `FilledLayer`.
        capture: as a CUDA graph; False: the same step, launched kernel by kernel.
    """

    def __init__(
        self, call: Callable[[Mapping[str, Any]], torch.Tensor], layers: list[FilledLayer], *, capture: bool
    ) -> None:
        self._call, self._layers, self._capture = call, layers, capture
        self._checks = 2  # the second finds what changes with the step and stood still in the graph
        self._shape: tuple[int, int] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.failed = False

    def logits(
        self, ids: torch.Tensor, mask: torch.Tensor, eager: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The next logits; by ``eager`` where a graph does not serve (then `failed` is set).

        Args:
            ids: ``[rows, width]``; the last column is new.
            mask: 1 where a token is seen, same shape.
            eager: the same step without static buffers.
        """
        try:
            found = self._run(ids, mask)
            if not self._checks:
                for layer in self._layers:
                    layer.filled = ids.shape[1]
                return found
            self._checks -= 1
            expected = eager()  # after it: whatever it wrote into this column is written again
            self._compare(found, expected)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self.failed, self._graph = True, None
            _say_once(f"decoding without CUDA graphs: {str(error).strip().splitlines()[0][:200]}")
            for layer in self._layers:
                layer.filled = ids.shape[1] - 1
            return eager()
        return expected

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, width = ids.shape
        for layer in self._layers:
            layer.reserve(width)
        positions = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
        if self._shape != (rows, self._layers[0].columns):
            self._allocate(ids, mask)
        self._ids.copy_(ids[:, -1:])
        self._positions.copy_(positions)
        self._column.fill_(width - 1)
        self._seen[:, width - 1].copy_(mask[:, -1])
        if not self._capture:
            return self._forward()
        if self._graph is None:
            self._record()
        assert self._graph is not None
        self._graph.replay()
        return self._logits.clone()  # the next replay writes over it, and a sampler may change it in place

    def _allocate(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        (rows, width), columns = ids.shape, self._layers[0].columns
        self._shape, self._graph = (rows, columns), None
        self._ids, self._positions = torch.zeros_like(ids[:, :1]), torch.zeros_like(ids[:, :1])
        self._column = torch.zeros(1, dtype=torch.int64, device=ids.device)
        self._seen = torch.zeros(rows, columns, dtype=torch.bool, device=ids.device)
        self._seen[:, :width] = mask.bool()
        self._columns = torch.arange(columns, device=ids.device)

    def _masks(self) -> Any:
        """Boolean ``[rows, 1, 1, columns]``; by layer type where windowed and full layers are mixed."""
        full = self._seen[:, None, None]  # to the right of the column nothing is seen
        masks = {
            window: full if window is None else full & (self._columns > self._column - window)
            for window in {layer.window for layer in self._layers}
        }
        if len(masks) == 1:
            return next(iter(masks.values()))
        if len(masks) > 2 or None not in masks:
            raise ValueError("layers of several windows")
        [windowed] = [mask for window, mask in masks.items() if window is not None]
        return {"full_attention": masks[None], "sliding_attention": windowed}

    def _forward(self) -> torch.Tensor:
        for layer in self._layers:
            layer.column = self._column
        try:
            return self._call(
                {"input_ids": self._ids, "attention_mask": self._masks(), "position_ids": self._positions}
            )
        finally:
            for layer in self._layers:
                layer.column = None

    def _record(self) -> None:
        device = self._ids.device
        kind = device.type
        # A weight that autocast casts and caches while recording would lie in the graph's memory and be used outside.
        uncached = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with torch.cuda.device(device), uncached:
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(
                    2
                ):  # libraries choose kernels and allocate workspaces, which a capture must not see
                    self._forward()
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # The outer block: torch.cuda.graph leaves its own stream as the current one where a capture fails, and
            # training would go on there, beside everything that counts on the default one. Threads: one that pins the
            # next batch's memory must not spoil the capture.
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self._logits = self._forward()
        self._graph = graph

    def _compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        keys = self._layers[0].keys
        allowed = AGREE.get(torch.float32 if keys is None else keys.dtype, 0.06)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= allowed:
            raise ValueError(f"its logits differ by {difference:.2g} of the largest")


def serves(model: Any, cache: Any, accepted: Any, *, num_steps: int) -> bool:
    """Whether static steps are worth a try: enough steps, SDPA (which takes boolean masks), own layers alone."""
    layers = getattr(cache, "layers", ())
    return (
        num_steps >= MIN_STEPS
        and bool(layers)
        and all(isinstance(layer, FilledLayer) for layer in layers)
        and "position_ids" in accepted
        and getattr(model.config, "_attn_implementation", None) == "sdpa"
        and not any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    )


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)
