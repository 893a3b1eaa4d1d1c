"""What the model is trained on, for a person's eye: a few documents with the trained characters marked."""

from __future__ import annotations

from collections.abc import Sequence

from lmlab.data.encoding import EncodedDocument

OPEN, CLOSE = "⟦", "⟧"
MAX_CHARS = 2000


def mask_preview(documents: Sequence[EncodedDocument]) -> str:
    """The documents' texts with the trained spans between ⟦ and ⟧, read off the tokens' own flags."""
    parts = [f"Trained text stands between {OPEN} and {CLOSE}; <EOS> inside the marks is trained too.\n"]
    for number, encoded in enumerate(documents, start=1):
        parts.append(
            f"--- example {number}: {len(encoded.ids)} tokens, {int(encoded.trained.sum())} trained\n{_marked(encoded)}\n"
        )
    return "\n".join(parts)


def _marked(encoded: EncodedDocument) -> str:
    text = "".join(segment.text for segment in encoded.document.segments)
    out, position, inside = [], 0, False
    for (start, end), trained in zip(encoded.offsets, encoded.trained, strict=False):
        if bool(trained) != inside and end > start:
            out += [text[position:start], OPEN if trained else CLOSE]
            position, inside = max(position, start), bool(trained)
    last = max((end for _, end in encoded.offsets[: len(encoded.ids)]), default=0)
    out.append(text[position:last])
    has_eos = len(encoded.ids) > len(encoded.offsets)
    out.append(("<EOS>" if has_eos else "") + (CLOSE if inside else ""))
    marked = "".join(out)
    return (
        marked if len(marked) <= MAX_CHARS else f"{marked[: MAX_CHARS // 2]} ... {marked[-MAX_CHARS // 2 :]}"
    )
