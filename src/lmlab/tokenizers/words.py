"""A cache of words in front of a tokenizer library: dict look-ups instead of merges.

A text is split at single spaces, the fastest cut Python has, and each word is looked up by itself; its ids are those of
the word with its space before it. Words between which no cut is safe (two spaces in a row, a tab) are joined again and
looked up as one. Line ends are cuts too: before the split a mark (NUL) and a space are put at each, so that ``word``,
newline, ``word`` becomes two words and does not fill the cache with pairs. What is unknown goes to the library, many
words in one call.

Example, cuts before line ends: ``a b\\nc  d`` is split into ``a``, ``b<NUL>``, ``\\nc``, an empty word, ``d``; the cut
before the empty word is not safe, so it is looked up with ``\\nc``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmlab.tokenizers.cuts import Cuts, blank

MAX_WORDS = 2**18
"""Entries of each dict, some 40 MB; beyond it is emptied: the words of running text are back at once."""
LONGEST_KEPT = 32

Library = Callable[[Sequence[str]], list[bytes]]
"""Ids (uint32, as bytes) of each text."""


@dataclass(frozen=True)
class Stretch:
    """A piece of a text that begins and ends at safe cuts.

    Attributes:
        head: it is the text's beginning.
        whole: it must not be cut.
    """

    text: str
    head: bool
    whole: bool = False


@dataclass
class _Slots:
    """What the texts' ids are put together from; unknown parts are filled in later.

    Attributes:
        pending: slot, part, whether it is a text's head, and the word to remember it under.
    """

    values: list[bytes | None] = field(default_factory=list)
    pending: list[tuple[int, str, bool, str | None]] = field(default_factory=list)

    def ask(self, part: str, *, head: bool) -> None:
        self.pending.append((len(self.values), part, head, None))
        self.values.append(None)


class WordCache:
    """Ids of texts by way of their words.

    Args:
        library: encodes what is not known.
        cuts: where a text may be cut for it.
    """

    def __init__(self, library: Library, cuts: Cuts) -> None:
        self.library, self.cuts = library, cuts
        # What stands for a line end in a split text, see `_text`.
        self._line_end = {"before": "\0 \n", "after": "\n \0", "never": "\n"}[cuts.lines]
        self._words: dict[str, bytes] = {}
        self._heads: dict[str, bytes] = {}
        self._context = library([cuts.context])[0] if cuts.context else b""

    def encode(self, texts: Sequence[Sequence[Stretch]]) -> list[bytes]:
        """Ids of each text, given as its stretches in order."""
        slots, ends = _Slots(), [0]
        for stretches in texts:
            for stretch in stretches:
                if stretch.whole or "\0" in stretch.text:
                    slots.ask(stretch.text, head=stretch.head)
                elif stretch.text:
                    self._split(stretch, slots)
            ends.append(len(slots.values))
        self._fill(slots)
        values: list[bytes] = slots.values  # pyright: ignore[reportAssignmentType]  # all are filled
        return [b"".join(values[start:end]) for start, end in itertools.pairwise(ends)]

    def _split(self, stretch: Stretch, slots: _Slots) -> None:
        words = stretch.text.replace("\n", self._line_end).split(" ")
        count = 1
        if stretch.head:
            while count < len(words) and (
                not any(words[:count]) or self._joined(words[count - 1], words[count])
            ):
                count += 1
            slots.ask(self._text(words[:count], begins=True), head=True)
        elif stretch.text[0] not in " \n":  # cut after a line end, which has left its mark there
            words[0], count = "\0" + words[0], 0
        del words[:count]
        values: list[bytes | None] = list(map(self._words.get, words))
        base = len(slots.values)
        slots.values += values
        place = 0
        while None in values:
            try:
                unknown = values.index(None, place)
            except ValueError:  # the last ones were joined to others
                break
            place = self._join(words, unknown, base, slots)

    def _join(self, words: list[str], place: int, base: int, slots: _Slots) -> int:
        """Ask for the unknown word at ``place``, with the neighbours that cannot be cut from it; the end of them."""
        start, end = place, place + 1
        while start and self._joined(words[start - 1], words[start]):
            start -= 1
        while end < len(words) and self._joined(words[end - 1], words[end]):
            end += 1
        if end - start == 1:
            word = words[place]
            keep = len(word) <= LONGEST_KEPT and self._ends(word)
        else:
            word = " ".join(words[start:end])
            keep = len(word) <= LONGEST_KEPT
            slots.values[base + start : base + end] = [b""] * (end - start)
            if (known := self._words.get(word)) is not None:
                slots.values[base + start] = known
                return end
        slots.pending.append((base + start, self._text(words[start:end]), False, word if keep else None))
        return end

    def _joined(self, left: str, right: str) -> bool:
        """Whether the cut between two words of the split is not safe."""
        if right[:1] == "\n" and self.cuts.lines == "before":
            return not left[-2:-1] or blank(left[-2])
        if right[:1] == "\0" and self.cuts.lines == "after":
            return not right[1:] or right[1] == "/" or blank(right[1])
        if not right or right[0] == "\0" or blank(right[0]):
            return True
        return not self.cuts.any_left and (not left or blank(left[-1]))

    def _ends(self, word: str) -> bool:
        """Whether every word may follow; one that does not end must be met as unknown, for its neighbour to join it."""
        if word[-1:] == "\0":
            return bool(word[:-1]) and not blank(word[-2])
        return self.cuts.any_left or not blank(word[-1])

    def _text(self, words: list[str], *, begins: bool = False) -> str:
        """What the words stand for, with the space that belongs to the first unless the text ``begins`` there."""
        text = " ".join(words).replace(self._line_end, "\n").removesuffix("\0")
        if text[:1] == "\0":  # only after a line end
            return text[1:]
        return text if begins or (words[0][:1] == "\n" and self.cuts.lines == "before") else " " + text

    def _fill(self, slots: _Slots) -> None:
        heads = list(dict.fromkeys(part for _, part, head, _ in slots.pending if head))
        parts = list(dict.fromkeys(part for _, part, head, _ in slots.pending if not head))
        new_heads = [head for head in heads if head not in self._heads]
        context, before = self.cuts.context, len(self._context)
        made = self.library([*new_heads, *(context + part for part in parts)]) if slots.pending else []
        fresh_heads = dict(zip(new_heads, made, strict=False))
        fresh_parts: dict[str, bytes] = {}
        for part, ids in zip(parts, made[len(new_heads) :], strict=True):
            if not ids.startswith(self._context):
                raise AssertionError(f"a cut before {part!r} is not safe")
            fresh_parts[part] = ids[before:]
        for slot, part, head, word in slots.pending:
            if head:
                slots.values[slot] = fresh_heads[part] if part in fresh_heads else self._heads[part]
            else:
                slots.values[slot] = fresh_parts[part]
            if word is not None:
                self._words[word] = fresh_parts[part]
        self._heads.update({part: ids for part, ids in fresh_heads.items() if len(part) <= LONGEST_KEPT})
        for cache in (self._words, self._heads):
            if len(cache) > MAX_WORDS:
                cache.clear()
