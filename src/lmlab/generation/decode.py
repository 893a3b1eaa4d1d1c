"""Batched decoding: prompts in, new token ids out, with one random stream per prompt.

The prompts are left-padded into one batch, read once into the model's own key-value cache, and then every row gets
one token per forward pass; a row that is finished leaves the batch and the cache. Each row draws with its own
generator by inverting the cumulative distribution at one uniform number per token, so its text depends on its seed,
not on its neighbours and not on the global random state, which is never touched. Trade-off against transformers'
``generate``: none of its other modes (beams, assisted decoding), in exchange for per-row seeds, per-row stop reasons,
prompts that are not padded to the longest of all and rows that cost nothing once finished. On a GPU the one-token steps
run as a CUDA graph (`graphs`). Neighbours still change matrix shapes, hence the last bits of
the logits: two tokens tied to within that rounding can swap.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lmlab.generation.constraints import Constraints, constraints_of
from lmlab.generation.samplers import SamplerConfig, draw
from lmlab.modes import evaluating, is_sharded
from lmlab.records import RunFailedError, UserError

if TYPE_CHECKING:
    from lmlab.generation.cache import FilledLayer
    from lmlab.generation.graphs import StaticSteps

StopReason = Literal["eos", "length", "context", "stop", "complete", "blocked"]


@dataclass(frozen=True)
class Generated:
    """What was written after one prompt.

    Attributes:
        token_ids: the new tokens, without the end-of-sequence token.
        stop_reason: ``eos``; ``length`` (max_new_tokens written); ``context`` (the model's context is full); ``stop``
            (``on_token`` said so); ``complete`` (a text by the sampler's JSON schema, whole); ``blocked``
            (bad_words, json_schema and the like rule out every token that could follow).
        mean_entropy: of softmax(logits), in nats, the mean over the row's steps; None unless asked for.
    """

    token_ids: list[int]
    stop_reason: StopReason
    mean_entropy: float | None = None


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: SamplerConfig,
    eos_token_ids: Collection[int],
    seeds: Sequence[int],
    pad_token_id: int = 0,
    on_token: Callable[[int, int], bool | None] | None = None,
    tokenizer: Any = None,
    entropy: bool = False,
) -> list[Generated]:
    """Continue every prompt, all in one batch, and leave the model and the global random state as they were.

    Args:
        model: a causal LM called as transformers' are, or a PeftModel around one. Runs in eval mode without
            gradients; every submodule's training flag is put back afterwards. Autocast is the caller's.
        prompts: token ids per prompt, of any lengths, each at least one and fewer than the model's context.
        sampler: how a token is chosen from the logits, which are taken to fp32 first.
        eos_token_ids: any of these ends a row.
        seeds: one per prompt; row i draws from ``torch.Generator().manual_seed(seeds[i])``.
        pad_token_id: fills the left of shorter prompts; never seen by the model's attention.
        on_token: called as ``on_token(prompt_index, token_id)`` for each new token, for streaming; the row ends there if
            it returns True. A sampler's ``stop`` strings are for such a caller, as `TextGenerator` is, to find.
        tokenizer: transformers'; for samplers whose ``needs_tokenizer`` is true.
        entropy: measure ``mean_entropy``: one more pass over the logits.

    Returns:
        One `Generated` per prompt, in order; [] for no prompts.

    Raises:
        UserError: a prompt is empty, or leaves no room in the model's context.
        RunFailedError: the logits are not finite (the weights have diverged).
        ValueError: not as many seeds as prompts; ``stop`` without ``on_token``.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if sampler.stop and on_token is None:
        raise ValueError("stop strings are text: call a TextGenerator, or find them in on_token")
    if not prompts:
        return []
    limit = context_length(model)
    _check_prompts(prompts, limit)
    rows = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        room = sampler.max_new_tokens if limit is None else min(sampler.max_new_tokens, limit - len(prompt))
        rows.append(_Row(index=i, room=room, generator=torch.Generator().manual_seed(seed)))
    constraints = constraints_of(sampler, prompts, tokenizer=tokenizer, eos_token_ids=eos_token_ids)
    # no_grad, not inference_mode: a layer may cache a tensor during this forward (rotary tables, a quantizer's
    # state), and an inference tensor left inside a model that goes on training cannot be saved for backward.
    with evaluating(model), torch.no_grad():
        batch = _Batch(model, prompts, rows=list(rows), pad_token_id=pad_token_id)
        ends = _Ends(frozenset(eos_token_ids), constraints, on_token)
        _write(batch, sampler, ends, entropy=entropy)
    return [row.result(sampler.max_new_tokens) for row in rows]


def context_length(model: nn.Module) -> int | None:
    """How many positions the model was made for (``max_position_embeddings``), or None if its config has no limit."""
    return getattr(_text_config(_causal_lm(model)), "max_position_embeddings", None)


@dataclass
class _Row:
    """One prompt's state: ``room`` new tokens at most, and what was written so far."""

    index: int
    room: int
    generator: torch.Generator
    new: list[int] = field(default_factory=list)
    reason: StopReason | None = None
    entropies: list[float] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return self.reason is None and len(self.new) < self.room

    def result(self, max_new_tokens: int) -> Generated:
        full: StopReason = "length" if len(self.new) == max_new_tokens else "context"
        mean = sum(self.entropies) / len(self.entropies) if self.entropies else None
        return Generated(self.new, self.reason or full, mean)


@dataclass(frozen=True)
class _Ends:
    """All that can end a row but its length."""

    eos_token_ids: frozenset[int]
    constraints: Constraints | None
    on_token: Callable[[int, int], bool | None] | None

    def take(self, row: _Row, token: int) -> None:
        """Give the row its next token, and its reason to stop if there is one."""
        if token in self.eos_token_ids:
            row.reason = "complete" if self.constraints is not None and self.constraints.completes else "eos"
            return
        row.new.append(token)
        complete = self.constraints is not None and self.constraints.took(row.index, token)
        if self.on_token is not None and self.on_token(row.index, token):
            row.reason = "stop"
        elif complete:
            row.reason = "complete"


class _Batch:
    """The rows in flight: ids and mask ``[lines, width]``, left-padded, and the model's cache of all but the last."""

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], *, rows: list[_Row], pad_token_id: int
    ) -> None:
        from lmlab.generation.cache import GROW, filled_cache, filled_layers
        from lmlab.generation.graphs import StaticSteps, serves

        self.model = model
        # Longest first, so that rows of similar length are neighbours and can be read together.
        self.rows = sorted(rows, key=lambda row: -len(prompts[row.index]))
        self.lengths = [len(prompts[row.index]) for row in self.rows]
        width = self.lengths[0]
        ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(self.rows):
            ids[line, width - self.lengths[line] :] = torch.as_tensor(prompts[row.index])
            mask[line, width - self.lengths[line] :] = 1
        self.device = next(model.parameters(), ids).device
        self.ids, self.mask = ids.to(self.device), mask.to(self.device)
        causal_lm = _causal_lm(model)
        self._accepted = inspect.signature(causal_lm.forward).parameters.keys()
        new = max(row.room for row in rows)
        caches = "past_key_values" in self._accepted
        self.cache: Any = (
            filled_cache(causal_lm, num_rows=len(rows), columns=width + min(new, GROW)) if caches else None
        )
        self._unread = filled_layers(self.cache)
        self._static: StaticSteps | None = None
        # A graph would hold the collectives of a sharded model, and what they gather, fixed.
        static = _wants_static(causal_lm, self.device) and not is_sharded(model)
        if static and serves(causal_lm, self.cache, self._accepted, num_steps=new):
            self._static = StaticSteps(self._call, self._unread, capture=self.device.type == "cuda")

    def logits(self) -> torch.Tensor:
        """One forward pass: fp32 ``[lines, vocab]`` at the last position.

        A model that keeps no ``past_key_values`` (a pure state-space model) reads its whole text anew each time.
        """
        if self._unread:
            layers, self._unread = self._unread, []
            return self._read_prompts(layers)
        fresh = self.ids.shape[1] if self.cache is None else 1
        if self._static is None or self._static.failed:
            return self._forward(self.ids[:, -fresh:], self.mask, fresh)
        return self._static.logits(self.ids, self.mask, lambda: self._forward(self.ids[:, -1:], self.mask, 1))

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, fresh: int) -> torch.Tensor:
        positions = (
            (mask.cumsum(-1) - 1).clamp(min=0)[:, -fresh:] if fresh > 1 else mask.sum(-1, keepdim=True) - 1
        )
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.clamp(min=0)}
        return self._call(given)

    def _call(self, given: Mapping[str, Any]) -> torch.Tensor:
        """The model on these arguments, as far as it takes them: fp32 logits of the last position."""
        optional = {
            "past_key_values": self.cache,
            "use_cache": "past_key_values" in self._accepted,
            "logits_to_keep": 1,
        }
        output = self.model(
            **{name: value for name, value in (*given.items(), *optional.items()) if name in self._accepted}
        )
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1].float()

    def _read_prompts(self, layers: list[FilledLayer]) -> torch.Tensor:
        """The prompts, in groups of similar length: a short one is not padded to the longest of all."""
        width, found = self.ids.shape[1], []
        for group in prefill_groups(self.lengths, one_more=_cost_of_one_more(self.model, self.device)):
            longest = self.lengths[group.start]
            for layer in layers:
                layer.place(group, width - longest)
            found.append(self._forward(self.ids[group, -longest:], self.mask[group, -longest:], longest))
        for layer in layers:
            layer.place(slice(0, len(self.rows)), 0, filled=width)
        return found[0] if len(found) == 1 else torch.cat(found)

    def append(self, tokens: torch.Tensor) -> None:
        """Add one token ``[lines]`` to each row; finished rows leave, or stay masked if the cache cannot drop them."""
        lines = [line for line, row in enumerate(self.rows) if row.live]
        # A graph holds the number of rows: it is recorded anew only once half of them can leave.
        is_static = self._static is not None and not self._static.failed
        enough = len(lines) <= len(self.rows) // 2 if is_static else len(lines) < len(self.rows)
        if enough and _can_drop(self.cache):
            # The last rows move into the places of those that leave: most of the cache stays where it is.
            behind = [line for line in lines if line >= len(lines)]
            order = [line if self.rows[line].live else behind.pop() for line in range(len(lines))]
            keep = torch.tensor(order, device=self.device)
            self.ids, self.mask, tokens = self.ids[keep], self.mask[keep], tokens[keep]
            self.rows = [self.rows[line] for line in order]
            if self.cache is not None:
                self.cache.reorder_cache(keep)
        # A masked token does not advance its row's position either, so a row kept past its context stays in range.
        live = self.mask.new_tensor([[int(row.live)] for row in self.rows])
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, live], dim=1)


