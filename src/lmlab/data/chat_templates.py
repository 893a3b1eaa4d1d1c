"""Chat templates by name, by file or as text, and what a tokenizer's own template is to lmlab.

The shipped ones are the widespread forms in a few lines each. Every one begins with BOS where the tokenizer has one,
since for conversations the template alone is in charge of it, and writes the content of a turn as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmlab.records import UserError
from lmlab.registry import suggest

RenderChat = Callable[[list[dict[str, Any]], bool], str]
"""``(turns, add_generation_prompt) -> text``; raises whatever the template raises on turns it does not take."""

WHERE = "data.chat_template"
CHAT_TEMPLATES = {
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{% else %}{{ message['content'] + ' ' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}
"""chatml and llama3 mark turns by tokens of their own (`tokenizer.added_tokens` where the model lacks them); the others
get by with EOS."""


def chat_template_source(value: str) -> str:
    """The Jinja source that ``data.chat_template`` means: a shipped name, a file, or the text itself.

    Raises:
        UserError: neither a known name nor a readable file nor a Jinja text, not valid Jinja, or without ``messages``.
    """
    if value in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[value]
    source = value
    if "{{" not in value and "{%" not in value:
        source = _read(value)
    _check(source)
    return source


def _read(value: str) -> str:
    path = Path(value).expanduser()
    if not (path.suffix or "/" in value or path.exists()):
        known = f"{suggest(value, sorted(CHAT_TEMPLATES))}, a .jinja file, or a Jinja text over messages"
        raise UserError(f"unknown chat template '{value}'", where=WHERE, fix=known)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "not UTF-8"
        fix = f"check the path, or name one of {', '.join(sorted(CHAT_TEMPLATES))}"
        raise UserError(f"the chat template {value} cannot be read: {what}", where=WHERE, fix=fix) from error


def _check(source: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    if "messages" not in source:
        fix = "write it over messages, each with role and content"
        raise UserError("the chat template does not use messages", where=WHERE, fix=fix)
    try:
        # The same environment (generation marks, loop controls, ...) that will render it.
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=source)
    except TemplateSyntaxError as error:
        what = f"not a valid Jinja template: {error.message} in line {error.lineno}"
        raise UserError(what, where=WHERE, fix="mend it") from error
    except (TemplateError, TypeError, ValueError, KeyError):
        pass  # it parses, and does not want this one question: the data's own conversations are what it must render


def use_chat_template(tokenizer: Any, source: str | None) -> None:
    """Put ``source`` into a transformers tokenizer; None leaves it its own, of several the default one."""
    if source is not None:
        tokenizer.chat_template = source
    elif isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")


def chat_renderer(tokenizer: Any) -> RenderChat | None:
    """The rendering of a transformers tokenizer's own chat template, None without one."""
    if not tokenizer.chat_template:
        return None

    def render(turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    return render


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts that a transformers tokenizer takes as one special token each."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))
