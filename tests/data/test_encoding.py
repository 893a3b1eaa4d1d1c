"""From text to ids and flags: exact masks at adversarial seams, EOS and BOS, and every length policy, counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lmlab.data.encoding import EncodedDocument, LengthPolicy, encode_document, fit_document
from lmlab.data.formats import BadRecordError, FormatOptions, formats, template_source
from lmlab.data.prepare import TextEncoder
from lmlab.data.preview import CLOSE, OPEN, mask_preview, previewed
from lmlab.records import Document, Record, Segment, UserError

from .conftest import random_text

Make = Callable[[Any], TextEncoder]
SEAMS = [
    ("### Response:\n", "the sum"),
    ("### Response:\n", "\nthe sum"),
    ("### Response:\n", "\n\n    the sum"),
    ("### Response:", "the sum"),
    ("### Response:", " the sum"),
    ("### Response: ", "the sum"),
    ("### Response:  ", "  the sum  "),
    ("12", "12"),
    ("the s", "um of"),
    ("Ünïc", "ödé"),
    ("中日", "本中"),
    ("😀", "😀"),
    ("👩\u200d", "👩‍👧"),
    ("e", "\u0301 combining"),
    ("a\r", "\nb\r\n"),
    ("Q", "<|im_end|>\n"),
    ("\n", "\n"),
    ("x", "é"),
]


def encoded(encoder: TextEncoder, prompt: str, response: str) -> EncodedDocument:
    made = Document((Segment(prompt, False), Segment(response, True)), prompt=prompt, response=response)
    return encode_document(made, encoder.encode, encoder.eos_token_id)


def trained_text(tokenizer: Any, one: EncodedDocument) -> str:
    """What the trained tokens say, without EOS."""
    ids = [int(i) for i, flag in zip(one.ids, one.trained, strict=True) if flag]
    return tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id])


def seam_excess(tokenizer: Any, prompt: str, response: str) -> int:
    """How many characters of the prompt's end share a token with the response, by the tokenizer's own words.

    Independent of lmlab's flags: the token that begins before the seam and ends behind it, if there is one.
    """
    spans = tokenizer(prompt + response, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
    across = [start for start, end in spans if start < len(prompt) < end]
    return len(prompt) - min(across) if across else 0


@pytest.mark.parametrize(("prompt", "response"), SEAMS)
def test_the_trained_tokens_say_the_response(
    bpe: Any, encoder: TextEncoder, prompt: str, response: str
) -> None:
    one = encoded(encoder, prompt, response)
    whole = prompt + response
    said = bpe.decode([int(i) for i, flag in zip(one.ids[:-1], one.trained[:-1], strict=True) if flag])
    excess = seam_excess(bpe, prompt, response)
    clean = said.lstrip("\ufffd")  # a token may begin inside a character of the prompt
    assert clean == whole[len(whole) - len(clean) :]
    assert len(response) <= len(clean) <= len(response) + excess
    assert clean != said or len(clean) == len(response) + excess
    assert excess <= 4  # one token, and no long one here
    assert one.ids[-1] == bpe.eos_token_id
    assert one.trained[-1]
    assert not one.trained[: int(np.argmax(one.trained))].any()
    assert one.trained[int(np.argmax(one.trained)) :].all()  # one run to the end
    assert one.trained_bytes == len(whole[len(prompt) - excess :].encode())
    assert not one.truncated


def test_some_seams_do_merge(bpe: Any) -> None:
    # Else the test above would show nothing.
    assert sum(seam_excess(bpe, *seam) > 0 for seam in SEAMS) >= 3


@pytest.mark.parametrize(("prompt", "response"), SEAMS)
def test_seams_with_bos_and_byte_fallback(
    stories: Any, make_encoder: Make, prompt: str, response: str
) -> None:
    encoder = make_encoder(stories)
    one = encoded(encoder, prompt, response)
    assert one.ids[0] == stories.bos_token_id
    assert (one.ids == stories.bos_token_id).sum() == 1
    assert not one.trained[0]
    assert one.ids[-1] == stories.eos_token_id
    assert one.trained[-1]
    spans = [span for span, flag in zip(one.offsets, one.trained, strict=False) if flag]
    covered = {i for start, end in spans for i in range(start, end)}
    assert set(range(len(prompt), len(prompt + response))) <= covered
    assert len([i for i in covered if i < len(prompt)]) <= 1
    assert trained_text(stories, one).strip().endswith(response.strip())


def test_a_prompt_that_brings_its_own_bos_gets_no_second(stories: Any, make_encoder: Make) -> None:
    one = encoded(make_encoder(stories), "<s>Once", " upon")
    assert (one.ids == stories.bos_token_id).sum() == 1


@pytest.mark.parametrize("tail", ["", "\n", " \n\n"])
def test_a_text_that_ends_with_eos_gets_no_second(encoder: TextEncoder, tail: str) -> None:
    one = encoded(encoder, "Q", f"A<|endoftext|>{tail}")
    assert (one.ids == encoder.eos_token_id).sum() == 1
    assert one.trained[one.ids == encoder.eos_token_id].all()
    assert (encoded(encoder, "Q", "<|endoftext|>A").ids == encoder.eos_token_id).sum() == 2


def test_flags_follow_characters_not_ids(encoder: TextEncoder) -> None:
    # The pad id and EOS inside a response are text like any other: labels never depend on an id.
    one = encoded(encoder, "<|pad|>Q", "A<|pad|>B<|endoftext|>C")
    assert one.trained.tolist() == [False, False, *[True] * 6]


RECORD = Record(
    {
        "instruction": "First words of the task. " + "Do this and that. " * 8 + "Last words of the task.",
        "input": "start of input " + "12 and 12, " * 30 + "end of input",
        "output": "The whole answer, all of it.",
    },
    "data.jsonl:7",
)


def fit(
    encoder: TextEncoder,
    limit: int | None,
    record: Record = RECORD,
    *,
    too_long: str = "truncate_prompt",
    template: str = "brief",
    name: str = "triples",
) -> EncodedDocument:
    return fit_document(
        record,
        name,
        formats.get(name),
        FormatOptions(template_source(template), {}),
        encoder.encode,
        eos_token_id=encoder.eos_token_id,
        policy=LengthPolicy(limit, too_long),
    )


def text_of(one: EncodedDocument) -> str:
    return "".join(segment.text for segment in one.document.segments)


def with_fields(**fields: Any) -> Record:
    return replace(RECORD, fields={**RECORD.fields, **fields})


def test_the_inputs_beginning_goes_first(bpe: Any, encoder: TextEncoder) -> None:
    whole = fit(encoder, None)
    one = fit(encoder, len(whole.ids) - 40)
    text = text_of(one)
    assert one.truncated
    assert len(whole.ids) - 60 < len(one.ids) <= len(whole.ids) - 40  # not more than needed
    assert RECORD.fields["instruction"] in text
    assert "start of input" not in text
    assert "end of input\n### Response:\nThe whole answer, all of it." in text
    assert trained_text(bpe, one) == RECORD.fields["output"]
    assert one.ids[-1] == encoder.eos_token_id
    assert one.document.prompt == text.removesuffix(RECORD.fields["output"])


def test_then_the_instructions_beginning(bpe: Any, encoder: TextEncoder) -> None:
    bare = len(fit(encoder, None, with_fields(input="")).ids)
    one = fit(encoder, bare - 30)
    text = text_of(one)
    assert "### Input:" not in text
    assert "First words" not in text
    assert text.endswith("Last words of the task.\n### Response:\nThe whole answer, all of it.")
    assert bare - 50 < len(one.ids) <= bare - 30
    assert trained_text(bpe, one) == RECORD.fields["output"]


@pytest.mark.parametrize("tail", ["", "\n", "  \n\n ", "\r\n"])
def test_white_space_at_the_instructions_end_saves_no_word(bpe: Any, encoder: TextEncoder, tail: str) -> None:
    record = with_fields(instruction=RECORD.fields["instruction"] + tail, input="")
    shortest = len(fit(encoder, None, with_fields(instruction=f".{tail}", input="")).ids)
    for limit in (shortest, shortest + 10):
        one = fit(encoder, limit, record)
        assert trained_text(bpe, one) == RECORD.fields["output"]
        assert len(one.ids) <= limit
    assert len(one.ids) > shortest


def test_a_response_that_alone_is_too_long_loses_its_end_and_eos(bpe: Any, encoder: TextEncoder) -> None:
    record = with_fields(output="word and 12 more " * 50 + "the end")
    one = fit(encoder, 60, record)
    assert len(one.ids) == 60
    assert encoder.eos_token_id not in one.ids
    assert text_of(one).startswith("### Instruction:\n.\n### Response:\nword")  # as much response as can be
    said = trained_text(bpe, one)
    assert record.fields["output"].startswith(said)
    assert len(said) > 50
    assert one.trained_bytes == len(said.encode())
    assert one.truncated


def test_only_eos_too_much_is_cut_as_such(bpe: Any, encoder: TextEncoder) -> None:
    record = with_fields(instruction="x", input="")
    whole = fit(encoder, None, record)
    one = fit(encoder, len(whole.ids) - 1, record)
    assert trained_text(bpe, one) == RECORD.fields["output"]
    assert encoder.eos_token_id not in one.ids
    assert fit(encoder, len(whole.ids), record).truncated is False


def test_completion_cuts_the_prompts_beginning(bpe: Any, encoder: TextEncoder) -> None:
    record = Record({"prompt": "begin " + "middle " * 60 + "end:", "completion": " yes"}, "x:1")
    one = fit(encoder, 40, record, name="completion")
    assert text_of(one).endswith("middle end: yes")
    assert "begin" not in text_of(one)
    assert trained_text(bpe, one) == " yes"
    assert 30 < len(one.ids) <= 40


def test_truncate_response_leaves_the_prompt(bpe: Any, encoder: TextEncoder) -> None:
    whole = fit(encoder, None)
    one = fit(encoder, len(whole.ids) - 4, too_long="truncate_response")
    assert one.ids.tolist() == whole.ids[:-4].tolist()
    said = trained_text(bpe, one)
    assert RECORD.fields["output"].startswith(said)
    assert said
    with pytest.raises(BadRecordError, match="no trained token"):
        fit(encoder, 20, too_long="truncate_response")


def test_drop_and_error(encoder: TextEncoder) -> None:
    size = len(fit(encoder, None).ids)
    assert len(fit(encoder, size, too_long="drop").ids) == size
    with pytest.raises(BadRecordError) as caught:
        fit(encoder, size - 1, too_long="drop")
    assert caught.value.reason == "too long"
    expected = (
        f"example of {size} tokens is longer than data.max_length={size - 1} (data.jsonl:7): "
        "raise data.max_length or choose data.too_long=truncate_prompt"
    )
    with pytest.raises(UserError) as refused:
        fit(encoder, size - 1, too_long="error")
    assert str(refused.value) == expected


@pytest.mark.parametrize("too_long", ["truncate_prompt", "truncate_response", "drop"])
@pytest.mark.parametrize("template", ["alpaca", "brief", "{{ input }}{{ instruction }}"])
def test_any_record_under_any_limit(bpe: Any, encoder: TextEncoder, too_long: str, template: str) -> None:
    draw = random.Random(f"{too_long} {template}")
    seen = {"kept": 0, "cut": 0, "refused": 0}
    for _ in range(120):
        output = random_text(draw, 30)
        record = Record(
            {"instruction": random_text(draw, 40), "input": random_text(draw, 40), "output": output}, "r:1"
        )
        limit = draw.choice([8, 24, 64, 100, 200, 300])
        blank = not (record.fields["instruction"].strip() and output.strip())
        reason = ""
        try:
            one = fit(encoder, limit, record, too_long=too_long, template=template)
        except BadRecordError as error:
            reason = error.reason
        assert reason.startswith("empty") if blank else reason in ("", "no trained token", "too long")
        if reason:
            seen["refused"] += 1
            continue
        text = text_of(one)
        assert len(one.ids) == len(one.trained) <= limit
        assert one.trained[1:].any()
        assert not one.trained[0]
        complete = one.ids[-1] == encoder.eos_token_id
        assert complete or one.truncated
        # Read off the decoded bytes, independently of flags and offsets: the trained part ends the text.
        said = trained_text(bpe, one)
        start = len(one.document.prompt or "")
        if complete:
            assert text == (one.document.prompt or "") + output  # nothing of the response was cut
            assert said.endswith(output) or len(one.ids) - one.trained.sum() == 1
            assert said == text[len(text) - len(said) :]
            assert len(said) - len(output) <= 8
            assert one.trained_bytes == len(said.encode())
        else:
            assert output[: max(0, len(said) - 9)] in text[start:]
            assert abs(one.trained_bytes - len(said.rstrip("\ufffd").encode())) <= 4  # a character cut inside
        seen["cut" if one.truncated else "kept"] += 1
    assert seen["kept"] > 10
    assert seen["refused"] > 3
    assert (seen["cut"] > 3) == (too_long != "drop")


def test_the_preview_marks_exactly_what_is_trained(bpe: Any, encoder: TextEncoder) -> None:
    messages = encode_document(
        Document(
            (
                Segment("U: hi\n", False),
                Segment("A: é\n", True),
                Segment("U: 12\n", False),
                Segment("A: 😀", True),
            )
        ),
        encoder.encode,
        encoder.eos_token_id,
    )
    cut = fit(encoder, 60, with_fields(output="word " * 80))
    made = [messages, encoded(encoder, "Q:\n", " A"), cut]
    shown = mask_preview([previewed(each, f"x:{i}") for i, each in enumerate(made)])
    assert f"U: hi\n{OPEN}A: é\n{CLOSE}U: 12\n{OPEN}A: 😀<EOS>{CLOSE}\n" in shown
    assert f"Q:\n{OPEN} A<EOS>{CLOSE}\n" in shown
    assert f"### Response:\n{OPEN}{trained_text(bpe, cut)}{CLOSE}\n" in shown
    assert f"--- example 2 (x:1): {len(encoded(encoder, 'Q:', ' A').ids) + 1} tokens, 2 trained\n" in shown