def _write(batch: _Batch, sampler: SamplerConfig, ends: _Ends, *, entropy: bool) -> None:
    """Step until every row has ended; the rows collect their tokens."""
    processors = sampler.processors()
    while True:
        scores = logits = batch.logits()
        if ends.constraints is not None:
            indices = [row.index if row.live else None for row in batch.rows]
            scores = ends.constraints.apply(batch.ids, batch.mask, indices, scores)
        scores = processors(batch.ids, scores)  # pyright: ignore[reportArgumentType] - int64, as it wants
        best, tokens = scores.max(-1)  # NaN is the maximum of a row that has one
        if sampler.draws:
            tokens = draw(scores, [row.generator for row in batch.rows])
        # One transfer for all; ids are exact in fp64.
        found = [best.double(), tokens.double()]
        if entropy:
            found.append(torch.special.entr(logits.softmax(-1)).sum(-1).double())
        highest, chosen, *entropies = torch.cat(found).view(len(found), -1).tolist()
        for line, row in enumerate(batch.rows):
            blocked = highest[line] == -math.inf and ends.constraints is not None
            if not (blocked or math.isfinite(highest[line])):
                raise RunFailedError("the logits are not finite while generating: the weights have diverged")
            if row.live and blocked:
                row.reason = "blocked"
            elif row.live:
                if entropies:
                    row.entropies.append(entropies[0][line])
                ends.take(row, int(chosen[line]))
        if not any(row.live for row in batch.rows):
            return
        batch.append(tokens)


