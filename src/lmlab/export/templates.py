"""The training's prompt in other programs' template languages: a tokenizer's chat template, Ollama's Go templates."""

from __future__ import annotations

from typing import Any

from lmlab.data.chat_templates import CHAT_TEMPLATES
from lmlab.data.formats import ALPACA, BRIEF, render_prompt
from lmlab.tokenizers import DEFAULT_CHAT_TEMPLATE, adds_bos

_LAST_QUESTION = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- set instruction = asked[-1]['content'] -%}{%- set input = '' -%}"
)
_CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
GO_CHATS = {
    DEFAULT_CHAT_TEMPLATE: _CHATML,
    CHAT_TEMPLATES["chatml"]: _CHATML,
    CHAT_TEMPLATES["llama3"]: (
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}
"""Chat template -> Ollama's; BOS is left to the GGUF file, which says whether there is one."""
GO_PROMPTS = {
    BRIEF: "### Instruction:\n{{ .Prompt }}\n### Response:\n",
    ALPACA: (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"
    ),
}
"""Prompt template -> Ollama's, without an input."""


def use_prompt_as_chat(tokenizer: Any, template: str) -> bool:
    """Give a tokenizer a chat template that writes the last user message as the training's prompt.

    For programs that know conversations only (vLLM's and Ollama's chat, transformers' pipelines). The template that the
    base's tokenizer brought would ask in a form that the model was not trained on.

    Returns:
        False: the template comes out differently in transformers' Jinja; the tokenizer has no chat template then.
    """
    bos = "{{- bos_token -}}" if adds_bos(tokenizer) else ""
    # transformers' Jinja drops a template's last line end, and only that: so something stands behind it.
    tokenizer.chat_template = _LAST_QUESTION + bos + template + "{{ '' }}"
    probe = "How many  legs\nhas a 'cat'?"
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "user", "content": probe}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # whatever Jinja raises on a template of somebody's own
        written = None
    expected = (tokenizer.bos_token if bos else "") + render_prompt(template, probe)
    if written != expected:
        tokenizer.chat_template = None
        return False
    return True
