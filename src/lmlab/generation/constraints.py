"""What must not come in a text, or must: the fields that every sampler has, as they act on the scores.

In transformers' own order and by transformers' own processors where it has them: repetition penalty, n-grams, banned
strings, grammar, forced beginning; the sampler's warpers follow. They look at a row's own tokens alone: padding is no
token, and what is kept of a row (the end of its text, its place in the grammar) goes by the prompt's index, so that
rows may leave the batch in any order. Trade-off: banned strings and JSON are looked up row by row in Python, which
costs some 10 microseconds a row and step; samplers without them pay nothing.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lmlab.generation.samplers import SamplerConfig, json_grammar
from lmlab.generation.vocabulary import continuation, special_tokens, token_bytes
from lmlab.records import UserError

if TYPE_CHECKING:
    from transformers import LogitsProcessor


class Constraints:
    """What a sampler's common fields rule out, for the rows of one batch.

    Args:
        sampler: with at least one of them set.
        prompts: ids per row.
        tokenizer: transformers'; needed where `SamplerConfig.needs_tokenizer`.
        eos_token_ids: what ends a text; a grammar allows them where the text may end.

    Raises:
        UserError: the tokenizer cannot serve what is asked for, or two of the fields contradict each other.
    """

    def __init__(
        self,
        sampler: SamplerConfig,
        prompts: Sequence[Sequence[int]],
        *,
        tokenizer: Any,
        eos_token_ids: Collection[int],
    ) -> None:
        from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

        if sampler.needs_tokenizer and tokenizer is None:
            raise ValueError("bad_words, begins_with and json_schema need generate(tokenizer=...)")
        self._step = 0
        penalty, size = sampler.repetition_penalty, sampler.no_repeat_ngram_size
        self._penalty: LogitsProcessor | None = (
            RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None
        )
        self._ngrams: LogitsProcessor | None = NoRepeatNGramLogitsProcessor(size) if size else None
        self._banned = BannedStrings(sampler.bad_words, tokenizer, prompts) if sampler.bad_words else None
        self._forced = continuation(tokenizer, sampler.begins_with) if sampler.begins_with else []
        if len(self._forced) > sampler.max_new_tokens:
            raise UserError(
                f"begins_with has {len(self._forced)} tokens and max_new_tokens is {sampler.max_new_tokens}",
                where="sampler.begins_with",
                fix="shorten it, or raise max_new_tokens",
            )
        self._grammar: Grammar | None = None
        if sampler.json_schema is not None:
            self._grammar = Grammar(
                json_grammar(sampler.json_schema), tokenizer, eos_token_ids, self._forced, len(prompts)
            )

    @property
    def completes(self) -> bool:
        """Whether a text that ends of itself is complete by a grammar."""
        return self._grammar is not None

    def check(self, vocab: int) -> None:
        """Start the grammar for ``vocab`` logits, and throw it away.

        Raises:
            UserError: the tokenizer or the forced beginning does not go with it.
        """
        if self._grammar is not None:
            self._grammar.start(vocab)

    def apply(
        self, ids: torch.Tensor, mask: torch.Tensor, rows: Sequence[int | None], scores: torch.Tensor
    ) -> torch.Tensor:
        """The scores of the next token; called once per step.

        Args:
            ids: ``[lines, width]``.
            mask: 1 where there is a token, same shape.
            rows: the prompt's index of each line, None for a line that is finished.
            scores: fp32 ``[lines, vocab]``; not changed.

        Returns:
            ``[lines, vocab]``, -inf where a token is ruled out.
        """
        seen = mask.bool()
        if self._penalty is not None:
            # Padding becomes the row's own first token, which is penalized anyway.
            first = ids.gather(1, seen.int().argmax(1, keepdim=True))
            scores = self._penalty(torch.where(seen, ids, first), scores)  # pyright: ignore[reportArgumentType]
        if self._ngrams is not None:
            scores = self._without_repeated_ngrams(self._ngrams, ids.cpu(), seen.cpu(), scores)
        if self._banned is not None or self._grammar is not None:
            scores = scores.clone()
        if self._banned is not None:
            self._banned.apply(rows, scores)
        if self._grammar is not None:
            self._grammar.apply(rows, scores)
        if self._step < len(self._forced):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self._forced[self._step]] = 0.0
        self._step += 1
        return scores

    @staticmethod
    def _without_repeated_ngrams(
        processor: LogitsProcessor, ids: torch.Tensor, seen: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Row by row, so that the processor sees no padding; ids and scores on one device, as some versions want."""
        lines = zip(ids, seen, scores, strict=True)
        return torch.cat(
            [processor(own[there][None].to(line.device), line[None]) for own, there, line in lines]  # pyright: ignore[reportArgumentType]
        )

    def took(self, row: int, token: int) -> bool:
        """Note a row's new token (not an end mark); True if its text is complete and nothing can follow."""
        if self._banned is not None:
            self._banned.took(row, token)
        return self._grammar is not None and self._grammar.took(row, token)


