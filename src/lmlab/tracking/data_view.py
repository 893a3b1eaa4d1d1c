"""The data report and the mask preview as one typed view, for the terminal, report.html and W&B alike.

Both come out of a run's files, so they may be old, torn or of another version: what is absent or of the wrong kind is
left out and never raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from lmlab.tracking.plots import number
from lmlab.tracking.values import flatten, shown

MANY_TRUNCATED = 0.05
"""Share of the kept records from which cutting them is worth a warning."""
FEW_TRAINED = 0.01
"""Share of trained tokens below which a mask is more likely wrong than meant."""
OPEN, CLOSE = "⟦", "⟧"
# Shown in a form of their own instead of as rows of the table.
_NOT_ROWS = ("length_histogram", "longest", "shortest", "dropped_examples", "sources")


@dataclass(frozen=True)
class Dropped:
    """Records left out for one reason; ``where`` and ``detail`` are those of the first, empty if not known."""

    reason: str
    count: int
    where: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Lengths:
    """Tokens per document: ``counts[i]`` documents are from ``edges[i]`` up to below ``edges[i + 1]`` tokens long."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    median: float | None


@dataclass(frozen=True)
class Extreme:
    """The longest or the shortest document, with the beginning of its text."""

    name: str
    where: str
    tokens: int
    text: str


@dataclass(frozen=True)
class Shown:
    """An example of the mask preview; ``spans`` are (text, whether it is trained) in order."""

    where: str
    tokens: int
    supervised_tokens: int
    truncated: bool
    spans: tuple[tuple[str, bool], ...]

    @property
    def about(self) -> str:
        """What the numbers say, in a few words."""
        share = f" ({self.supervised_tokens / self.tokens:.0%})" if self.tokens else ""
        cut = ", truncated" if self.truncated else ""
        return f"{self.tokens:,} tokens, {self.supervised_tokens:,} trained{share}{cut}"

    @property
    def merged(self) -> list[tuple[str, bool]]:
        """The spans, with neighbours of one kind as one: EOS, a span of its own, joins what it ends."""
        groups = groupby(self.spans, key=lambda span: span[1])
        return [("".join(text for text, _ in group), trained) for trained, group in groups]

    @property
    def marked(self) -> str:
        """The text with its trained spans between ⟦ and ⟧."""
        return "".join(f"{OPEN}{text}{CLOSE}" if trained else text for text, trained in self.merged)


