"""A tokenizer with one token per character, for small models on one kind of text.

Its vocabulary is every character of the training text. A character it never saw becomes the unknown token, so, unlike
with byte-level BPE, a text of another alphabet does not survive it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lmlab import registry
from lmlab.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<|unk|>"


@registry.tokenizers.register
class CharsTokenizer(registry.Config):
    """One token per character of the run's training text; see `train_chars` for the fields."""

    kind: Literal["chars"]
    special_tokens: list[str] = Field(min_length=1)
    max_chars: int = Field(ge=1)


def train_chars(
    texts: Iterable[str], *, special_tokens: list[str], max_chars: int
) -> PreTrainedTokenizerFast:
    """The tokenizer of all characters of ``texts``, in the order of their code points after the special tokens.

    Args:
        texts: read once, in order, up to ``max_chars``.
        special_tokens: ids from 0; the first is EOS. `UNKNOWN` is added if it is not among them.
        max_chars: character budget.

    Raises:
        UserError: no text, or special tokens that are repeated or single characters.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    specials = [*special_tokens, *([] if UNKNOWN in special_tokens else [UNKNOWN])]
    if len(set(specials)) < len(specials) or any(len(token) < 2 for token in specials):
        raise UserError(
            f"bad special tokens {special_tokens}",
            where="tokenizer.special_tokens",
            fix="name each once, two characters or more",
        )
    characters: set[str] = set()
    for text in texts:
        characters.update(text[:max_chars])
        max_chars -= len(text)
        if max_chars <= 0:
            break
    if not characters:
        raise UserError(
            "no text to take characters from", where="tokenizer.kind=chars", fix="check data.path"
        )
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(characters)])}
    # BPE without merges splits into characters on its own; a pre-tokenizer that did would cost more than it.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    setattr(backend, "decoder", decoders.Fuse())  # noqa: B010  # writable, but not in the library's stubs
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=specials[0],
        pad_token=specials[0],
        unk_token=UNKNOWN,
        extra_special_tokens=[token for token in specials[1:] if token != UNKNOWN],
        clean_up_tokenization_spaces=False,
    )