def constraints_of(
    sampler: SamplerConfig,
    prompts: Sequence[Sequence[int]],
    *,
    tokenizer: Any,
    eos_token_ids: Collection[int],
) -> Constraints | None:
    """`Constraints`, or None where the sampler rules nothing out."""
    if not sampler.needs_tokenizer and sampler.repetition_penalty == 1 and not sampler.no_repeat_ngram_size:
        return None
    return Constraints(sampler, prompts, tokenizer=tokenizer, eos_token_ids=eos_token_ids)


def check_constraints(sampler: SamplerConfig, tokenizer: Any, *, where: str) -> None:
    """Whether this tokenizer can serve what the sampler rules out; all that can be told before a model is there.

    Raises:
        UserError: it cannot; ``where`` is the sampler's key.
    """
    if not sampler.needs_tokenizer:
        return
    try:
        Constraints(sampler, [[]], tokenizer=tokenizer, eos_token_ids=[tokenizer.eos_token_id]).check(
            len(tokenizer)
        )
    except UserError as error:
        place = where + (error.where or "").removeprefix("sampler")
        raise UserError(error.what, where=place, fix=error.fix) from error


class BannedStrings:
    """Strings that must not come, whatever tokens they would be made of.

    A token is ruled out if it holds a banned string, or if the end of the row so far (prompt included) and the token's
    beginning together do. transformers' ``NoBadWordsLogitsProcessor`` bans one sequence of tokens per string; where each
    string is one sequence only the two are the same. Not covered: another case, accents written otherwise.
    """

    def __init__(self, words: Sequence[str], tokenizer: Any, prompts: Sequence[Sequence[int]]) -> None:
        pieces = token_bytes(tokenizer)
        special = special_tokens(tokenizer)
        self._pieces = pieces
        self._words = [word.encode() for word in words if word not in special]
        self._order = sorted((piece, token) for token, piece in enumerate(pieces) if piece)
        held = {token for word in self._words for token, piece in enumerate(pieces) if word in piece}
        self._always = torch.tensor(sorted(held | {special[word] for word in words if word in special}))
        self._longest = max(map(len, self._words), default=1) - 1
        self._ends = [self._end(b"", prompt) for prompt in prompts]
        self._completing = functools.cache(self._tokens_beginning_with)

    def _end(self, text: bytes, ids: Sequence[int]) -> bytes:
        """The last bytes of ``text`` followed by ``ids``, as many as can belong to a banned string."""
        found = b""
        for token in reversed(ids):
            if len(found) >= self._longest:
                break
            found = (self._pieces[token] if token < len(self._pieces) else b"") + found
        whole = text + found
        return whole[max(0, len(whole) - self._longest) :]

    def _tokens_beginning_with(self, text: bytes) -> torch.Tensor:
        at = bisect_left(self._order, (text, -1))
        found = []
        while at < len(self._order) and self._order[at][0].startswith(text):
            found.append(self._order[at][1])
            at += 1
        return torch.tensor(found, dtype=torch.int64)

    def apply(self, rows: Sequence[int | None], scores: torch.Tensor) -> None:
        """Rule out in place, ``[lines, vocab]``."""
        vocab = scores.shape[-1]
        if len(self._always):
            scores[:, self._always[self._always < vocab].to(scores.device)] = -torch.inf
        for line, row in enumerate(rows):
            if row is None:
                continue
            end = self._ends[row]
            for word in self._words:
                for size in range(1, min(len(word) - 1, len(end)) + 1):
                    if end.endswith(word[:size]):
                        tokens = self._completing(word[size:])
                        scores[line, tokens[tokens < vocab].to(scores.device)] = -torch.inf

    def took(self, row: int, token: int) -> None:
        """The row's text has grown by ``token``."""
        self._ends[row] = self._end(self._ends[row], [token])


