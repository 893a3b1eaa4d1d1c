"""Where a text may be cut so that encoding the parts gives exactly the ids of the whole.

A tokenizer's words are fixed by its pre-tokenizer, so a cut is safe where both parts are split into words as the
whole is. Read off tokenizer.json for the families below; anything else has no rule (None) and is encoded in
overlapping windows. With W a run of white space before a visible character, W ending in a space:

- Word patterns (GPT-2, GPT-4, Llama 3, Qwen 2, ...): alternatives of a word take at most one white-space character
  at their front and line ends at their back; all of W but its last character is one match (``\\s+(?!\\S)``), at the end
  of a text just as before that last space. So a cut before the last space is safe, whatever stands to its left.
- Digits split off first, then the word pattern: ``a  1`` has one word of two spaces, so both sides must be visible.
- ``▁`` for spaces and no words at all (Llama 2, Mistral): every merge is a token of the vocabulary; if none holds ``▁``
  behind another character, none crosses a space behind a visible character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    r"'(?:[sdmt]|ll|ve|re)",
    r"'(?i:[sdmt]|ll|ve|re)",
    _ENDINGS,
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    *_CASED,
    *(cased + _ENDINGS + "?" for cased in _CASED),
    r"\p{N}",
    r"\p{N}{1,3}",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?\S+",
}
"""Alternatives of word patterns that hold no white space but one character at their front."""
WORDS_AND_LINE_ENDS = {r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"}
SPACES = [r"\s+(?!\S)", r"\s+"]
LINE_ENDS = r"\s*[\r\n]+"
MARK = "▁"
AT_LINE_ENDS = {
    "before": re.compile(r"(?<=[^\s▁])\n"),
    "after": re.compile(r"(?<=\n)[^\s▁/]"),
    "never": re.compile(r"(?!)"),
}
"""Safe places by `Cuts.lines`, at the match's beginning. A ``/`` may belong to the word before, with its line ends."""


@dataclass(frozen=True)
class Cuts:
    """Safe cuts. Always: before a space between two visible characters.

    Attributes:
        any_left: also before a space that white space precedes.
        lines: also before a line end that a visible character precedes, after one that a visible character follows
            (but for ``/``), or neither.
        context: put before a part that is not the text's beginning, and cut off again: keeps the tokenizer from
            treating the part as a beginning of its own.
    """

    any_left: bool
    lines: Literal["before", "after", "never"]
    context: str = ""


def blank(character: str) -> bool:
    """Whether a character is to a tokenizer, or may be, as a space is."""
    return character.isspace() or character == MARK


def safe_cuts(content: dict[str, Any]) -> Cuts | None:
    """The rule for a tokenizer.json, None where no rule is known."""
    model, normalizer = content["model"], content.get("normalizer")
    if model["type"] != "BPE" or model.get("dropout"):
        return None
    if normalizer and any(token["normalized"] for token in content["added_tokens"]):
        return None  # they are searched in a text that is not at hand
    if _is_marked(normalizer, content.get("pre_tokenizer")):
        return _marked(model)
    # NFC never joins a space to what stands before it.
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    return _by_words(content.get("pre_tokenizer"))


def _by_words(pre_tokenizer: dict[str, Any] | None) -> Cuts | None:
    steps = _steps(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    *first, last = steps
    if not first:
        return Cuts(True, "before") if last["use_regex"] else None
    if last["use_regex"]:
        digits = len(first) == 1 and first[0]["type"] == "Digits"
        return Cuts(False, "before") if digits else None
    split = first[0]
    regex = split.get("pattern", {}).get("Regex") if split["type"] == "Split" and len(first) == 1 else None
    if regex is None or split["behavior"] != "Isolated" or split["invert"]:
        return None
    alternatives = _alternatives(regex)
    if alternatives[-2:] != SPACES:
        return None
    words = alternatives[:-2]
    takes_line_ends = words[-1:] == [LINE_ENDS]
    known = WORDS | (WORDS_AND_LINE_ENDS if takes_line_ends else set())
    if not set(words[:-1] if takes_line_ends else words) <= known:
        return None
    return Cuts(True, "after" if takes_line_ends else "before")


def _alternatives(pattern: str) -> list[str]:
    """The pattern's alternatives at its top level."""
    parts, depth, in_class = [""], 0, False
    for match in re.finditer(r"\\.|.", pattern, re.DOTALL):
        token = match.group()
        if token == "|" and not depth and not in_class:
            parts.append("")
            continue
        in_class = (in_class or token == "[") and token != "]"
        depth += 0 if in_class else (token == "(") - (token == ")")
        parts[-1] += token
    return parts


def _steps(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if stage is None:
        return []
    return stage[key] if stage["type"] == "Sequence" else [stage]


def _is_marked(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether the text is only rewritten with `MARK` for spaces, and a mark put before it, before the merges."""
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    rest = [step for step in _steps(normalizer, "normalizers") if step != replaces]
    if rest and (len(rest) > 1 or rest[0] != {"type": "Prepend", "prepend": MARK}):
        return False
    if pre_tokenizer is None:
        return replaces in _steps(normalizer, "normalizers")
    return (
        normalizer is None and pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == MARK
    )


def _marked(model: dict[str, Any]) -> Cuts | None:
    vocab = model["vocab"]
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if MARK not in vocab or prefix or suffix or any(re.search(f"[^{MARK}]{MARK}", token) for token in vocab):
        return None
    every_byte = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    fuses_unknown = model.get("fuse_unk") and not every_byte  # into one token, across a line end too
    lines_apart = not fuses_unknown and not any("\n" in t and t.strip("\n") for t in vocab)
    return Cuts(False, "before" if lines_apart else "never", context="x")
