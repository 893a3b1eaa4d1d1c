"""The turns of a conversation out of a record: OpenAI's shape (role, content) or ShareGPT's (from, value).

A turn in lmlab is ``{"role": str, "content": str}`` with whatever a template may want beside (name, tool_calls, ...).
Roles other than user, assistant and system pass through: what becomes of them is the template's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmlab.data.fields import BadRecordError, Shortening, least_of, unicode_text
from lmlab.records import Record

Turn = dict[str, Any]
ROLES = {
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bing", "bard", "model")},
    "system": "system",
}
"""How data sets call the three roles that all templates know."""
SHAREGPT_COLUMN = "conversations"
PASSED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""Other fields of a turn that chat templates read; the rest (ids, weights, ratings) is nothing they know."""


def read_turns(record: Record, columns: Mapping[str, str]) -> list[Turn]:
    """The conversation up to its last assistant turn; nobody answers what comes after, so it is left out.

    Raises:
        BadRecordError: no list of turns, a turn without role or text, an empty assistant turn, or none at all.
    """
    turns = _all_turns(record, columns)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise BadRecordError("no assistant turn", f"roles: {', '.join(turn['role'] for turn in turns)[:80]}")
    return turns[: last + 1]


def _all_turns(record: Record, columns: Mapping[str, str]) -> list[Turn]:
    column = columns.get("messages", "messages")
    raw = record.fields.get(column)
    if raw is None:
        raw = record.fields.get(SHAREGPT_COLUMN)
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise BadRecordError("no messages", f"field '{column}' is missing, empty or not a list")
    return [_turn(turn, f"message {number}") for number, turn in enumerate(raw, start=1)]


def _turn(raw: Any, place: str) -> Turn:
    if not isinstance(raw, Mapping):
        raise BadRecordError("message without role or content", f"{place} is {type(raw).__name__}")
    role = raw.get("role") or raw.get("from")
    if not isinstance(role, str) or not role.strip() or not ("content" in raw or "value" in raw):
        raise BadRecordError("message without role or content", place)
    role = ROLES.get(role.strip().lower(), role)
    content = _text(raw.get("value") if raw.get("content") is None else raw["content"], place)
    if role == "assistant" and not content.strip():
        raise BadRecordError("empty response", place)
    rest = {key: raw[key] for key in PASSED_ON if raw.get(key) is not None}
    return {"role": role, "content": unicode_text(content, place), **rest}


def _text(content: Any, place: str) -> str:
    """Null is no text; a list of parts, as OpenAI writes it, is their texts joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise BadRecordError("content is not text", f"{place}: {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRecordError("content is not text", f"{place}: a part of type {kind}")
        texts.append(part["text"])
    return "".join(texts)


def drop_exchanges(record: Record, columns: Mapping[str, str]) -> Shortening:
    """Leave out the oldest exchanges (a question and all that follows it); the last, and system turns before the first, stay."""
    turns = read_turns(record, columns)
    head = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    starts = [
        i
        for i in range(head, len(turns))
        if turns[i]["role"] == "user" and (i == head or turns[i - 1]["role"] != "user")
    ]
    if not starts or starts[0] != head:  # what an assistant says unasked is an exchange too
        starts.insert(0, head)

    def keep(exchanges: int) -> Record:
        return _with(record, columns, turns[:head] + turns[starts[-max(exchanges, 1)] :])

    return Shortening(len(starts), 1, keep)


def cut_last_question(record: Record, columns: Mapping[str, str]) -> Shortening:
    """Cut characters from the beginning of the last user turn."""
    turns = read_turns(record, columns)
    at = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if at is None:
        return Shortening(0, 0, lambda n: record)
    text = turns[at]["content"]
    least = least_of(text)

    def keep(characters: int) -> Record:
        shorter = {**turns[at], "content": text[len(text) - max(characters, least) :]}
        return _with(record, columns, [*turns[:at], shorter, *turns[at + 1 :]])

    return Shortening(len(text), least, keep)


def _with(record: Record, columns: Mapping[str, str], turns: list[Turn]) -> Record:
    return replace(record, fields={**record.fields, columns.get("messages", "messages"): turns})
