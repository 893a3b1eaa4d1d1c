"""Which characters of a rendered conversation are the assistant's: the same for training and for generation.

A turn is found by substitution. The conversation is rendered once as it is and once with only that turn's content
replaced by a word that occurs nowhere else; the text before the word and the text after it must stand in the whole
rendering too, and what lies between is that turn as the template wrote it (trimmed or changed as it likes). No
generation marks are needed, and templates need not render prefixes of a conversation to prefixes of its text.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import Any

from lmlab.data.chat_templates import RenderChat
from lmlab.data.fields import BadRecordError
from lmlab.records import Document, Segment

CLOSED_MARKS = re.compile(r"(\s*(<[^<>\s]+>|\[[^\[\]\s]+\]))*")
"""Marks like ``</s>``, ``<|im_end|>`` or ``[/INST]``, complete ones only."""

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Span:
    """Characters of one assistant turn: what the model must write, from ``start`` on, ends with the template's mark.

    Attributes:
        start: the end of the generation prompt if the template has one, else ``content_start``.
        content_start: where the content begins.
        content_end: where the content ends.
        mark: what ends the turn, without white space at its end; empty if the template has only white space there.
    """

    start: int
    content_start: int
    content_end: int
    mark: str

    @property
    def end(self) -> int:
        return self.content_end + len(self.mark)


def chat_document(
    turns: Turns, render: RenderChat, *, special_tokens: Collection[str] = (), train_all: bool = False
) -> Document:
    """A conversation that ends with an assistant turn, as text with every assistant turn and its end mark trained.

    What the template writes behind the last mark is left out. EOS follows unless that mark is one special token, at
    which generation stops as well. BOS is the template's to write.

    Raises:
        BadRecordError: the template refuses the conversation, leaves a turn out, or lets a turn change the text
            around it.
    """
    whole = _rendered(render, turns)
    word = _unused_word(whole, turns)
    segments: list[Segment] = []
    span = Span(0, 0, 0, "")
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        position, span = span.end, _span(turns, index, render, whole=whole, word=word)
        if span.start < position:
            raise _unstable(index, "it begins before the turn before it ends")
        if not whole[span.content_start : span.content_end].strip():
            raise BadRecordError("empty response", f"the chat template writes nothing of turn {index + 1}")
        parts = ((position, span.start, train_all), (span.start, span.end, True))
        segments += [Segment(whole[a:b], trained) for a, b, trained in parts if a < b]
    return Document(
        tuple(segments),
        ends=span.mark.strip() not in special_tokens,
        bos=False,
        prompt=whole[: span.start],
        response=turns[-1]["content"],
    )


def chat_prompt(turns: Turns, render: RenderChat) -> str:
    """The text that generation starts from to answer ``turns``: exactly what training put before that answer.

    Raises:
        BadRecordError: the template refuses these turns, or an answer to them.
    """
    word = _unused_word("", turns)
    answered = [*turns, {"role": "assistant", "content": word}]
    before, _ = _around(_rendered(render, answered), word, len(turns))
    return _prompt(turns, render, before)


def end_mark(render: RenderChat) -> str:
    """What the template writes behind an answer, without white space around it; empty if nothing, or if it cannot be told."""
    try:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        return _span(
            turns, 1, render, whole=_rendered(render, turns), word=_unused_word("", turns)
        ).mark.strip()
    except BadRecordError:
        return ""


def _span(turns: Turns, index: int, render: RenderChat, *, whole: str, word: str) -> Span:
    swapped = [*turns[:index], {**turns[index], "content": word}, *turns[index + 1 :]]
    before, after = _around(_rendered(render, swapped), word, index)
    prompt = _prompt(turns[:index], render, before)
    content_end = len(whole) - len(after)
    # A content with thoughts in it may be taken apart by the template, so `before` need not be there if `prompt` is.
    content_start = len(before) if whole.startswith(before) else len(prompt)
    if not (whole.startswith(prompt) and whole.endswith(after) and content_start <= content_end):
        raise _unstable(index, "the text around it changes with its content")
    _, tail = _around(_rendered(render, swapped[: index + 1]), word, index)
    return Span(len(prompt), content_start, content_end, _agreed(tail, whole[content_end:]).rstrip())


def _prompt(turns: Turns, render: RenderChat, before: str) -> str:
    """The part of ``before`` (all that stands before the next turn's content) that the model is given.

    The template's own generation prompt where it is the beginning of that: what it leaves (a space, empty thoughts) is
    what the model writes itself when it is asked.
    """
    # A prompt that ends with the space before the answer would be cut into other tokens than both together.
    heading = before[:-1] if re.search(r"\S $", before) else before
    try:
        opening = render(turns, True)
    except Exception:  # of no turns at all, say: an assistant that speaks first is never asked
        return heading
    if not before.startswith(opening):
        return heading
    if before[len(opening) :].strip() and opening == _rendered(render, turns):
        return heading  # there is no generation prompt, and the turn's heading is no part of the answer
    return opening


def _agreed(tail: str, rest: str) -> str:
    """How the turn ends: ``tail`` is what follows its content at the end of a conversation, ``rest`` inside this one.

    Where only one begins like the other, what is common may hold the first letters of the next turn's heading or of a
    conversation's end: then complete marks alone count.
    """
    length = next(
        (i for i, (a, b) in enumerate(zip(tail, rest, strict=False)) if a != b), min(len(tail), len(rest))
    )
    common = tail[:length]
    if common.rstrip() == tail.rstrip():
        return common
    found = CLOSED_MARKS.match(common)
    return found.group() if found else ""


def _around(text: str, word: str, index: int) -> tuple[str, str]:
    before, found, after = text.partition(word)
    if not found or word in after:
        raise _unstable(index, "it is left out" if not found else "it is written twice")
    return before, after


def _rendered(render: RenderChat, turns: Turns) -> str:
    try:
        return render(turns, False)
    except Exception as error:  # a template refuses roles out of turn by raising
        raise BadRecordError("chat template refuses it", str(error)) from error


def _unstable(index: int, why: str) -> BadRecordError:
    return BadRecordError("chat template not stable", f"turn {index + 1}: {why}")


def _unused_word(text: str, turns: Turns) -> str:
    """A word without white space or marks that neither the text nor the turns hold."""
    there = text + "".join(map(str, turns))
    return next(word for n in count() if (word := f"theanswerofthemodel{n or ''}") not in there)
