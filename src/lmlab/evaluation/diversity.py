"""Figures of one generated text that need no reference: how varied it is, how much it repeats, how it has changed.

All count words (runs of letters and digits; every other mark but white space is one of its own), not tokens, so that
texts of models with different tokenizers can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmlab.tracking.sample_view import alignment

WORD = re.compile(r"\w+|[^\w\s]")
REPEATED_NGRAM = 4
"""The n of seq-rep-n that Welleck et al. report."""


def words(text: str) -> list[str]:
    """``text`` in words and marks, without white space."""
    return WORD.findall(text)


def distinct(units: Sequence[str], n: int) -> float | None:
    """distinct-n: different n-grams over all n-grams (Li et al. 2016, arXiv:1510.03055), in (0, 1].

    None of a text with fewer than ``n`` units. It falls with length by itself: compare texts that are about as long.
    """
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(units: Sequence[str], n: int = REPEATED_NGRAM) -> float | None:
    """seq-rep-n: 1 - distinct-n, the share of n-grams seen before (Welleck et al. 2019, arXiv:1908.04319), in [0, 1)."""
    share = distinct(units, n)
    return None if share is None else 1 - share


def similarity(text: str, earlier: str) -> float | None:
    """2 M / T over words, M of them matched in order among the T of both texts (Ratcliff and Obershelp), in [0, 1].

    Two texts without a word are equal: 1. None of texts too long, or too repetitive, to be compared.
    """
    aligned = alignment(words(earlier), words(text))
    return None if aligned is None else aligned.ratio()


def text_figures(text: str, *, earlier: str | None, mean_entropy: float | None) -> dict[str, float | None]:
    """The figures of a sample, under the names of `lmlab.records.SAMPLE_FIGURES`.

    Args:
        earlier: what the same prompt and sampler gave at the step before, None at the first.
        mean_entropy: of the model's distributions while it wrote, nats; None if unknown. Four decimals are kept, as the
            last bits are those of the hardware.
    """
    units = words(text)
    return {
        "distinct_1": distinct(units, 1),
        "distinct_2": distinct(units, 2),
        "seq_rep_4": repetition(units),
        "mean_entropy": None if mean_entropy is None else round(mean_entropy, 4),
        "similarity": None if earlier is None else similarity(text, earlier),
    }
