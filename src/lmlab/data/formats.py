"""From a raw record to a `Document`: text segments, each trained or not.

One normal form for all data (text, triples, prompt/completion, messages). The mask is decided here, on
characters, by the code that knows what the response is; tokens come later (encoding.py) and can shift nothing.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lmlab.data.chat import chat_document, chat_prompt
from lmlab.data.chat_templates import CHAT_TEMPLATES, RenderChat
from lmlab.data.fields import BadRecordError, Shorten, cut_beginning, text_field
from lmlab.data.turns import cut_last_question, drop_exchanges, read_turns
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
        render_chat: ``(turns, add_generation_prompt) -> text`` by the chat template in force, or None.
        train_all: train every segment (pretraining).
        special_tokens: texts that are one special token each; a turn that ends with one needs no EOS.
    """

    template: str
    columns: Mapping[str, str]
    render_chat: RenderChat | None = None
    train_all: bool = False
    special_tokens: Collection[str] = ()


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


def _response_document(prompt: str, response: str, options: FormatOptions) -> Document:
    segments = (Segment(prompt, options.train_all), Segment(response, True))
    return Document(segments, prompt=prompt, response=response)


@formats.register("triples")
def triples(record: Record, options: FormatOptions) -> Document:
    """instruction / input (may be empty) / output through the template; the output is trained."""
    instruction, output = (
        text_field(record, "instruction", options.columns),
        text_field(record, "output", options.columns),
    )
    given = text_field(record, "input", options.columns, required=False)
    try:
        prompt = render_prompt(options.template, instruction, given)
    except Exception as error:  # the template compiles (template_source), but not every record fits it
        raise BadRecordError("template fails", str(error)) from error
    return _response_document(prompt, output, options)


@formats.register("completion")
def completion(record: Record, options: FormatOptions) -> Document:
    """prompt / completion, joined as they are; the completion is trained."""
    return _response_document(
        text_field(record, "prompt", options.columns),
        text_field(record, "completion", options.columns),
        options,
    )


@formats.register("text")
def text(record: Record, options: FormatOptions) -> Document:
    """One text; every token is trained."""
    return Document((Segment(text_field(record, "text", options.columns), True),))


@formats.register("messages")
def messages(record: Record, options: FormatOptions) -> Document:
    """Chat turns through the chat template in force; every assistant turn with its end mark is trained (chat.py)."""
    turns = read_turns(record, options.columns)
    if options.render_chat is None:
        raise UserError(
            "the tokenizer has no chat template",
            where="data.format=messages",
            fix=f"name one (data.chat_template={'|'.join(CHAT_TEMPLATES)}, or a .jinja file)",
        )
    return chat_document(
        turns, options.render_chat, special_tokens=options.special_tokens, train_all=options.train_all
    )


@dataclass(frozen=True)
class Prompting:
    """How a question of one's own becomes the text that generation starts from: as the model's training had it.

    Attributes:
        template: Jinja source over ``instruction`` and ``input`` of a model trained on triples.
        render_chat: of a model trained on conversations; with neither, the question is the text.
    """

    template: str | None = None
    render_chat: RenderChat | None = None

    def __call__(self, question: str, *, system: str | None = None) -> str:
        """The whole text.

        Raises:
            UserError: the chat template refuses it, or ``system`` is given and there is no chat template.
        """
        if self.render_chat is None:
            if system is not None:
                what = "a system message needs a model trained on conversations"
                raise UserError(what, where="system", fix="leave it out, or train with data.format=messages")
            return render_prompt(self.template, question) if self.template else question
        turns = [] if system is None else [{"role": "system", "content": system}]
        try:
            return chat_prompt([*turns, {"role": "user", "content": question}], self.render_chat)
        except BadRecordError as error:
            fix = "leave the system message out, or give the prompt as it is (--raw)"
            raise UserError(str(error), where="prompt", fix=fix) from error


FIELDS = {
    "triples": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "messages": ("messages",),
}
"""Fields each format reads."""

SHORTENINGS: dict[str, tuple[Shorten, ...]] = {
    "triples": (cut_beginning("input"), cut_beginning("instruction")),
    "completion": (cut_beginning("prompt"),),
    "messages": (drop_exchanges, cut_last_question),
}
"""What is cut, in this order, from a record that is too long (``too_long=truncate_prompt``); a plugin's format may add its
own, else only its end is cut."""


def format_key(name: str) -> str | None:
    """A hash of the code of a format from outside lmlab, whose author may change it; None for lmlab's own."""
    function = formats.get(name)
    file = inspect.getsourcefile(function)
    if function.__module__.partition(".")[0] == "lmlab" or file is None:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
