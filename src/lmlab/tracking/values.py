"""Values and texts of a run's files as people read them: JSON flattened, numbers short, odd characters made visible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmlab.tracking.plots import short

# Text may hold any character. Those that are invisible or not allowed in HTML are shown as pictures or escapes; so are
# those that reorder the text around them, and what a terminal would obey (ESC, the C1 controls).
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_ESCAPES = {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_VISIBLE: dict[int, int | str] = {**_PICTURES, **_ESCAPES}
_PLAIN: dict[int, int | str] = {**{code: f"\\x{code:02x}" for code in _PICTURES}, **_ESCAPES}


def visible(text: Any) -> str:
    """Text with its control characters made visible (``␛``, ``\\\\u202e``); line breaks and tabs stay."""
    return str(text).translate(_VISIBLE)


def writable(text: str, encoding: str) -> str:
    """`visible` for a stream of that encoding: what it cannot carry comes out as an escape (``\\\\u2603``)."""
    try:
        return visible(text).encode(encoding).decode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level with ``/`` between the names; lists of plain values become one text."""
    if isinstance(value, (Mapping, list)) and not value and prefix:
        return {prefix[:-1]: "none"}
    if isinstance(value, Mapping):
        return {k: v for name, part in value.items() for k, v in flatten(part, f"{prefix}{name}/").items()}
    if isinstance(value, list) and any(isinstance(part, (Mapping, list)) for part in value):
        return {
            k: v for place, part in enumerate(value) for k, v in flatten(part, f"{prefix}{place}/").items()
        }
    return {prefix[:-1]: " ".join(map(str, value)) if isinstance(value, list) else value}


def shown(value: Any) -> str:
    """A JSON value as a table cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return short(value) if isinstance(value, (int, float)) else str(value)


def as_written(value: Any) -> str:
    """A value for looking up and copying: a seed or hash must not be rounded or grouped."""
    return "–" if value is None or value == "" else shown(value) if isinstance(value, bool) else str(value)


def counted(amount: int, what: str) -> str:
    """``1 record``, ``2 records``."""
    return f"{amount:,} {what}{'' if amount == 1 else 's'}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def aligned(value: float) -> str:
    """A measured value for a column: always four digits, so that the eye can compare them."""
    return f"{value:#.4g}" if abs(value) < 1000 else short(value)


def scaled(value: float) -> str:
    """A large amount with the letter of its size: ``568 G``, ``1.2 M``."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return short(float(f"{value:.3g}"))
