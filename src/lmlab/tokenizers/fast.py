"""Exact encoding of large plain texts: a cache of words in front of the library, or the library in windows.

Words (`words`): each word is looked up in a dict of ids, and only what it does not know goes to the library. That the
words' ids are the text's is what `cuts` knows about the tokenizer; around special tokens written in the text whole
stretches go to the library. One core reads 10 MB/s of English whose words are known and 2 of new ones, the library 1.
Windows (`windows`): for a tokenizer without a rule; no faster than the library, but of flat memory.

Trade-off: a text without a single safe cut (no space, no line end) is held in memory as a whole.
"""

from __future__ import annotations

import array
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmlab.records import UserError
from lmlab.tokenizers.cuts import AT_LINE_ENDS, Cuts, blank, safe_cuts
from lmlab.tokenizers.windows import WINDOW, encode_windows
from lmlab.tokenizers.words import Stretch, WordCache

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PIECE = 2**17
"""Characters looked up in one go; larger ones leave the processor's cache."""
NASTY = (
    "I'll we've DON'T it'S 'tis  two   three\t\ttab \t mixed \n\n\n  indented\r\nCRLF\r\n\r\n end. \n.\n/a;\n\n x\n1\n\n2"
    "  1 22 333 4444 55555 x1 1x  9\u00a0\u00a0nbsp \u2003em\u3000\u3000ideographic \u0085nel\u2028ls\x1cfs\x1f \x0b\x0c"
    " e\u0301 \u0301alone n\u0303o \u1e9b\u0323 \u212b \u037e naïve ÅÉ ß ﬁ ①②½ Ⅷ ٣٤ १२ 日本語。\n日本 한국어 ไทย"
    " 😀👩\u200d👧🇩🇪 \u200b\ufeff\ud7ff\ue000\U0010ffff ...!!! -- __init__() {{}} </s> <s> <|x|> a_b ▁ ▁▁x  "
)
"""What tokenizers are known to disagree about: a rule is only used where it gives the library's ids of this."""


