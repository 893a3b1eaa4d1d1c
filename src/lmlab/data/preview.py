"""What the model is trained on, for a person's eye: a few documents with the trained characters marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmlab.data.encoding import EncodedDocument

OPEN, CLOSE = "⟦", "⟧"


def previewed(encoded: EncodedDocument, where: str) -> dict[str, Any]:
    """An example as plain JSON values, its spans read off the tokens' own flags."""
    text = "".join(segment.text for segment in encoded.document.segments)
    spans: list[list[Any]] = []
    position = 0

    def add(piece: str, trained: bool) -> None:
        if piece and spans and spans[-1][1] == trained:
            spans[-1][0] += piece
        elif piece:
            spans.append([piece, trained])

    for (start, end), trained in zip(encoded.offsets, encoded.trained, strict=False):
        if end > position:
            add(text[position:end], bool(trained))
            position = end
        del start
    if len(encoded.ids) > len(encoded.offsets):
        add("<EOS>", bool(encoded.trained[-1]))
    return {
        "where": where,
        "tokens": len(encoded.ids),
        "supervised_tokens": int(encoded.trained.sum()),
        "truncated": encoded.truncated,
        "spans": spans,
    }


def mask_preview(examples: Sequence[dict[str, Any]]) -> str:
    """The examples' texts with the trained spans between ⟦ and ⟧."""
    parts = [f"Trained text stands between {OPEN} and {CLOSE}; <EOS> inside the marks is trained too.\n"]
    for number, example in enumerate(examples, start=1):
        text = "".join(f"{OPEN}{piece}{CLOSE}" if trained else piece for piece, trained in example["spans"])
        parts.append(
            f"--- example {number}: {example['tokens']} tokens, {example['supervised_tokens']} trained\n{text}\n"
        )
    return "\n".join(parts)