@dataclass(frozen=True)
class DataView:
    """What is known about a run's data. A count that the report lacks is None.

    Attributes:
        rows: (name, value, share) of everything counted, as a table.
        figures: the same as numbers, one level, names joined by ``/``.
        dropped: by reason, the most frequent first.
        dropped_examples: single records that were dropped.
        sources: of a mix, a mapping for each.
    """

    rows: tuple[tuple[str, str, str], ...]
    figures: dict[str, float]
    dropped: tuple[Dropped, ...]
    dropped_examples: tuple[Dropped, ...]
    lengths: Lengths | None
    extremes: tuple[Extreme, ...]
    sources: tuple[Mapping[str, Any], ...]
    examples: tuple[Shown, ...]

    @classmethod
    def of(cls, report: Mapping[str, Any], examples: Any) -> DataView:
        """From data_report.json's object and mask_preview.json's list."""
        singles = tuple(_dropped(row) for row in _mappings(report.get("dropped_examples")))
        reasons = _mapping(report.get("records_dropped"))
        first = {single.reason: single for single in reversed(singles)}
        unknown = Dropped("", 0)
        counts = {str(reason): count for reason, value in reasons.items() if (count := _whole(value))}
        return cls(
            rows=tuple(_rows(report)),
            figures=_figures(report),
            dropped=tuple(
                Dropped(
                    reason, count, first.get(reason, unknown).where, first.get(reason, unknown).detail
                )
                for reason, count in sorted(counts.items(), key=lambda item: -item[1])
            ),
            dropped_examples=singles,
            lengths=_lengths(report),
            extremes=tuple(
                Extreme(name, str(row.get("where", "")), _whole(row.get("tokens")) or 0, str(row.get("text", "")))
                for name in ("longest", "shortest")
                if (row := _mapping(report.get(name)))
            ),
            sources=tuple(_mappings(report.get("sources"))),
            examples=tuple(_shown(row) for row in _mappings(examples)),
        )  # fmt: skip

    @property
    def total_dropped(self) -> int:
        """Records dropped, for whatever reason."""
        return sum(each.count for each in self.dropped)

    @property
    def source_columns(self) -> list[str]:
        """What is known of the sources besides their names; nested values are left to the file."""
        names = (name for source in self.sources for name in source if name != "name")
        plain = (
            name for name in names if all(not isinstance(s.get(name), (dict, list)) for s in self.sources)
        )
        return list(dict.fromkeys(plain))

    def count(self, name: str) -> int | None:
        """A whole number of the report by its name, such as ``records_read``."""
        value = self.figures.get(name)
        return None if value is None else int(value)

    def share(self, part: str, whole: str) -> float | None:
        """One figure over another; None if either is absent or there is nothing to divide by."""
        above, below = self.figures.get(part), self.figures.get(whole)
        return above / below if above is not None and below else None

    def warnings(self, *, masked: bool) -> list[str]:
        """What is allowed and probably not meant.

        Args:
            masked: whether this run's data has a part that is not to be trained (records with a response).
        """
        found = []
        truncated = self.share("records_truncated", "records_kept") or 0.0
        if truncated > MANY_TRUNCATED:
            found.append(f"{truncated:.1%} of the records are cut to fit: raise data.max_length, or leave them out "
                         "by data.too_long=drop")  # fmt: skip
        trained = self.share("supervised_tokens", "tokens")
        if trained is not None and trained < FEW_TRAINED:
            found.append(
                f"only {trained:.2%} of the tokens are trained: look whether the trained spans are the ones you mean"
            )
        # The first token of a document of its own is never trained, as nothing stands before it.
        tokens, kept = self.count("tokens"), self.count("records_kept") or 0
        if (
            masked
            and trained is not None
            and tokens
            and (self.count("supervised_tokens") or 0) >= tokens - kept
        ):
            found.append("every token is trained, nothing is masked: prompts too, if the records have any "
                         "(look at data.format and data.columns)")  # fmt: skip
        return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> Sequence[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _dropped(row: Mapping[str, Any]) -> Dropped:
    return Dropped(str(row.get("reason", "")), 1, str(row.get("where", "")), str(row.get("detail") or ""))


def _shown(row: Mapping[str, Any]) -> Shown:
    spans = row.get("spans")
    pairs = [span for span in spans if isinstance(span, list) and len(span) == 2] if isinstance(spans, list) else []  # fmt: skip
    return Shown(
        str(row.get("where", "")),
        _whole(row.get("tokens")) or 0,
        _whole(row.get("supervised_tokens")) or 0,
        row.get("truncated") is True,
        tuple((str(text), trained is True) for text, trained in pairs),
    )


def _lengths(report: Mapping[str, Any]) -> Lengths | None:
    histogram = _mapping(report.get("length_histogram"))
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 > 1):
        return None
    places = [place for value in edges if (place := _whole(value)) is not None]
    amounts = [amount for value in counts if (amount := _whole(value)) is not None and amount >= 0]
    rising = all(low < high for low, high in pairwise(places))
    if (len(places), len(amounts)) != (len(edges), len(counts)) or not rising or not sum(amounts):
        return None
    median = number(_mapping(report.get("tokens_per_record")).get("median"))
    return Lengths(
        tuple(places),
        tuple(amounts),
        median if median is not None and places[0] <= median <= places[-1] else None,
    )


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in flatten({k: v for k, v in report.items() if k not in _NOT_ROWS}).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            amount = number(value)
            if amount is not None and math.isfinite(amount):
                found[name] = value
    return found


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and, for counts, their share of the records read or kept, or of the tokens."""
    wholes = {
        "records_kept": ("records_read", "those read"),
        "records_dropped": ("records_read", "those read"),
        "records_truncated": ("records_kept", "those kept"),
        "supervised_tokens": ("tokens", "the tokens"),
    }
    rows = []
    for name, value in flatten({k: v for k, v in report.items() if k not in _NOT_ROWS}).items():
        whole, of = wholes.get(name.partition("/")[0], ("", ""))
        below = number(report.get(whole, "")) or math.nan
        ratio = (number(value) or 0.0) / below if isinstance(value, int) else math.nan
        share = f"{ratio:.1%} of {of}" if math.isfinite(ratio) else ""
        rows.append((name.replace("records_dropped/", "records_dropped: "), shown(value), share))
    return rows