def prefill_groups(lengths: Sequence[int], *, one_more: int) -> list[slice]:
    """Split rows, longest first, so that reading each group padded to its own longest costs least.

    Args:
        lengths: tokens per row, descending.
        one_more: what one more forward pass costs, in tokens.

    Returns:
        Slices of rows in order, together all of them.
    """
    cost, cut = [0.0], [0]  # cheapest cost of the first n rows, and where its last group begins
    for stop in range(1, len(lengths) + 1):
        options = [(cost[start] + (stop - start) * lengths[start] + one_more, start) for start in range(stop)]
        best = min(options)
        cost.append(best[0])
        cut.append(best[1])
    groups, stop = [], len(lengths)
    while stop:
        groups.append(slice(cut[stop], stop))
        stop = cut[stop]
    return groups[::-1]


def _cost_of_one_more(model: nn.Module, device: torch.device) -> int:
    """In tokens: the weights are read once more, and some ms of Python and launches pass (estimated).

    Where RoPE depends on the longest text of a batch, any split would change the angles: too dear.
    """
    if _rope_follows_length(getattr(_text_config(_causal_lm(model)), "rope_parameters", None)):
        return 1 << 40
    if device.type != "cpu":
        return 4096
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 64 + round(1.5e8 / max(1, parameters))  # 3 ms at 100 GFLOP/s


def _wants_static(model: nn.Module, device: torch.device) -> bool:
    """Static steps pay where launching a kernel takes longer than running it."""
    rope = getattr(_text_config(model), "rope_parameters", None)
    return device.type == "cuda" and not _rope_follows_length(rope)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config  # pyright: ignore


def _rope_follows_length(parameters: Any) -> bool:
    """Whether rope_parameters (of the model, or a dict of them per layer type) has a type that looks at the batch."""
    if not isinstance(parameters, dict):
        return False
    kind = parameters.get("rope_type")
    return kind in ("dynamic", "longrope") or any(
        _rope_follows_length(value) for value in parameters.values()
    )


def _check_prompts(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Raise UserError for a prompt that cannot be continued."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            fix = "give it some text, or the tokenizer's BOS token"
            raise UserError("the prompt has no tokens", where=f"prompt {i}", fix=fix)
        if limit is not None and len(prompt) >= limit:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context is {limit}",
                where=f"prompt {i}",
                fix=f"shorten it to at most {limit - 1} tokens, so that one can follow",
            )


def _can_drop(cache: Any) -> bool:
    """Whether rows can be taken out of ``cache`` (None: there is nothing to take them out of).

    By ``reorder_cache``, an index_select over the batch that every layer type of transformers has; its
    ``batch_select_indices`` is missing on linear attention and forgets the recurrent half of hybrid layers.
    """
    layers = getattr(cache, "layers", ())
    return cache is None or all(hasattr(part, "reorder_cache") for part in (cache, *layers))


def _causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile's and PEFT's wrappers: its forward's signature is the real one."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
