"""What a tokenizer does to given texts: compression, words in pieces, round trip, and what its embedding costs.

Bytes per token (compression) can be compared across tokenizers and languages, since UTF-8 bytes belong to the text and not
to the tokenizer. Fertility is the mean number of tokens that touch a word (Rust et al. 2021, "How Good is Your
Tokenizer?", arXiv 2012.15613), here counted in running text: a word is a run of letters, marks and digits, and a token that
spans two words touches both, so 1 is the least. Scripts without spaces between words (Chinese, Japanese, Thai) have whole
phrases for words; there only the compression tells anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmlab.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64
"""Texts encoded in one call."""
SHOWN = 24
"""Characters shown on either side of where a text came back changed."""


@dataclass(frozen=True)
class Loss:
    """The first text that did not come back: what stood there, and what came out."""

    before: str
    after: str


@dataclass
class Measurement:
    """Counts over some texts; the shares follow from them, so that measurements add up.

    Attributes:
        characters, size_bytes: of the texts, in code points and UTF-8 bytes.
        words: runs of letters, marks and digits.
        touches: over all words, the tokens that touch it.
        split_words: words that more than one token touches.
        exact: texts that decoding gives back to the character.
        loss: the first that it does not.
        ids: the distinct ids that occurred.
    """

    texts: int = 0
    characters: int = 0
    size_bytes: int = 0
    tokens: int = 0
    words: int = 0
    touches: int = 0
    split_words: int = 0
    exact: int = 0
    loss: Loss | None = None
    ids: set[int] = field(default_factory=set)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token; None without tokens."""
        return self.size_bytes / self.tokens if self.tokens else None

    @property
    def fertility(self) -> float | None:
        """Tokens that touch a word, on average; None without words."""
        return self.touches / self.words if self.words else None

    @property
    def split_share(self) -> float | None:
        """Share of the words that lie in several tokens; None without words."""
        return self.split_words / self.words if self.words else None

    def __add__(self, other: Measurement) -> Measurement:
        counts = ("texts", "characters", "size_bytes", "tokens", "words", "touches", "split_words", "exact")
        return Measurement(
            **{name: getattr(self, name) + getattr(other, name) for name in counts},
            loss=self.loss or other.loss,
            ids=self.ids | other.ids,
        )


def measure(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Measurement:
    """Encode every text as training does (no special tokens added), and decode it again.

    Raises:
        UserError: a slow tokenizer (it has no offsets), or a text that is not valid Unicode.
    """
    found = Measurement()
    for text, ids, spans in _encoded(tokenizer, texts):
        touches = _touches(word_spans(text), spans)
        found.texts += 1
        found.characters += len(text)
        found.size_bytes += len(text.encode("utf-8"))
        found.tokens += len(ids)
        found.words += len(touches)
        found.touches += int(touches.sum())
        found.split_words += int((touches > 1).sum())
        found.ids.update(ids)
        back = decoded(tokenizer, ids)
        if back == text:
            found.exact += 1
        elif found.loss is None:
            found.loss = _difference(text, back)
    return found


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ``ids``, special tokens in it and nothing tidied up."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, int]]:
    """``text`` cut where its tokens are cut: (piece, how many tokens it is), joined the text again.

    Tokens that hold only some bytes of a character make one piece with the others of that character.
    """
    ((_, _, spans),) = _encoded(tokenizer, [text])
    made: list[tuple[str, int]] = []
    start, count = 0, 0
    for number, (_, end) in enumerate(spans):
        count += 1
        follows = int(spans[number + 1][0]) if number + 1 < len(spans) else len(text)
        if int(end) > start and follows >= int(end):  # nothing of what follows lies in this piece
            made.append((text[start : int(end)], count))
            start, count = int(end), 0
    if start < len(text) or count:  # what a normalizer dropped at the end
        made.append((text[start:], count))
    return made


def word_spans(text: str) -> np.ndarray:
    """Where the words (runs of letters, marks and digits) are, in characters, int64 ``[words, 2]``."""
    from tokenizers import Regex, pre_tokenizers

    # The library's regex knows the Unicode classes; Python's \w leaves out the vowel signs of Indic scripts.
    cut = pre_tokenizers.Split(Regex(r"[^\p{L}\p{M}\p{N}]+"), "removed")
    found = [span for _, span in cut.pre_tokenize_str(text)] if text else []
    return np.asarray(found, np.int64).reshape(-1, 2)


def _touches(words: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """For each word the number of tokens whose span shares a character with it."""
    first = np.searchsorted(spans[:, 1], words[:, 0], side="right")  # the tokens that end after it begins
    behind = np.searchsorted(spans[:, 0], words[:, 1], side="left")  # less those that begin after it ends
    return np.maximum(behind - first, 0)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Each text with its ids and their spans ``[tokens, 2]``, both columns rising, no character between two spans."""
    if not tokenizer.is_fast:
        what = f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets"
        raise UserError(what, where="tokenizer", fix="use one with a tokenizer.json")
    for begin in range(0, len(texts), BATCH):
        batch = list(texts[begin : begin + BATCH])
        try:
            made: Any = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError("a text is not valid Unicode", where="text", fix="mend or drop it") from error
        for text, ids, offsets in zip(batch, made.input_ids, made.offset_mapping, strict=True):
            spans = np.asarray(offsets, np.int64).reshape(-1, 2)
            # Some tokenizers leave a token's spaces out of its span: what lies between two belongs to the later one.
            ends = np.maximum.accumulate(spans[:, 1]) if len(spans) else spans[:, 1]
            reached = np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
            starts = np.minimum(spans[:, 0], reached)
            yield text, ids, np.stack([np.maximum.accumulate(starts), ends], axis=1)


def _difference(text: str, back: str) -> Loss:
    """The surroundings of the first character that differs."""
    place = next(
        (i for i, (one, other) in enumerate(zip(text, back, strict=False)) if one != other),
        min(len(text), len(back)),
    )
    cut = slice(max(0, place - SHOWN), place + SHOWN)
    return Loss(text[cut], back[cut])


@dataclass(frozen=True)
class EmbeddingCost:
    """Rows of the embedding times the hidden size; an untied head is a second matrix of that size.

    Attributes:
        rows: one more than the largest id.
        body: the parameters of the rest of the model.
    """

    rows: int
    hidden_size: int
    body: int | None = None

    def parameters(self, *, tied: bool) -> int:
        """Parameters of the embedding, and of the head unless it is the same matrix."""
        return self.rows * self.hidden_size * (1 if tied else 2)

    def megabytes(self, *, tied: bool, bytes_per_parameter: int) -> float:
        """10^6 bytes of memory; 2 bytes a parameter in bf16, 16 in fp32 with its gradient and AdamW's two moments."""
        return self.parameters(tied=tied) * bytes_per_parameter / 1e6

    def share(self, *, tied: bool) -> float | None:
        """Of all the model's parameters; None where the rest of the model is not known."""
        own = self.parameters(tied=tied)
        return None if self.body is None else own / (own + self.body)
