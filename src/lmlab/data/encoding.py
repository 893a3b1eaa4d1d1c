"""From a `Document` to token ids and a trained/untrained flag per token.

One tokenizer call per document on the joined text, with offsets: the mask is read off character positions, so no
merge at the seam of prompt and response can shift it, and no label ever depends on ``== pad_id``. Example: text
``"Q:ab"`` with ``"ab"`` trained and tokens ``Q``, ``:a``, ``b``: ``:a`` holds a trained character, so it is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lmlab.data.fields import BadRecordError, Shortening
from lmlab.data.formats import SHORTENINGS, Format, FormatOptions
from lmlab.records import Document, Record, UserError


class Encode(Protocol):
    """``text -> (ids, character offsets)``."""

    def __call__(self, text: str, *, add_bos: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode one text.

        Args:
            add_bos: whether BOS may be put before it, with (0, 0), if the model has one and the text does not begin with it.
        """
        ...


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of one document.

    Attributes:
        ids: int64 ``[length]``.
        trained: bool ``[length]``, whether the model is trained to produce that token.
        offsets: character span of each token; an appended EOS has none.
        document: what the ids are of (its prompt may be shorter than the record's).
        truncated: whether anything was cut.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: list[tuple[int, int]]
    document: Document
    truncated: bool = False

    @property
    def trained_bytes(self) -> int:
        """UTF-8 bytes of the trained text in ``ids``; a character spread over several tokens counts once."""
        text = "".join(segment.text for segment in self.document.segments)
        total, done = 0, 0
        for (start, end), trained in zip(self.offsets, self.trained, strict=False):
            if trained and end > done:
                total += len(text[max(start, done) : end].encode("utf-8"))
                done = end
        return total


@dataclass(frozen=True)
class LengthPolicy:
    """How a document longer than ``max_length`` tokens is handled; ``max_length`` None means no limit."""

    max_length: int | None
    too_long: str = "truncate_prompt"


def encode_document(document: Document, encode: Encode, eos_token_id: int) -> EncodedDocument:
    """Encode without any length limit; EOS is appended, and trained if the last segment is.

    A text that ends with EOS already (as many chat templates write it, perhaps with a line end behind) gets no second.
    """
    text = "".join(segment.text for segment in document.segments)
    ids, offsets = encode(text, add_bos=document.bos)
    flags = _trained_flags(document, offsets)
    if document.ends and not _ended(text, ids, offsets, eos_token_id):
        ids, flags = [*ids, eos_token_id], np.append(flags, document.segments[-1].trained)
    return EncodedDocument(np.asarray(ids, dtype=np.int64), flags.astype(bool), offsets, document)


def _ended(text: str, ids: list[int], offsets: list[tuple[int, int]], eos_token_id: int) -> bool:
    """Whether nothing but white space follows the last EOS."""
    for token, (start, end) in zip(reversed(ids), reversed(offsets), strict=True):
        if token == eos_token_id or text[start:end].strip():
            return token == eos_token_id
    return False


def _trained_flags(document: Document, offsets: list[tuple[int, int]]) -> np.ndarray:
    """A token is trained if it holds at least one trained character. bool ``[tokens]``."""
    spans, position = [], 0
    for segment in document.segments:
        if segment.trained and segment.text:
            spans.append((position, position + len(segment.text)))
        position += len(segment.text)
    edges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    flags = np.zeros(len(edges), dtype=bool)
    for start, end in spans:
        flags |= (edges[:, 1] > start) & (edges[:, 0] < end) & (edges[:, 1] > edges[:, 0])
    return flags


def fit_document(
    record: Record,
    format_name: str,
    format: Format,
    options: FormatOptions,
    encode: Encode,
    *,
    eos_token_id: int,
    policy: LengthPolicy,
) -> EncodedDocument:
    """Format and encode one record within the length policy.

    Raises:
        BadRecordError: the record cannot be used (wrong fields), or lost all its trained tokens to the policy.
        UserError: too long under ``too_long=error``.
    """
    whole = encode_document(format(record, options), encode, eos_token_id)
    limit = policy.max_length
    if limit is None:
        return _with_trained(
            whole
        )  # part of a stream, where its first token is predicted from what stands before
    if len(whole.ids) <= limit:
        return _alone(whole)
    if policy.too_long == "drop":
        raise BadRecordError("too long", f"{len(whole.ids)} tokens")
    if policy.too_long == "error":
        raise UserError(
            f"example of {len(whole.ids)} tokens is longer than data.max_length={limit}",
            where=record.where,
            fix="raise data.max_length or choose data.too_long=truncate_prompt",
        )
    if policy.too_long == "truncate_prompt":

        def attempt(shorter: Record) -> EncodedDocument:
            return encode_document(format(shorter, options), encode, eos_token_id)

        for shorten in SHORTENINGS.get(format_name, ()):
            record, whole = _shrink(record, shorten(record, options.columns), attempt, whole, limit=limit)
            if len(whole.ids) <= limit:
                return _alone(replace(whole, truncated=True))
    return _alone(_cut_end(whole, limit))


def _shrink(
    record: Record,
    shortening: Shortening,
    attempt: Callable[[Record], EncodedDocument],
    whole: EncodedDocument,
    *,
    limit: int,
) -> tuple[Record, EncodedDocument]:
    """Cut as few units as possible from the beginning, or all that may be cut if that is not enough.

    The number of tokens is nearly monotone in the units kept, so a binary search finds the cut in some 10 calls.
    ``whole`` is the encoded ``record``, and what comes back if nothing can be cut.
    """
    if not shortening.size:
        return record, whole

    def keep(units: int) -> tuple[Record, EncodedDocument] | None:
        shorter = shortening.keep(units)
        try:
            return shorter, attempt(shorter)
        except BadRecordError:
            return None

    low, best = 0, keep(0)
    if best is None:
        low, best = shortening.least, keep(shortening.least)
    if best is None:
        return record, whole
    if len(best[1].ids) > limit:
        return best
    high = shortening.size
    while high - low > 1:
        middle = (low + high) // 2
        candidate = keep(middle)
        if candidate is None or len(candidate[1].ids) > limit:
            high = middle
        else:
            low, best = middle, candidate
    return best


def _cut_end(encoded: EncodedDocument, limit: int) -> EncodedDocument:
    """The first ``limit`` tokens; what is cut is the response's end, and no EOS is put behind the stump."""
    return replace(encoded, ids=encoded.ids[:limit], trained=encoded.trained[:limit], truncated=True)


def _with_trained(encoded: EncodedDocument) -> EncodedDocument:
    if not encoded.trained.any():
        raise BadRecordError("no trained token", f"{len(encoded.ids)} tokens, none of them response")
    return encoded


def _alone(encoded: EncodedDocument) -> EncodedDocument:
    # Nothing stands before a document of its own, so its first token is never predicted and counts as untrained.
    if encoded.trained[:1].any():
        trained = encoded.trained.copy()
        trained[0] = False
        encoded = replace(encoded, trained=trained)
    return _with_trained(encoded)
