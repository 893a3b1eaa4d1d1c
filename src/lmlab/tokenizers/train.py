"""Train a byte-level BPE tokenizer on a stream of texts.

Text is cut into words by a pattern, each word becomes its UTF-8 bytes (256 letters that are always in the
vocabulary), and the most frequent neighbouring pair is merged until ``vocab_size`` is reached; the counting is the
`tokenizers` library's. With all bytes present and no normalizer nothing is unknown and decoding gives back the text.

Ids: special tokens from 0, then the bytes, then the merges in the order they were learned.

Trade-off: the word counts are held in memory (they grow with the distinct words, not with the text), and
``max_chars`` caps the text; more text rarely changes a vocabulary of this size. Texts of any size are handed over in
pieces cut where every pattern ends a word, so that the words stay those of the whole text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from lmlab import registry
from lmlab.records import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

BYTES = 256
PIECE_CHARS = 2**16
WORDLESS_CHARS = 2**10
"""Where a text is one single word, merging in a longer piece costs the square of its length."""
PreTokenizerName = Literal["gpt2", "digits", "llama3", "gpt4o", "whitespace", "lines", "none"]
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Llama 3's tokenizer.json, which takes over that of GPT-4 (tiktoken's cl100k_base)."""
GPT4O_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""That of GPT-4o (tiktoken's o200k_base): a word ends where a capital follows a small letter."""
PAD_TOKEN = "<|pad|>"
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML: every turn is ``<|im_start|>role``, a newline, the content, ``<|im_end|>`` and a newline."""


@registry.tokenizers.register
class BPETokenizer(registry.Config):
    """Byte-level BPE trained on the run's training text; see `train_bpe` for the fields."""

    kind: Literal["bpe"]
    vocab_size: int = Field(gt=256)
    pre_tokenizer: PreTokenizerName
    min_frequency: int = Field(ge=1)
    special_tokens: list[str] = Field(min_length=1)
    max_chars: int = Field(ge=1)
    max_token_length: int | None = Field(ge=2)


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    pre_tokenizer: str,
    min_frequency: int,
    special_tokens: list[str],
    max_chars: int,
    max_token_length: int | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts``; the same texts give the same tokenizer.json.

    Args:
        texts: read once, in order, up to ``max_chars``; the text that crosses the limit is cut there.
        vocab_size: all tokens together, specials and bytes included. A small corpus may hold fewer pairs than
            that: the result is then smaller (``len(tokenizer)``) and a warning says so.
        pre_tokenizer: what a merge never crosses. ``gpt2``: that model's words; ``digits``: the same with every digit
            on its own; ``llama3``: that model's words (GPT-4's too), at most three digits together; ``gpt4o``: that
            model's, which cut camelCase; ``whitespace``: a run of anything else with the space before it; ``lines``:
            line ends only, so that tokens hold several words; ``none``: nothing, so that they hold line ends too.
        min_frequency: a pair that occurs less often is never merged.
        special_tokens: ids from 0 in this order. The first is EOS; padding is ``<|pad|>`` if listed, else EOS.
        max_chars: character budget.
        max_token_length: no merge makes a longer token, in bytes; None for no limit.
        chat_template: Jinja; None attaches `DEFAULT_CHAT_TEMPLATE` if its two tokens are among the specials.

    Raises:
        UserError: no text, a vocabulary too small for bytes and specials, bad special tokens, an unknown
            ``pre_tokenizer``, or text that is not valid Unicode.
    """
    _check(vocab_size, special_tokens, max_chars)
    from tokenizers import pre_tokenizers, trainers

    backend = _backend(pre_tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special_tokens,  # pyright: ignore[reportArgumentType]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        # The library merges only what stays shorter than its limit, against its documentation.
        max_token_length=None if max_token_length is None else max_token_length + 1,
    )
    budget = TextBudget(texts, max_chars, cut=CUTS.get(pre_tokenizer, "words"))
    try:
        backend.train_from_iterator(budget, trainer)
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text is not valid Unicode: {error}",
            where="the tokenizer's training text",
            fix="mend or drop it",
        ) from error
    if not budget.used:
        raise UserError("no text to train a tokenizer on", where="tokenizer.kind=bpe", fix="check data.path")
    if (size := backend.get_vocab_size()) < vocab_size:
        log.warning(
            "tokenizer: %d tokens instead of %d, the text has no more frequent pairs", size, vocab_size
        )
    return _wrap(backend, special_tokens, chat_template)


CUTS: dict[str, Literal["lines", "anywhere"]] = {"lines": "lines", "none": "anywhere"}
"""Where a text may be cut for training, by pre-tokenizer; at the ends of words for all the others."""
PLACES = {
    "words": re.compile(r"(?<=[^\W_])(?=[ \n])"),
    "lines": re.compile(r"(?<=\n)"),
    "anywhere": re.compile(""),
}


class TextBudget:
    """The texts up to ``limit`` characters in pieces of about `PIECE_CHARS`, counting what was handed on.

    Args:
        cut: ``words``: before a space or newline that follows a letter or digit, where every pattern of words ends
            one; ``lines``: after a newline; ``anywhere``: in short pieces (`WORDLESS_CHARS`), for text that has no
            words, so that no pair across a cut is counted: one in a thousand. A text without such a place stays whole.
    """

    def __init__(
        self, texts: Iterable[str], limit: int, *, cut: Literal["words", "lines", "anywhere"] = "words"
    ) -> None:
        self.texts, self.limit, self.used = texts, limit, 0
        self.places, self.size = PLACES[cut], WORDLESS_CHARS if cut == "anywhere" else PIECE_CHARS

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            end = min(len(text), self.limit - self.used)
            start = 0
            while start < end:
                found = self.places.search(text, start + self.size, end) if end - start > self.size else None
                stop = found.end() if found else end
                self.used += stop - start
                yield text[start:stop]
                start = stop
            if self.used >= self.limit:
                return


def _check(vocab_size: int, special_tokens: list[str], max_chars: int) -> None:
    """Refuse what the library would take without a word.

    Raises:
        UserError: no, empty, repeated or single-letter special tokens, no character budget, too few ids.
    """
    where = "tokenizer.special_tokens"
    if not special_tokens:
        raise UserError("no special tokens", where=where, fix="name at least one; the first is EOS")
    if len(set(special_tokens)) < len(special_tokens):
        raise UserError(f"repeated special token in {special_tokens}", where=where, fix="name each once")
    for token in special_tokens:
        # A single character could be one of the 256 byte letters; its id would then mean two things.
        if len(token) < 2 or token != token.strip():
            raise UserError(
                f"bad special token {token!r}", where=where, fix="two characters or more, no outer spaces"
            )
    smallest = BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} cannot hold 256 bytes and {len(special_tokens)} special tokens",
            where="tokenizer.vocab_size",
            fix=f"at least {smallest}",
        )
    if max_chars < 1:
        raise UserError(
            f"max_chars {max_chars} leaves no text", where="tokenizer.max_chars", fix="at least 1"
        )


def _backend(pre_tokenizer: str) -> Tokenizer:
    """A byte-level BPE that has learned nothing yet."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE())
    # The attributes are writable in the library, but its stubs leave out their setters.
    setattr(backend, "pre_tokenizer", _pre_tokenizer(pre_tokenizer))  # noqa: B010
    setattr(backend, "decoder", decoders.ByteLevel())  # noqa: B010
    return backend