class FastEncoder:
    """Encodes plain text as ``tokenizer(text, add_special_tokens=False)`` does, faster and in bounded memory.

    Picklable without transformers: a process that gets one imports only the `tokenizers` library.

    Args:
        tokenizer: a fast tokenizer.

    Attributes:
        mode: ``words`` or ``windows``.
        vocab_size: one more than the largest id.
        eos_token_id: ends a document; None if the tokenizer has none.
        bos_token_id: begins a document; None unless the tokenizer's own default encoding begins with it.

    Raises:
        UserError: a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from lmlab.tokenizers.load import adds_bos, rows_needed

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            what = f"{type(tokenizer).__name__} is a slow tokenizer"
            raise UserError(what, where="tokenizer", fix="use one with a tokenizer.json")
        self.vocab_size = rows_needed(tokenizer)
        self._eos, self._bos = str(tokenizer.eos_token), str(tokenizer.bos_token)
        self.eos_token_id: int | None = _id(tokenizer.eos_token_id)
        self.bos_token_id: int | None = _id(tokenizer.bos_token_id) if adds_bos(tokenizer) else None
        self._backend: Tokenizer = backend
        self._specials_as_text = bool(getattr(tokenizer, "split_special_tokens", False))
        content = json.loads(backend.to_str())
        self._cuts: Cuts | None = safe_cuts(content)
        self._added = [str(token["content"]) for token in content["added_tokens"]]
        self._set_up()
        if self._cuts is not None and not self._agrees():
            self._cuts = self._cache = None
        self.mode = "words" if self._cuts else "windows"

    def _set_up(self) -> None:
        """What does not travel to another process."""
        longest_first = sorted(self._added, key=len, reverse=True)
        self._longest = len(longest_first[0]) if longest_first else 0
        # Overlapping ones too: which of them the library takes is its business.
        pattern = "(?=" + "|".join(map(re.escape, longest_first)) + ")"
        self._find_added = re.compile(pattern) if self._added else None
        self._beginnings = {token[:2] for token in self._added}
        self._cache = WordCache(self._library, self._cuts) if self._cuts else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_find_added")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def _agrees(self) -> bool:
        texts = [NASTY, NASTY[::-1], "", " ", "a", *self._added[:50], *NASTY.split()]
        texts += [f"a {token}  b {token}{token}\n{token} c" for token in self._added[:50]]
        try:
            return self._encoded(texts) == self._library(texts)
        except AssertionError:  # a word beside the context is not what it is elsewhere
            return False

    # --- plain text ---------------------------------------------------------------------------------------------

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, uint32 ``[tokens]``."""
        pieces = list(self.encode_stream(text[i : i + PIECE] for i in range(0, len(text), PIECE)))
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text; several short ones share the calls of the library."""
        return [np.frombuffer(ids, np.uint32) for ids in self._batch(texts)]

    def _batch(self, texts: Sequence[str]) -> list[bytes]:
        if self._cuts is None:
            return self._library(texts)
        short = iter(self._encoded([text for text in texts if len(text) <= PIECE]))
        return [next(short) if len(text) <= PIECE else self.encode(text).tobytes() for text in texts]

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of the joined ``pieces`` in parts, none of them empty; holds back what is not decided yet.

        Raises:
            UserError: not valid Unicode.
        """
        if self._cuts is None:
            yield from encode_windows(self._offsets, pieces, window=max(WINDOW, 4 * self._longest))
            return
        held, searched, head = "", 0, True
        for piece in pieces:
            held += piece
            end = len(held) - self._longest - 1  # an added token that begins later may not be whole yet
            cut = self._last_cut(held, searched, end) if end > searched else 0
            if not cut:
                searched = max(searched, end - 1)
                continue
            yield from self._nonempty(held[:cut], head=head)
            held, searched, head = held[cut:], 0, False
        yield from self._nonempty(held, head=head)

    def _nonempty(self, text: str, *, head: bool) -> Iterator[np.ndarray]:
        (ids,) = self._encoded([text], head=head)
        if ids:
            yield np.frombuffer(ids, np.uint32)

    # --- documents ----------------------------------------------------------------------------------------------

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text with BOS (if the tokenizer adds it) before and EOS behind, unless it brings its own."""
        made = []
        for text, ids in zip(texts, self._batch(texts), strict=True):
            if (bos := self.bos_token_id) is not None and not self._has(
                bos, ids, text.lstrip().startswith(self._bos)
            ):
                ids = _as_bytes(bos) + ids
            if (eos := self.eos_token_id) is not None and not self._has(
                eos, ids, text.rstrip().endswith(self._eos)
            ):
                ids = ids + _as_bytes(eos)
            made.append(np.frombuffer(ids, np.uint32))
        return made

    def document_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """One text of any size in parts, the same as `documents`; none of them empty."""
        head, tail, begun = "", "", False
        bos, eos = self.bos_token_id, self.eos_token_id
        recent: list[np.ndarray] = []

        def watched() -> Iterator[str]:
            nonlocal head, tail
            for piece in pieces:
                head = head or piece[:PIECE].lstrip()
                tail = (tail + piece)[-PIECE:]
                yield piece

        for ids in self.encode_stream(watched()):
            if (
                not begun
                and bos is not None
                and not self._has(bos, ids.tobytes(), head.startswith(self._bos))
            ):
                yield np.asarray([bos], np.uint32)
            yield ids
            begun, recent = True, [*recent[-1:], ids]
        if not begun and bos is not None:
            yield np.asarray([bos], np.uint32)
        last = b"".join(ids.tobytes() for ids in recent)
        if eos is not None and not self._has(eos, last, tail.rstrip().endswith(self._eos)):
            yield np.asarray([eos], np.uint32)

    @staticmethod
    def _has(token_id: int, ids: bytes, in_text: bool) -> bool:
        """Whether the text stands with a token's name at its edge, and the library took it for that token."""
        return in_text and bool((np.frombuffer(ids, np.uint32) == token_id).any())

    # --- words --------------------------------------------------------------------------------------------------

    def _last_cut(self, text: str, start: int, end: int) -> int:
        """The last safe cut after ``start`` and before ``end`` that no stretch around an added token covers, or 0."""
        assert self._cuts is not None
        cut = text.rfind(" ", max(1, start), end)
        while cut > 0 and (blank(text[cut - 1]) or blank(text[cut + 1])):
            cut = text.rfind(" ", max(1, start), cut)
        if cut < 0:
            places = AT_LINE_ENDS[self._cuts.lines].finditer(text, start, end)
            cut = max((match.start() for match in places), default=0)
        for left, right in reversed(self._stretches(text)):
            if left < cut < right:
                cut = left
        return cut

    def _stretches(self, text: str) -> list[tuple[int, int]]:
        """Around each added token in ``text``, and the words beside it: what the library must see in one piece."""
        found: list[tuple[int, int]] = []
        if self._find_added is None or not any(beginning in text for beginning in self._beginnings):
            return found
        for match in self._find_added.finditer(text):
            start, end = match.start(), min(len(text), match.start() + self._longest)
            if found and start < found[-1][1] - 1:
                left = found.pop()[0]
            else:
                left = _visible_space(text, start - 2, -1) or 0
            found.append((left, _visible_space(text, end + 1, 1) or len(text)))
        merged: list[tuple[int, int]] = []
        for left, right in found:
            if merged and left <= merged[-1][1]:
                left = merged.pop()[0]
            merged.append((left, right))
        return merged

    def _encoded(self, texts: Sequence[str], *, head: bool = True) -> list[bytes]:
        """Ids of each text; ``head``: it is the beginning of a document, else it begins at a safe cut."""
        assert self._cache is not None
        jobs: list[list[Stretch]] = []
        for text in texts:
            job, done = [], 0
            for left, right in self._stretches(text):
                job.append(Stretch(text[done:left], head and not done))
                job.append(Stretch(text[left:right], head and not left, whole=True))
                done = right
            job.append(Stretch(text[done:], head and not done))
            jobs.append(job)
        return self._cache.encode(jobs)

    def _library(self, texts: Sequence[str]) -> list[bytes]:
        """The library's own ids, uint32 as bytes."""
        backend = self._backend
        # The state of the last call of transformers, which sets it anew itself.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._specials_as_text
        try:
            return [
                array.array("I", made.ids).tobytes()
                for made in backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        except (TypeError, UnicodeEncodeError) as error:
            shown = next((text for text in texts if not _valid(text)), "")[:40]
            raise UserError(f"not valid Unicode: {shown!r}", where="text", fix="mend or drop it") from error

    def _offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``[n]`` and character spans ``[n, 2]`` of a window."""
        self._library([])
        try:
            made = self._backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError("not valid Unicode", where="text", fix="mend or drop it") from error
        return np.asarray(made.ids, np.uint32), np.asarray(made.offsets, np.int64).reshape(-1, 2)


def _as_bytes(token_id: int) -> bytes:
    return array.array("I", [token_id]).tobytes()


def _id(token_id: Any) -> int | None:
    return None if token_id is None else int(token_id)


def _valid(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _visible_space(text: str, place: int, step: int) -> int | None:
    """The first place from ``place`` on, going by ``step``, of a space between two visible characters."""
    find = text.find if step > 0 else text.rfind
    while 0 < place < len(text) - 1:
        place = find(" ", place) if step > 0 else find(" ", 1, place + 1)
        if place < 0 or place + 1 >= len(text):
            return None
        if not (blank(text[place - 1]) or blank(text[place + 1])):
            return place
        place += step
    return None
