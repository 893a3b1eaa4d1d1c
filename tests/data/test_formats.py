"""Records to trained and untrained text: templates, columns, chat templates, and every reason to refuse a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmlab.config.compose import CONF
from lmlab.data.encoding import encode_document
from lmlab.data.formats import (
    BadRecordError,
    FormatOptions,
    formats,
    render_prompt,
    template_source,
)
from lmlab.data.prepare import TextEncoder
from lmlab.records import Document, Record, UserError
from lmlab.tokenizers import DEFAULT_CHAT_TEMPLATE

from .broken_records import BAD_FIELDS, page

# As published in github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT; lmlab ends the line behind it.
STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
STANFORD_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am a model."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Yes?\n\nI do."},
    {"role": "user", "content": "Nothing."},
]


def chatml(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def document(
    name: str,
    fields: dict[str, Any],
    *,
    template: str = "alpaca",
    columns: dict[str, str] | None = None,
    render_chat: Callable[[list[dict[str, Any]], bool], str] | None = chatml,
    train_all: bool = False,
) -> Document:
    options = FormatOptions(template_source(template), columns or {}, render_chat, train_all)
    return formats.get(name)(Record(fields, "here:1"), options)


def parts(made: Document) -> list[tuple[str, bool]]:
    return [(segment.text, segment.trained) for segment in made.segments]


@pytest.mark.parametrize("extra", [{"input": "1 2"}, {"input": ""}, {"input": None}, {}])
def test_alpaca_is_the_published_prompt(extra: dict[str, Any]) -> None:
    given = extra.get("input") or ""
    published = STANFORD_INPUT if given else STANFORD_NO_INPUT
    made = document("triples", {"instruction": "Add {{ these }}.", "output": " 3\n"} | extra)
    prompt = published.format(instruction="Add {{ these }}.", input=given) + "\n"
    assert parts(made) == [(prompt, False), (" 3\n", True)]
    assert (made.prompt, made.response, made.ends) == (prompt, " 3\n", True)
    assert render_prompt(template_source("alpaca"), "Add {{ these }}.", given) == prompt


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("1 2", "### Instruction:\nAdd.\n### Input:\n1 2\n### Response:\n"),
        ("", "### Instruction:\nAdd.\n### Response:\n"),
    ],
)
def test_brief(given: str, prompt: str) -> None:
    made = document("triples", {"instruction": "Add.", "input": given, "output": "3"}, template="brief")
    assert parts(made) == [(prompt, False), ("3", True)]


def test_an_own_template_and_own_columns() -> None:
    made = document(
        "triples",
        {"q": "Sum", "context": "1 2", "a": "3", "output": "not this"},
        template="{% for _ in range(2) %}#{% endfor %} {{ instruction | upper }}{% if input %} ({{ input }}){% endif %}\n",
        columns={"instruction": "q", "input": "context", "output": "a"},
    )
    assert parts(made) == [("## SUM (1 2)\n", False), ("3", True)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "alpacca",
            "unknown template 'alpacca' (data.template): one of alpaca, brief, or a Jinja text with {{ instruction }}",
        ),
        ("{{ input }}", "unknown template"),
        ("{{ instruction", "not a valid Jinja template: "),
        ("{% if input %}{{ instruction }}", "not a valid Jinja template: "),
        ("{{ instruction | nosuch }}", "not a valid Jinja template: No filter named 'nosuch'"),
        ("{{ instruction }} {{ context }}", "the template uses context, which no record has (data.template): "),
        ("{# instruction #}{{ input }}", "the template leaves the instruction out (data.template): "),
    ],
)  # fmt: skip
def test_a_bad_template_is_a_user_error(template: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        template_source(template)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "template",
    ["{{ instruction }}{{ input.split(':')[1] }}", "{{ instruction.__class__.__mro__ }}", "{{ instruction // 2 }}"],
)  # fmt: skip
def test_a_record_that_the_template_cannot_take(template: str) -> None:
    with pytest.raises(BadRecordError, match="template fails: ") as caught:
        document("triples", {"instruction": "x", "input": "no colon", "output": "y"}, template=template)
    assert caught.value.reason == "template fails"


def test_completion_joins_what_it_is_given() -> None:
    made = document("completion", {"prompt": "2 +  ", "completion": "\n4"})
    assert parts(made) == [("2 +  ", False), ("\n4", True)]
    mapped = {"prompt": "text", "completion": "label"}
    made = document("completion", {"text": "2", "label": "4", "prompt": "no"}, columns=mapped)
    assert parts(made) == [("2", False), ("4", True)]


def test_text_is_trained_whole() -> None:
    made = document("text", {"body": " a\r\nb "}, columns={"text": "body"})
    assert (parts(made), made.prompt, made.ends) == ([(" a\r\nb ", True)], None, True)


def test_pretraining_trains_every_segment() -> None:
    for name, fields in [
        ("triples", {"instruction": "i", "output": "o"}),
        ("completion", {"prompt": "p", "completion": "c"}),
        ("messages", {"messages": TALK}),
    ]:
        trained = [segment.trained for segment in document(name, fields, train_all=True).segments]
        assert len(trained) >= 2
        assert all(trained)


@pytest.mark.parametrize(("name", "fields", "reason"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_fields(name: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError) as caught:
        document(name, fields)
    assert caught.value.reason == reason


def test_a_bad_field_is_named_by_the_sources_column() -> None:
    with pytest.raises(BadRecordError, match="no output: field 'answer' is missing or null"):
        document("triples", {"instruction": "x"}, columns={"output": "answer"})


def test_every_assistant_turn_with_its_end_mark_is_trained() -> None:
    made = document("messages", {"messages": TALK})
    assert parts(made) == [
        (chatml(TALK[:2], True), False),
        ("I am a model.<|im_end|>", True),
        ("\n" + chatml(TALK[3:4], True), False),
        ("Yes?\n\nI do.<|im_end|>", True),
    ]
    assert (made.prompt, made.response) == (chatml(TALK[:4], True), "Yes?\n\nI do.")


def test_sharegpt_names() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TALK]
    made = document("messages", {"conversations": turns, "messages": None} | {"id": 3})
    assert made == document("messages", {"messages": TALK})


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        document("messages", {"messages": TALK}, render_chat=None)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    def forgetful(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return chatml(messages[-2:], add_generation_prompt)  # as those that cut old thoughts

    with pytest.raises(BadRecordError, match="chat template not stable: turn 3: it is left out"):
        document("messages", {"messages": TALK}, render_chat=forgetful)


def test_a_template_that_refuses_the_roles() -> None:
    def strict(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        raise ValueError("Conversation roles must alternate")

    with pytest.raises(BadRecordError, match="chat template refuses it: Conversation roles must alternate"):
        document("messages", {"messages": TALK}, render_chat=strict)


def test_default_chat_template_on_tokens(bpe: Any, encoder: TextEncoder) -> None:
    assert bpe.chat_template == DEFAULT_CHAT_TEMPLATE
    made = document("messages", {"messages": TALK}, render_chat=encoder.render_chat)
    encoded = encode_document(made, encoder.encode, encoder.eos_token_id)
    runs: list[list[int]] = [[]]
    for token, trained in zip(encoded.ids.tolist(), encoded.trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    spoken = [bpe.decode(run) for run in runs if run]
    assert spoken == ["I am a model.<|im_end|>", "Yes?\n\nI do.<|im_end|><|endoftext|>"]
    assert encoded.ids.tolist().count(encoder.eos_token_id) == 1


def test_real_sharegpt_file_reads_as_its_messages(real_data: Path) -> None:
    folder = real_data / "sft"
    shared = json.loads((folder / "fastchat-dummy_conversation.json").read_text(encoding="utf-8"))
    lines = (folder / "fastchat-dummy.messages.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(shared) == len(lines) == 500
    for one, line in zip(shared[::25], lines[::25], strict=True):
        assert document("messages", one) == document("messages", json.loads(line))


def test_the_page_of_error_lines_is_what_is_said() -> None:
    written = (CONF.parent / "docs" / "data-errors.md").read_text(encoding="utf-8")
    assert page() == written, "write it anew: python -m tests.data.broken_records > docs/data-errors.md"
