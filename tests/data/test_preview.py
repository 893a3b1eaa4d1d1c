"""The mask preview says what the tokens say: seams, cut ends, EOS, bytes of one character, and long texts."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lmlab.data.encoding import EncodedDocument, LengthPolicy, encode_document, fit_document
from lmlab.data.formats import FormatOptions, formats, template_source
from lmlab.data.prepare import TextEncoder
from lmlab.data.preview import CLOSE, EOS, MAX_SPAN, OPEN, mask_preview, previewed
from lmlab.records import Document, Record, Segment

from .conftest import random_text


def encoded(encoder: TextEncoder, *segments: tuple[str, bool], ends: bool = True) -> EncodedDocument:
    document = Document(tuple(Segment(text, trained) for text, trained in segments), ends=ends)
    return encode_document(document, encoder.encode, encoder.eos_token_id)


def by_flags(tokenizer: Any, one: EncodedDocument) -> list[tuple[str, bool]]:
    """The decoded runs of trained and untrained tokens: what the spans must say, found without offsets."""
    runs = groupby(zip(one.ids.tolist(), one.trained.tolist(), strict=True), key=lambda pair: pair[1])
    texts = [(tokenizer.decode([token for token, _ in run]), trained) for trained, run in runs]
    return [(text, trained) for text, trained in texts if text]


def test_against_decoding_the_flagged_ids(bpe: Any, encoder: TextEncoder) -> None:
    draw, compared = random.Random(3), 0
    for _ in range(300):
        segments = [(random_text(draw, 12), draw.random() < 0.5) for _ in range(draw.randint(1, 5))]
        one = encoded(encoder, *segments, ends=False)
        if "�" in "".join(text for text, _ in by_flags(bpe, one)):
            continue  # a seam inside a character's bytes: the next test
        assert [tuple(span) for span in previewed(one, "x")["spans"]] == by_flags(bpe, one)
        compared += 1
    assert compared > 250


def test_a_character_of_several_tokens_is_shown_once_and_trained_if_one_of_them_is() -> None:
    document = Document((Segment("a😀b", True),))
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    for flags, spans in (
        ([0, 0, 0, 1, 0], [["a", False], ["😀", True], ["b", False]]),
        ([0, 1, 0, 0, 0], [["a", False], ["😀", True], ["b", False]]),
        ([1, 0, 0, 0, 1], [["a", True], ["😀", False], ["b", True]]),
    ):
        one = EncodedDocument(np.arange(5), np.asarray(flags, bool), offsets, document)
        assert previewed(one, "x")["spans"] == spans


def test_text_that_no_token_holds_is_trained_only_between_trained_tokens() -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]

    def encode(text: str, **_: Any) -> tuple[list[int], list[tuple[int, int]]]:
        made = words.encode(text)
        return made.ids, made.offsets

    document = Document((Segment("ask me:  ", False), Segment("one two", True)), ends=False)
    spans = previewed(encode_document(document, encode, 1), "x")["spans"]
    assert spans == [["ask me:  ", False], ["one two", True]]


def test_eos_is_a_span_of_its_own_and_named(encoder: TextEncoder) -> None:
    shown = previewed(encoded(encoder, ("Q:\n", False), ("A", True)), "a.jsonl:3")
    assert shown["spans"] == [["Q:\n", False], ["A", True], [EOS, True]]
    assert (shown["eos"], shown["where"], shown["truncated"]) == (True, "a.jsonl:3", False)
    assert shown["supervised_tokens"] == 2
    written = previewed(encoded(encoder, ("Q:\n", False), ("says <EOS>", True), ends=False), "x")
    assert written["eos"] is False
    assert written["spans"][-1] == ["says <EOS>", True]
    own = previewed(encoded(encoder, ("Q:\n", False), ("A<|endoftext|>", True)), "x")
    assert own["spans"] == [["Q:\n", False], ["A<|endoftext|>", True]]
    assert own["eos"] is False


@pytest.mark.parametrize("limit", [40, 60, 100])
def test_a_cut_response_ends_where_its_last_token_ends(bpe: Any, encoder: TextEncoder, limit: int) -> None:
    record = Record({"instruction": "Go on.", "input": "", "output": "the sum of 12 " * 80}, "x")
    options = FormatOptions(template_source("brief"), {}, None)
    one = fit_document(record, "triples", formats.get("triples"), options, encoder.encode,
                       eos_token_id=encoder.eos_token_id, policy=LengthPolicy(limit))  # fmt: skip
    shown = previewed(one, "x")
    assert shown["truncated"]
    assert not shown["eos"]
    assert shown["tokens"] == limit
    assert "".join(text for text, _ in shown["spans"]) == bpe.decode(one.ids.tolist())


@pytest.mark.parametrize("length", [MAX_SPAN, MAX_SPAN + 1, 1_000_000])
def test_long_texts_lose_their_middle_and_keep_both_seams(
    length: int,
) -> None:
    prompt, response = "p" * (length - 3) + "end", "beg" + "r" * (length - 6) + "fin"
    text = prompt + response
    offsets = [(i, i + 1) for i in range(len(text))]
    flags = np.arange(len(text)) >= len(prompt)
    document = Document((Segment(prompt, False), Segment(response, True)))
    spans = previewed(EncodedDocument(np.zeros(len(text), np.int64), flags, offsets, document), "x")["spans"]
    assert [trained for _, trained in spans] == [False, True]
    assert spans[0][0].startswith("ppp")
    assert spans[0][0].endswith("end")
    assert spans[1][0].startswith("beg")
    assert spans[1][0].endswith("fin")
    for span, _ in spans:
        assert (span in (prompt, response)) == (length <= MAX_SPAN)
        assert len(span) < MAX_SPAN + 50
    if length > MAX_SPAN:
        assert f"…[{length - MAX_SPAN:,} characters left out]…" in spans[0][0]


def test_the_text_form_marks_what_is_trained(encoder: TextEncoder) -> None:
    talk = encoded(encoder, ("U: hi\n", False), ("A: é\n", True), ("U: 12\n", False), ("A: 😀", True))
    half = previewed(encoded(encoder, ("Q:\n", False), ("A", True), ends=False), "b.jsonl:2")
    written = mask_preview([previewed(talk, "a.jsonl:1"), half | {"truncated": True}])
    assert f"U: hi\n{OPEN}A: é\n{CLOSE}U: 12\n{OPEN}A: 😀{EOS}{CLOSE}\n" in written
    assert f"--- example 1 (a.jsonl:1): {len(talk.ids)} tokens, {talk.trained.sum()} trained\n" in written
    assert f"--- example 2 (b.jsonl:2): {half['tokens']} tokens, 1 trained, truncated\nQ:\n" in written
    assert written.count(OPEN) == written.count(CLOSE) == 4  # one of them in the legend
