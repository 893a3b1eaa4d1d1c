"""What the model is trained on, for a person's eye: a few documents with the trained characters marked.

The marks are read off the tokens' own flags, not off the format's segments, so what is shown is what the loss will see:
a response that was cut ends where its last token ends, an EOS that is missing is missing, a seam that a merge moved has moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lmlab.data.encoding import EncodedDocument

OPEN, CLOSE = "⟦", "⟧"
EOS = "<EOS>"
MAX_SPAN = 2000
"""Characters of one span that are kept; of a longer one the middle is left out, so that its two seams stay in view."""


def previewed(encoded: EncodedDocument, where: str) -> dict[str, Any]:
    """An example as plain JSON values.

    Returns:
        ``where``, ``tokens``, ``supervised_tokens``, ``truncated``, ``spans`` (``[text, trained]`` in order; joined they are
        the text as encoded, but for what `MAX_SPAN` leaves out) and ``eos``, whether the last span stands for an appended
        EOS token instead of text.
    """
    runs = groupby(_pieces(encoded), key=lambda piece: piece[1])
    spans: list[list[Any]] = [[_clip("".join(text for text, _ in run)), trained] for trained, run in runs]
    eos = len(encoded.ids) > len(encoded.offsets)
    if eos:
        spans.append([EOS, bool(encoded.trained[-1])])
    return {
        "where": where,
        "tokens": len(encoded.ids),
        "supervised_tokens": int(encoded.trained.sum()),
        "truncated": bool(encoded.truncated),
        "spans": spans,
        "eos": eos,
    }


def _pieces(encoded: EncodedDocument) -> Iterator[tuple[str, bool]]:
    """(text, trained), token by token. Tokens that share a character (bytes of an emoji) give it once, trained if one of them is."""
    text = "".join(segment.text for segment in encoded.document.segments)
    end, before, held = 0, False, ""
    for (start, stop), flag in zip(encoded.offsets, encoded.trained, strict=False):
        trained = bool(flag)
        if stop <= end:
            before = before or (trained and stop > start and stop == end)
            continue
        if held:
            yield held, before
        if start > end:  # characters that no token holds, such as spaces a tokenizer drops
            yield text[end:start], before and trained
        held, before, end = text[max(start, end) : stop], trained, stop
    if held:
        yield held, before


def _clip(text: str) -> str:
    if len(text) <= MAX_SPAN:
        return text
    head, tail = text[: MAX_SPAN * 3 // 4], text[-MAX_SPAN // 4 :]
    return f"{head} …[{len(text) - len(head) - len(tail):,} characters left out]… {tail}"


def mask_preview(examples: Sequence[dict[str, Any]]) -> str:
    """The texts of `previewed` examples with the trained spans between ⟦ and ⟧: mask_preview.txt."""
    parts = [f"Trained text stands between {OPEN} and {CLOSE}; {EOS} inside the marks is trained too.\n"]
    for number, example in enumerate(examples, start=1):
        spans = groupby(example["spans"], key=lambda span: span[1])
        texts = [("".join(piece for piece, _ in group), trained) for trained, group in spans]
        text = "".join(f"{OPEN}{piece}{CLOSE}" if trained else piece for piece, trained in texts)
        about = f"{example['tokens']} tokens, {example['supervised_tokens']} trained"
        about += ", truncated" if example["truncated"] else ""
        parts.append(f"--- example {number} ({example['where']}): {about}\n{text}\n")
    return "\n".join(parts)
