"""What is counted while a data set is encoded: the data report, the examples a person is shown, prompts for samples.

Nothing here grows with the data but one number per document (its length).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmlab.data.encoding import EncodedDocument
from lmlab.data.files import Intake
from lmlab.data.preview import previewed
from lmlab.data.split import SIDES

MAX_VAL_PROMPTS = 512
MAX_BINS = 40
CLIP = 200


@dataclass
class Side:
    """Totals of one side; lengths in tokens."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    supervised_tokens: int = 0
    supervised_bytes: int = 0

    def report(self) -> dict[str, int]:
        return {
            "records": len(self.lengths),
            "tokens": sum(self.lengths),
            "supervised_tokens": self.supervised_tokens,
            "supervised_bytes": self.supervised_bytes,
        }


class Tally:
    """Counts of one source.

    Args:
        intake: what was read and dropped; lives on with the reader.
    """

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.sides = {side: Side() for side in SIDES}
        self._first: list[dict[str, Any]] = []
        self._extremes: dict[str, tuple[int, dict[str, Any]]] = {}
        self._prompts: list[dict[str, str]] = []
        self._only_text = ""

    def add(
        self,
        side: str,
        encoded: EncodedDocument,
        where: str,
        *,
        tokens: int | None = None,
        supervised: int | None = None,
        supervised_bytes: int | None = None,
    ) -> None:
        """One document; the numbers are given where ``encoded`` is only the beginning of it."""
        about = self.sides[side]
        length = len(encoded.ids) if tokens is None else tokens
        trained = int(encoded.trained.sum()) if supervised is None else supervised
        about.lengths.append(length)
        about.supervised_tokens += trained
        about.supervised_bytes += encoded.trained_bytes if supervised_bytes is None else supervised_bytes

        def shown() -> dict[str, Any]:
            return {**previewed(encoded, where), "tokens": length, "supervised_tokens": trained}

        if side == "train" and len(self._first) < 5:
            self._first.append(shown())
        for name, sign in (("longest", 1), ("shortest", -1)):
            if name not in self._extremes or sign * length > sign * self._extremes[name][0]:
                self._extremes[name] = (length, shown())
        if side == "val" and len(self._prompts) < MAX_VAL_PROMPTS:
            self._remember_prompt(encoded)

    def _remember_prompt(self, encoded: EncodedDocument) -> None:
        document = encoded.document
        text = "".join(segment.text for segment in document.segments)
        if not self._prompts:
            self._only_text = text
        if document.prompt:
            self._prompts.append({"prompt": document.prompt, "response": document.response or ""})
        elif prompt := _beginning(text):
            self._prompts.append({"prompt": prompt, "response": ""})

    def examples(self) -> list[dict[str, Any]]:
        """The first training documents, the longest and the shortest, each once."""
        ends = [example for _, example in self._extremes.values()]
        chosen = {example["where"]: example for example in [*self._first[:3], *ends, *self._first[3:]]}
        return list(chosen.values())[:5]

    def val_prompts(self) -> list[dict[str, str]]:
        """Prompts for samples and metrics: of validation records, or the first words of evenly spaced pieces of a single text."""
        if len(self.sides["val"].lengths) > 1 or not self._prompts or self._prompts[0]["response"]:
            return self._prompts
        text = self._only_text
        step = max(80, len(text) // 16)
        pieces = [_beginning(text[start:].lstrip()) for start in range(0, max(1, len(text) - 80), step)]
        return [{"prompt": piece, "response": ""} for piece in pieces if piece]

    def report(self) -> dict[str, Any]:
        """The data report (data_report.json) as far as the encoded documents tell it."""
        intake = self.intake
        lengths = np.concatenate([np.asarray(side.lengths, np.int64) for side in self.sides.values()])
        return {
            "records_read": intake.read,
            "records_kept": intake.kept,
            "records_dropped": dict(intake.dropped),
            "dropped_examples": list(intake.dropped_examples),
            "records_truncated": intake.truncated,
            "tokens": int(lengths.sum()),
            "supervised_tokens": sum(side.supervised_tokens for side in self.sides.values()),
            **length_figures(lengths),
            **{name: _extreme(length, example) for name, (length, example) in self._extremes.items()},
            **{name: side.report() for name, side in self.sides.items() if name != "test" or side.lengths},
        }


def length_figures(lengths: np.ndarray) -> dict[str, Any]:
    """``tokens_per_record`` and ``length_histogram`` (at most `MAX_BINS` equal bins with whole-numbered edges)."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    width = -(-(high - low) // MAX_BINS)
    edges = np.arange(low, high + width, width)
    return {
        "tokens_per_record": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "shortest": low,
            "longest": high - 1,
        },
        "length_histogram": {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()},
    }


def _beginning(text: str) -> str:
    """The first words of a text, as a prompt; empty where there is none."""
    words = text[:60].rsplit(" ", 1)[0]
    return words if words.strip() else ""


def _extreme(length: int, example: dict[str, Any]) -> dict[str, Any]:
    text = "".join(span[0] for span in example["spans"])
    return {
        "where": example["where"],
        "tokens": length,
        "text": text if len(text) <= CLIP else text[: CLIP - 1] + "…",
    }
