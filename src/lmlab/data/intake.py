"""The counting of what a source delivers and of what cannot be used of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lmlab.records import UserError

MAX_EXAMPLES = 20
MAX_DETAIL = 200


@dataclass
class Intake:
    """Counts what a source delivered; ``read == kept + sum(dropped.values())`` holds at any time.

    Args:
        on_bad_record: ``error`` stops at the first bad record, ``skip`` counts it and goes on.

    Attributes:
        dropped: reason -> how many.
        dropped_examples: the first twenty dropped records as ``{reason, where, detail}``, for the data report.
    """

    on_bad_record: str
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    dropped_examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Records that were not dropped."""
        return self.read - self.dropped.total()

    @property
    def wants_places(self) -> bool:
        """Whether the place of the next bad record will be told or kept, and not only counted."""
        return self.on_bad_record == "error" or len(self.dropped_examples) < MAX_EXAMPLES

    def bad(self, reason: str, *, where: str, detail: str = "") -> None:
        """A record that cannot be used, for ``reason`` (a short phrase, the key in the report).

        Raises:
            UserError: under ``on_bad_record=error``.
        """
        if self.on_bad_record == "error":
            what = f"{reason}: {detail}" if detail else reason
            raise UserError(
                what, where=where, fix="mend it, or count and skip such records by data.on_bad_record=skip"
            )
        self.drop(reason, where=where, detail=detail)

    def drop(self, reason: str, *, where: str, detail: str = "") -> None:
        """A record that is left out on purpose, as the length policy says: counted, and never an error."""
        self.dropped[reason] += 1
        if len(self.dropped_examples) < MAX_EXAMPLES:
            self.dropped_examples.append({"reason": reason, "where": where, "detail": detail[:MAX_DETAIL]})
