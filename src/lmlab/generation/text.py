"""From prompt strings to generated strings: the one path used by training samples, metrics and scripts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lmlab.generation.decode import generate
from lmlab.generation.samplers import SamplerConfig


@dataclass(frozen=True)
class GeneratedText:
    """``text`` without the prompt and the end mark; ``stop_reason`` is eos, length or context."""

    text: str
    new_tokens: int
    stop_reason: str


@dataclass(frozen=True)
class TextGenerator:
    """A model with its tokenizer, ready to continue prompts.

    Attributes:
        encode: prompt -> ids, by the same path as in training (at most one BOS, no EOS).
        decode: ids -> text.
        eos_token_ids: any of them ends a text.
        around: entered around all batches of a call (attention implementation, autocast, a model made ready to
            decode), with the number of forward passes expected.
        batch_size: prompts decoded together.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos_token_ids: Collection[int]
    around: Callable[..., AbstractContextManager[Any]] = nullcontext
    batch_size: int = 64

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        sampler: SamplerConfig,
        seeds: Sequence[int],
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[GeneratedText]:
        """Continue each prompt; row i is drawn from ``seeds[i]`` whatever else is in the batch.

        Args:
            on_text: called with (prompt index, token text) as tokens come, for streaming.
        """
        results: list[GeneratedText] = []
        starts = range(0, len(prompts), self.batch_size)
        with self.around(len(starts) * sampler.max_new_tokens):
            for start in starts:
                ids = [self.encode(prompt) for prompt in prompts[start : start + self.batch_size]]
                told = (
                    None
                    if on_text is None
                    else (lambda i, token, start=start: on_text(start + i, self.decode([token])))
                )
                rows = generate(
                    self.model,
                    ids,
                    sampler=sampler,
                    eos_token_ids=self.eos_token_ids,
                    seeds=seeds[start : start + self.batch_size],
                    on_token=told,
                )
                results += [
                    GeneratedText(self.decode(row.token_ids), len(row.token_ids), row.stop_reason)
                    for row in rows
                ]
        return results
