"""What of a conversation the model is given, and how its answers come, stop and switch between adapters."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lmlab.chat.choice import check_adapter, chosen_sampler, further_adapters
from lmlab.chat.dialogue import MEMORY, Dialogue, Reply, fitting_prompt
from lmlab.config.named import named_sampler
from lmlab.records import UserError

GREEDY = {"max_new_tokens": 12}


def turns(*contents: str) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)
    ]


def test_against_transformers_the_whole_conversation_goes_through_the_chat_template(base: Any) -> None:
    said = turns("Hello", "Hi there.", "What is 2 + 2?")
    text, left_out = fitting_prompt(base, said, "Be brief.", max_new_tokens=12)
    whole = [{"role": "system", "content": "Be brief."}, *said]
    assert text == base.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert left_out == 0
    assert Dialogue(base).memory(None) == "chat"


def test_the_oldest_turns_are_dropped_and_it_is_said(base: Any) -> None:
    said = turns(*("word " * 100 for _ in range(6)), "the last one")
    text, left_out = fitting_prompt(base, said, None, max_new_tokens=64)
    assert left_out in (2, 4)
    assert text == base.tokenizer.apply_chat_template(
        said[left_out:], tokenize=False, add_generation_prompt=True
    )
    more = base.tokenizer.apply_chat_template(
        said[left_out - 2 :], tokenize=False, add_generation_prompt=True
    )
    room = 512 - 64  # tiny-base reads 512 tokens
    assert len(base.generator.encode(text)) <= room < len(base.generator.encode(more)), "no more than needed"
    reply = Dialogue(base).reply(said, sampler=named_sampler("greedy", {"max_new_tokens": 2}), seed=0)
    assert f"the {reply.num_left_out} oldest turns no longer fit and were not sent" in reply.about
    assert reply.num_left_out > 0


def test_a_message_that_does_not_fit_is_an_error(base: Any) -> None:
    with pytest.raises(
        UserError, match=r"the message has \d+ tokens with its template and the model's context is 512"
    ):
        fitting_prompt(base, turns("word " * 600), None, max_new_tokens=8)


def test_a_model_of_instructions_is_given_the_last_one_alone(tuned: Any) -> None:
    text, left_out = fitting_prompt(tuned, turns("first", "answer", "second"), None, max_new_tokens=8)
    assert text == "### Instruction:\nsecond\n### Response:\n"
    assert left_out == 0, "that is its training, not a lack of room"
    dialogue = Dialogue(tuned)
    assert dialogue.adapters == ("default", "two", "base")
    assert [dialogue.memory(name) for name in dialogue.adapters] == ["instructions", "chat", "instructions"]
    assert "earlier ones are not sent" in MEMORY["instructions"]
    with pytest.raises(UserError, match="a system message needs a model trained on conversations"):
        dialogue.reply(turns("x"), system="Be brief.", sampler=named_sampler("greedy", GREEDY), seed=0)


def test_answers_come_in_pieces_and_from_the_adapter_asked_for(tuned: Any) -> None:
    dialogue, sampler = Dialogue(tuned), named_sampler("top_p_temperature", GREEDY)
    texts = {}
    for name in (*dialogue.adapters, "default"):
        pieces: list[str] = []
        reply = dialogue.reply(
            turns("Count the words."), sampler=sampler, seed=3, adapter=name, on_text=pieces.append
        )
        assert "".join(pieces) == reply.text
        assert texts.setdefault(name, reply.text) == reply.text, "the same again after a switch"
    assert len(set(texts.values())) == 3
    (alone,) = tuned.generator(
        ["### Instruction:\nCount the words.\n### Response:\n"], sampler=sampler, seeds=[3]
    )
    assert texts["default"] == alone.text


def test_stopped_answers_keep_what_is_written(tuned: Any) -> None:
    dialogue, sampler = Dialogue(tuned), named_sampler("greedy", {"max_new_tokens": 60})
    whole = dialogue.reply(turns("Count"), sampler=sampler, seed=0)
    stop, pieces = threading.Event(), []

    def told(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()

    part = dialogue.reply(turns("Count"), sampler=sampler, seed=0, on_text=told, stop=stop)
    assert (part.text, part.stop_reason, part.about) == ("".join(pieces), "stopped", "stopped")
    assert len(pieces) == 3
    assert whole.text.startswith(part.text)
    assert dialogue.reply(turns("Count"), sampler=sampler, seed=0).text == whole.text, "as if never stopped"


def test_a_stream_gives_pieces_then_the_reply_and_errors_as_they_are(tuned: Any) -> None:
    dialogue, sampler = Dialogue(tuned), named_sampler("greedy", GREEDY)
    *pieces, reply = dialogue.stream(turns("Count"), stop=threading.Event(), sampler=sampler, seed=0)
    assert isinstance(reply, Reply)
    assert "".join(map(str, pieces)) == reply.text
    left = threading.Event()
    stream = dialogue.stream(turns("Count"), stop=left, sampler=sampler, seed=0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert left.is_set(), "whoever leaves ends the answer"
    with pytest.raises(UserError, match="no adapter 'tow'"):
        next(dialogue.stream(turns("Count"), stop=threading.Event(), sampler=sampler, seed=0, adapter="tow"))


def test_choices_of_a_command_line() -> None:
    assert further_adapters(["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"], ["base=x"]):
        with pytest.raises(UserError):
            further_adapters(wrong)
    with pytest.raises(UserError, match="no adapter 'tow'") as caught:
        check_adapter("tow", ["default", "two"])
    assert "two" in str(caught.value.fix)
    own = named_sampler("top_k", {"top_k": 3}).model_dump()
    assert chosen_sampler(own, None, {"max_new_tokens": 5}).model_dump() == {**own, "max_new_tokens": 5}
    assert chosen_sampler(own, "greedy", {}).kind == chosen_sampler({}, None, {}).kind == "greedy"
    with pytest.raises(UserError, match="unknown sampler 'gredy'"):
        chosen_sampler({}, "gredy", {})