class Grammar:
    """llguidance's matcher of each row: which tokens may follow, and whether the text is complete.

    Args:
        grammar: llguidance's.
        forced: tokens that every text begins with.
        num_rows: how many texts.
    """

    def __init__(
        self, grammar: str, tokenizer: Any, eos_token_ids: Collection[int], forced: list[int], num_rows: int
    ) -> None:
        self._grammar, self._tokenizer, self._num_rows = grammar, tokenizer, num_rows
        self._eos = tuple(sorted(eos_token_ids)) or (tokenizer.eos_token_id,)
        self._forced, self._matchers = forced, list[Any]()

    def start(self, vocab: int) -> None:
        """Once the number of logits is known, which may be larger than the tokenizer."""
        from llguidance import LLMatcher

        known = _matchable(self._tokenizer, max(vocab, len(self._tokenizer)), self._eos)
        matcher = LLMatcher(known, self._grammar, log_level=0)
        if matcher.is_error():
            raise UserError(
                f"the schema cannot be used: {matcher.get_error().splitlines()[0]}",
                where="sampler.json_schema",
                fix="simplify it",
            )
        if matcher.validate_tokens(self._forced) < len(self._forced):
            raise UserError(
                "begins_with is not the beginning of a text that json_schema allows",
                where="sampler.begins_with",
                fix="leave it empty, or begin as the JSON text begins",
            )
        self._matchers = [matcher.deep_copy() for _ in range(self._num_rows)]

    def apply(self, rows: Sequence[int | None], scores: torch.Tensor) -> None:
        """Rule out in place, ``[lines, vocab]``."""
        if not self._matchers:
            self.start(scores.shape[-1])
        allowed = torch.ones(scores.shape, dtype=torch.uint8)
        for line, row in enumerate(rows):
            if row is not None:
                found = torch.frombuffer(
                    bytearray(self._matchers[row].compute_logit_bias()), dtype=torch.uint8
                )
                allowed[line] = found[: scores.shape[-1]]
        scores.masked_fill_((allowed == 0).to(scores.device), -torch.inf)

    def took(self, row: int, token: int) -> bool:
        """Consume the row's token; True if the text is complete and nothing can follow."""
        matcher = self._matchers[row]
        if not matcher.consume_token(token):
            raise RuntimeError(f"the grammar refused token {token}: {matcher.get_error()}")
        return matcher.is_stopped()


@functools.lru_cache(maxsize=2)
def _matchable(tokenizer: Any, vocab: int, eos: tuple[int, ...]) -> Any:
    """llguidance's view of a tokenizer; about a second for a large vocabulary.

    Raises:
        UserError: it knows no such tokenizer.
    """
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=vocab, eos_token=list(eos))
    except Exception as error:  # it raises what its Rust side says, of several types
        raise UserError(
            f"llguidance cannot read this tokenizer: {str(error).splitlines()[0][:200]}",
            where="sampler.json_schema",
            fix="use a model with a byte-level or byte-fallback tokenizer, or json_schema=null",
        ) from error