def _pre_tokenizer(name: str) -> PreTokenizer:
    """The library's pre-tokenizer for our name.

    Raises:
        UserError: it is none of `PreTokenizerName`.
    """
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in ("gpt2", "none"):
        return words if name == "gpt2" else bytes_only
    # Each before the bytes, as StarCoder and Llama 3 have it: forms that other runtimes (llama.cpp) know too.
    cuts = {
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "llama3": lambda: pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        "gpt4o": lambda: pre_tokenizers.Split(Regex(GPT4O_PATTERN), "isolated"),
        "whitespace": lambda: pre_tokenizers.Split(Regex(r" ?\S+|\s+(?!\S)|\s+"), "isolated"),
        "lines": lambda: pre_tokenizers.Split("\n", "merged_with_previous"),
    }
    if name not in cuts:
        names = ", ".join(get_args(PreTokenizerName))
        raise UserError(
            f"unknown pre_tokenizer '{name}'", where="tokenizer.pre_tokenizer", fix=f"one of {names}"
        )
    return pre_tokenizers.Sequence([cuts[name](), words if name == "digits" else bytes_only])


def _wrap(
    backend: Tokenizer, special_tokens: list[str], chat_template: str | None
) -> PreTrainedTokenizerFast:
    """The trained backend as a transformers tokenizer with its roles and chat template."""
    from transformers import PreTrainedTokenizerFast

    eos = special_tokens[0]
    pad = PAD_TOKEN if PAD_TOKEN in special_tokens else eos
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=[token for token in special_tokens if token not in (eos, pad)],
        clean_up_tokenization_spaces=False,
    )
    if chat_template is None and set(TURN_TOKENS) <= set(special_tokens):
        chat_template = DEFAULT_CHAT_TEMPLATE
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
