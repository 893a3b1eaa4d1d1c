"""Encode a text of any size through overlapping windows, for any tokenizer.

Windows of one text overlap; two of them are joined at a character where both have a token boundary and where some
tokens on either side are the same in both. No agreement: more overlap, in the end the whole of what is held.

Why that gives the ids of one call: a tokenizer decides locally (a word, a merge of neighbours, a best path over
pieces), so two encodings that agree around a boundary were decided alike there, and what follows depends on what stands
beside it. No proof for every tokenizer that could be written: tests hold it for the kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

WINDOW = 2**15
"""Characters of text encoded at a time."""
OVERLAP = 2**9
AGREEING = 8
"""Tokens on either side of a seam that both windows must have alike."""

EncodeWithSpans = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Ids ``[n]`` and character spans ``[n, 2]`` of a text."""


@dataclass(frozen=True)
class _Window:
    """Encoded text from character ``start`` to ``end`` of the whole; ``spans`` count from the whole's beginning."""

    start: int
    end: int
    ids: np.ndarray
    spans: np.ndarray

    def boundary(self, place: int) -> int | None:
        """The token that begins at character ``place``, if none lies across it."""
        token = int(np.searchsorted(self.spans[:, 0], place, side="left"))
        if token == len(self.ids) or self.spans[token, 0] != place:
            return None
        return token if token == 0 or self.spans[token - 1, 1] <= place else None


def encode_windows(
    encode: EncodeWithSpans, pieces: Iterable[str], *, window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[np.ndarray]:
    """Ids of the joined ``pieces`` in parts, none of them empty.

    Args:
        encode: the library; a mark that it puts before a text is kept at the very beginning only.
        window: characters of new text per call.
        overlap: characters that two windows have in common, at first.
    """
    held, last, given = (
        "",
        None,
        0,
    )  # text from last.start on; the newest window; how many of its tokens are out
    for piece in _sized(pieces, window):
        held += piece
        if last is None:
            last = _encoded(encode, held, 0)
            continue
        now, settled, known = _next(encode, held, last, given, overlap)
        if settled > given:
            yield last.ids[given:settled]
        held = held[now.start - last.start :]
        last, given = now, known
    if last is not None and len(last.ids) > given:
        yield last.ids[given:]


def _next(
    encode: EncodeWithSpans, held: str, last: _Window, given: int, overlap: int
) -> tuple[_Window, int, int]:
    """The window that goes on to the end of ``held``; the tokens of ``last`` and of the new one before their seam."""
    end = last.start + len(held)
    while 2 * overlap < last.end - last.start:
        start = last.end - 2 * overlap
        now = _encoded(encode, held[start - last.start :], start)
        if seam := _seam(last, now, given, range(start + overlap // 2, last.end - overlap // 2)):
            return now, *seam
        overlap *= 4
    # The same beginning as the last one had, so they differ at its end at the most.
    now = _encoded(encode, held, last.start)
    assert now.end == end
    seam = _seam(last, now, given, range(last.start, last.end - 1), latest=True)
    return now, *(seam or (given, given))


def _seam(
    last: _Window, now: _Window, given: int, places: range, *, latest: bool = False
) -> tuple[int, int] | None:
    """Token numbers, in both, of a character in ``places`` around which they agree: the middlemost, or the latest."""
    low, high = np.searchsorted(last.spans[:, 0], [places.start, places.stop])
    tokens = range(max(int(low), given), int(high))
    goal = tokens.stop if latest else (tokens.start + tokens.stop) // 2
    for old in sorted(tokens, key=lambda token: abs(token - goal)):
        place = int(last.spans[old, 0])
        new = now.boundary(place)
        if new is None or last.boundary(place) != old:
            continue
        left = min(AGREEING, old, new)
        if left < AGREEING and last.start != now.start:
            continue
        a, b = slice(old - left, old + AGREEING), slice(new - left, new + AGREEING)
        alike = np.array_equal(last.ids[a], now.ids[b]) and np.array_equal(last.spans[a], now.spans[b])
        if alike and old + AGREEING <= len(last.ids):
            return old, new
    return None


def _encoded(encode: EncodeWithSpans, text: str, start: int) -> _Window:
    ids, spans = encode(text)
    return _Window(start, start + len(text), ids, spans + start)


def _sized(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of ``size`` characters, the last one shorter."""
    held = ""
    for piece in pieces:
        held += piece
        whole = len(held) - len(held) % size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if held:
        yield held
