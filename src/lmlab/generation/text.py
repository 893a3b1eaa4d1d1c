"""From prompt strings to generated strings: the one path used by training samples, metrics and scripts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from lmlab.generation.decode import StopReason, generate
from lmlab.generation.samplers import SamplerConfig
from lmlab.generation.vocabulary import is_byte, special_tokens

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no character decode to: at the end of a text most often a character begun."""
MOST_BYTES = 4
"""of a character in UTF-8."""


@dataclass(frozen=True)
class GeneratedText:
    """What was written after one prompt.

    Attributes:
        text: without the prompt, the end mark, a stop string and what follows it, and without the first bytes of a
            character that was not finished.
        new_tokens: tokens written, also those of a stop string.
        stop_reason: ``eos``, ``length``, ``context``, ``stop`` (a stop string came), ``complete`` (the text is JSON
            that the sampler's schema allows) or ``blocked`` (the sampler's constraints rule out every token).
        mean_entropy: of the model's own distribution softmax(logits), before any sampler: nats, mean over the row's
            steps; None unless asked for.
    """

    text: str
    new_tokens: int
    stop_reason: StopReason
    mean_entropy: float | None = None


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
        tokenizer: transformers' own, for samplers that look at the tokens' texts.
        end_mark: a text that ends with it is shown without; for end marks that are several tokens.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos_token_ids: Collection[int]
    around: Callable[..., AbstractContextManager[Any]] = nullcontext
    batch_size: int = 64
    tokenizer: Any = None
    end_mark: str = ""

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        sampler: SamplerConfig,
        seeds: Sequence[int],
        on_text: Callable[[int, str], None] | None = None,
        entropy: bool = False,
    ) -> list[GeneratedText]:
        """Continue each prompt; row i is drawn from ``seeds[i]`` whatever else is in the batch.

        Args:
            on_text: called with (prompt index, piece) as a text grows, for streaming. The pieces joined are the
                result's ``text``: no part of a stop string or of the end mark is ever among them, and no half character.
            entropy: whether to measure ``mean_entropy``.

        Raises:
            UserError: a prompt that cannot be continued, or a sampler that this tokenizer cannot serve.
        """
        results: list[GeneratedText] = []
        starts = range(0, len(prompts), self.batch_size)
        with self.around(len(starts) * sampler.max_new_tokens):
            for start in starts:
                ids = [self.encode(prompt) for prompt in prompts[start : start + self.batch_size]]
                texts = [
                    GrowingText(
                        self,
                        sampler.stop,
                        None if on_text is None else functools.partial(on_text, start + i),
                    )
                    for i in range(len(ids))
                ]
                followed = on_text is not None or sampler.stop
                rows = generate(
                    self.model,
                    ids,
                    sampler=sampler,
                    eos_token_ids=self.eos_token_ids,
                    seeds=seeds[start : start + self.batch_size],
                    on_token=(lambda i, token, texts=texts: texts[i].add(token)) if followed else None,
                    tokenizer=self.tokenizer,
                    entropy=entropy,
                )
                results += [
                    GeneratedText(
                        text.finish(row.token_ids), len(row.token_ids), row.stop_reason, row.mean_entropy
                    )
                    for text, row in zip(texts, rows, strict=True)
                ]
        return results


class GrowingText:
    """One row's text while its tokens come: looks for stop strings, and tells what can no longer change.

    Args:
        generator: whose ``decode``, ``end_mark`` and ``tokenizer`` are used.
        stop: strings before the first of which the text ends.
        tell: called with each new piece.
    """

    def __init__(
        self, generator: TextGenerator, stop: Sequence[str], tell: Callable[[str], None] | None
    ) -> None:
        self._decode, self._end_mark, self._tokenizer = (
            generator.decode,
            generator.end_mark,
            generator.tokenizer,
        )
        self._stop, self._tell = stop, tell
        special = special_tokens(generator.tokenizer) if stop else {}
        self._stop_ids = {special[mark] for mark in stop if mark in special}
        self._marks = [*stop, *([generator.end_mark] if generator.end_mark else [])]
        self._ids: list[int] = []
        self._told = ""
        self._cut: str | None = None

    def add(self, token: int) -> bool:
        """Take the row's next token; True once a stop string has come."""
        if token in self._stop_ids:  # no text is decoded from it
            self._cut = self._whole(self._ids)
            return True
        self._ids.append(token)
        text = self._decode(self._ids) if self._stop else ""
        places = [place for mark in self._stop if (place := text.find(mark)) >= 0]
        if places:
            self._cut = text[: min(places)]
            return True
        if self._tell is not None:
            text = self._settled()
            held = max((n for mark in self._marks for n in _begun(mark, text)), default=0)
            self._say(text[: len(text) - held])
        return False

    def finish(self, ids: list[int]) -> str:
        """The text of all the row's tokens; what has not been told of it is told."""
        text = self._whole(ids).removesuffix(self._end_mark) if self._cut is None else self._cut
        self._say(text)
        return text

    def _say(self, text: str) -> None:
        if self._tell is not None and len(text) > len(self._told) and text.startswith(self._told):
            self._tell(text[len(self._told) :])
            self._told = text

    def _settled(self) -> str:
        """The text as far as no later token changes it: byte tokens at the end can still become another character."""
        ids = self._ids
        if self._tokenizer is not None:
            end = len(ids)
            while end and is_byte(self._tokenizer, ids[end - 1]):
                end -= 1
            ids = ids[:end]
        return self._decode(ids).rstrip(UNREADABLE)

    def _whole(self, ids: list[int]) -> str:
        """The decoded text, without the first bytes of a character at its end that was not finished."""
        text = self._decode(ids)
        if text.endswith(UNREADABLE):
            for dropped in range(1, min(MOST_BYTES, len(ids) + 1)):
                shorter = self._decode(ids[: len(ids) - dropped])
                if not shorter.endswith(UNREADABLE):
                    # The token that begins the character may hold a whole one before it (a blank, most often).
                    rest = text.removeprefix(shorter) if text.startswith(shorter) else ""
                    return shorter + rest.rstrip(UNREADABLE)
        return text


def _begun(mark: str, text: str) -> list[int]:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    return [n for n in range(1, min(len(mark), len(text)) + 1) if text.endswith(mark[:n])]
