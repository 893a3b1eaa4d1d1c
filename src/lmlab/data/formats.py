"""From a raw record to a `Document`: text segments, each trained or not.

One normal form for all data (text, triples, prompt/completion, messages). The mask is decided here, on
characters, by the code that knows what the response is; tokens come later (encoding.py) and can shift nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lmlab.records import Document, Record, Segment, UserError
from lmlab.registry import Functions

ALPACA = (
    "Below is an instruction that describes a task"
    "{% if input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n{% if input %}### Input:\n{{ input }}\n\n{% endif %}### Response:\n"
)
"""Both prompts of the Stanford Alpaca project (github.com/tatsu-lab/stanford_alpaca), with a line end after
"### Response:" (as Alpaca-LoRA and others have it), so that no token holds the heading's end and the answer's start."""

BRIEF = (
    "### Instruction:\n{{ instruction }}\n{% if input %}### Input:\n{{ input }}\n{% endif %}### Response:\n"
)
"""Alpaca's headings without its preamble: a third of the tokens, for small models."""

TEMPLATES = {"alpaca": ALPACA, "brief": BRIEF}


@dataclass(frozen=True)
class FormatOptions:
    """What a format may need beside the record.

    Attributes:
        template: Jinja source of the prompt (everything before the response).
        columns: lmlab's field name -> the source's column name.
        render_chat: ``(messages, add_generation_prompt) -> text`` by the model's own chat template, or None.
        train_all: train every segment (pretraining).
    """

    template: str
    columns: Mapping[str, str]
    render_chat: Callable[[list[dict[str, Any]], bool], str] | None = None
    train_all: bool = False


class BadRecordError(Exception):
    """A record that this format cannot use; ``reason`` is the key it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


Format = Callable[[Record, FormatOptions], Document]
formats: Functions[Format] = Functions("data.format")


def template_source(name_or_text: str) -> str:
    """The Jinja source of a named template, or the text itself if it is one.

    Raises:
        UserError: neither a known name nor a template with ``{{ instruction }}`` in it, not valid Jinja, or
            another variable than these two.
    """
    source = TEMPLATES.get(name_or_text, name_or_text)
    if "instruction" not in source or "{{" not in source:
        names = ", ".join(sorted(TEMPLATES))
        raise UserError(
            f"unknown template '{name_or_text}'",
            where="data.template",
            fix=f"one of {names}, or a Jinja text with {{{{ instruction }}}}",
        )
    fix = "mend it; it may use {{ instruction }} and {{ input }}"
    try:
        used = _variables(source)
    except Exception as error:  # jinja2's own, and what its parser stumbles over
        raise UserError(f"not a valid Jinja template: {error}", where="data.template", fix=fix) from error
    if unknown := used - {"instruction", "input"}:
        what = f"the template uses {', '.join(sorted(unknown))}, which no record has"
        raise UserError(what, where="data.template", fix=fix)
    if "instruction" not in used:
        raise UserError("the template leaves the instruction out", where="data.template", fix=fix)
    return source


def _variables(source: str) -> set[str]:
    from jinja2 import meta

    template = _compiled(source)
    return meta.find_undeclared_variables(template.environment.parse(source)) - set(template.globals)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        source
    )


def render_prompt(template: str, instruction: str, input: str = "") -> str:
    """The prompt that generation starts from: exactly what training put before the response."""
    return _compiled(template).render(instruction=instruction, input=input)


def _field(record: Record, name: str, options: FormatOptions, *, required: bool = True) -> str:
    column = options.columns.get(name, name)
    value = record.fields.get(column)
    if value is None:
        if required:
            raise BadRecordError(f"no {name}", f"field '{column}' is missing or null")
        return ""
    if not isinstance(value, str):
        raise BadRecordError(f"{name} is not text", f"field '{column}' is {type(value).__name__}")
    if required and not value.strip():
        raise BadRecordError(f"empty {name}", f"field '{column}'")
    return _unicode(value, f"field '{column}'")


def _unicode(value: str, place: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError(
            "not Unicode text", f"{place} has a lone surrogate at character {error.start}"
        ) from error
    return value


def _response_document(prompt: str, response: str, options: FormatOptions) -> Document:
    segments = (Segment(prompt, options.train_all), Segment(response, True))
    return Document(segments, prompt=prompt, response=response)


@formats.register("triples")
def triples(record: Record, options: FormatOptions) -> Document:
    """instruction / input (may be empty) / output through the template; the output is trained."""
    instruction, output = _field(record, "instruction", options), _field(record, "output", options)
    given = _field(record, "input", options, required=False)
    try:
        prompt = render_prompt(options.template, instruction, given)
    except Exception as error:  # the template compiles (template_source), but not every record fits it
        raise BadRecordError("template fails", str(error)) from error
    return _response_document(prompt, output, options)


@formats.register("completion")
def completion(record: Record, options: FormatOptions) -> Document:
    """prompt / completion, joined as they are; the completion is trained."""
    return _response_document(
        _field(record, "prompt", options), _field(record, "completion", options), options
    )


@formats.register("text")
def text(record: Record, options: FormatOptions) -> Document:
    """One text; every token is trained."""
    return Document((Segment(_field(record, "text", options), True),))


@formats.register("messages")
def messages(record: Record, options: FormatOptions) -> Document:
    """Chat turns through the model's own chat template; every assistant turn with its end mark is trained.

    The spans are found by rendering growing prefixes of the conversation, so no generation marks are needed in
    the template; a template whose prefixes do not agree with the whole cannot be masked safely and is refused.
    What follows the last assistant turn is left out. Where the template's own end mark is not EOS, EOS follows it.
    """
    turns = _turns(record, options)
    if options.render_chat is None:
        raise UserError(
            "the tokenizer has no chat template",
            where="data.format=messages",
            fix="use a model with one, or triples",
        )

    def render(upto: int, add_generation_prompt: bool) -> str:
        assert options.render_chat is not None
        try:
            return options.render_chat(turns[:upto], add_generation_prompt)
        except Exception as error:  # a template refuses roles out of turn by raising
            raise BadRecordError("chat template refuses it", str(error)) from error

    whole = render(len(turns), False)
    segments: list[Segment] = []
    position = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (
            whole.startswith(before) and whole.startswith(after) and len(after) > len(before) >= position
        ):
            raise BadRecordError("chat template not prefix-stable", f"at turn {index + 1}")
        segments += [
            Segment(whole[position : len(before)], options.train_all),
            Segment(whole[len(before) : len(after)], True),
        ]
        position = len(after)
    if not segments:
        raise BadRecordError("no assistant turn")
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Document(tuple(segments), prompt=render(last, True), response=turns[last]["content"])


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _turns(record: Record, options: FormatOptions) -> list[dict[str, Any]]:
    column = options.columns.get("messages", "messages")
    raw = record.fields.get(column)
    if raw is None:
        raw = record.fields.get("conversations")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise BadRecordError("no messages", f"field '{column}' is missing, empty or not a list")
    turns = []
    for turn in raw:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError("message without role or content", f"message {len(turns) + 1}")
        role = _ROLES.get(role, role)
        if role == "assistant" and not content.strip():
            raise BadRecordError("empty response", f"message {len(turns) + 1}")
        turns.append({"role": role, "content": _unicode(content, f"message {len(turns) + 1}")})
    return turns


FIELDS = {
    "triples": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "messages": ("messages",),
}
"""Fields each format reads."""

SHRINKABLE = {"triples": ("input", "instruction"), "completion": ("prompt",)}
"""Fields whose beginning is cut, in this order, when an example is too long (``too_long=truncate_prompt``)."""
