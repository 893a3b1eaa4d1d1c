"""What a tokenizer's tokens are as text: the bytes of each, and the tokens that continue a text by another."""

from __future__ import annotations

import functools
import re
from typing import Any

from lmlab.records import UserError

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""The name of a byte token of sentencepiece's kind."""


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: Any) -> tuple[bytes, ...]:
    """The bytes that each token adds to a text, by id; b"" for special tokens, which are no text.

    Of byte-level BPE by its alphabet of 256 characters, of every other by what its decoder makes of the token behind a
    letter (so that a leading blank shows). It is read once per tokenizer.

    Raises:
        UserError: the tokenizer is written in Python, and what its tokens stand for cannot be read from it.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__} does not say what its tokens stand for",
            where="sampler",
            fix="use a tokenizer with a tokenizer.json (a fast one), or a sampler without bad_words and begins_with",
        )
    special = special_tokens(tokenizer)
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    byte_level = "ByteLevel" in repr(backend.decoder)

    def content(token: int) -> bytes:
        name = tokenizer.convert_ids_to_tokens(token)
        if name is None or name in special:
            return b""
        if byte_level:
            known = all(character in alphabet for character in name)  # a token added later is its own text
            return bytes(alphabet[character] for character in name) if known else name.encode()
        if byte := BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        text = " ".join(("a", name)) if backend.decoder is None else backend.decoder.decode(["a", name])
        return text[1:].encode()

    return tuple(content(token) for token in range(len(tokenizer)))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Name -> id of the tokens that a decoded text leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: int(i) for i, token in added.items() if token.special}


def is_byte(tokenizer: Any, token: int) -> bool:
    """Whether the token is a single byte of sentencepiece's kind, whose text may change with the bytes after it."""
    name = tokenizer.convert_ids_to_tokens(token)
    return isinstance(name, str) and BYTE.fullmatch(name) is not None


def continuation(tokenizer: Any, text: str) -> list[int]:
    """The usual tokens of ``text`` as the continuation of another text: no BOS, and no blank that is not in it.

    Raises:
        UserError: the tokenizer has no tokens for it.
    """
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    for before in ("\n", ".", "a"):  # encoded alone, a text may get a blank put before it
        base = tokenizer.encode(before, add_special_tokens=False)
        joined = tokenizer.encode(before + text, add_special_tokens=False)
        if joined[: len(base)] == base and len(joined) > len(base):
            found = joined[len(base) :]
            break
    pieces, names = token_bytes(tokenizer), {i: name for name, i in special_tokens(tokenizer).items()}
    written = b"".join(names[i].encode() if i in names else pieces[i] for i in found)
    if written != text.encode():
        raise UserError(
            f"the tokenizer writes {text!r} as {written.decode(errors='replace')!r}",
            where="sampler.begins_with",
            fix="use characters that it has",
        )
    return found
