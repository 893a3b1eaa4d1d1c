"""The sample grid for reading: the rows of each prompt, their figures, and word by word what has changed since the step before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import SequenceMatcher
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from lmlab.records import Sample
from lmlab.tracking.values import shown

EARLIER_STEPS = 24
"""Earlier sampling steps shown per prompt; of more, some are left out evenly, and the page says so."""

SAMPLE_KEYS = {field.name for field in fields(Sample)}
SHOWN_FIGURES = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "seq_rep_4": "seq-rep-4",
    "mean_entropy": "entropy",
    "similarity": "similarity",
}

Pair = tuple[Mapping[str, Any], Mapping[str, Any] | None]
"""A row of samples.jsonl, and the one before it of the same prompt and sampler."""
Change = tuple[Literal["same", "gone", "new"], str]
PIECE = re.compile(r"^\s+|(?:\w+|[^\w\s])\s*")
"""A word or a mark with the white space after it."""
LONGEST = 20_000
"""Characters of two texts together, beyond which their differences are not shown."""
MOST_WORK = 20_000_000
"""Bound on the steps of one comparison of two texts, one to two seconds: see `alignment`."""


def sample_groups(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples by prompt: the rows of the newest step, and those of the earlier steps, newest first.

    Each row has its figures (``figures``) and how its text differs from the one before it (``against``, ``changes``).
    """
    by_prompt: dict[tuple[str, str], list[Pair]] = {}
    before: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in samples:
        prompt = (str(row.get("prompt_id", "")), str(row.get("prompt", "")))
        place = (*prompt, str(row.get("sampler", "")))
        by_prompt.setdefault(prompt, []).append((row, before.get(place)))
        before[place] = row

    def of_step(pairs: Sequence[Pair], step: int) -> list[dict[str, Any]]:
        return [
            {**row, **_against(last, row), "figures": sample_figures(row)}
            for row, last in pairs
            if row["step"] == step
        ]

    groups = []
    for (prompt_id, prompt), pairs in by_prompt.items():
        steps = sorted({row["step"] for row, _ in pairs}, reverse=True)
        earlier = steps[1:]
        if len(earlier) > EARLIER_STEPS:
            stride = (len(earlier) - 1) / (EARLIER_STEPS - 1)
            earlier = [earlier[round(place * stride)] for place in range(EARLIER_STEPS)]
        groups.append({
            "id": prompt_id, "prompt": prompt, "step": steps[0], "left_out": len(steps) - 1 - len(earlier),
            "newest": of_step(pairs, steps[0]),
            "earlier": [row for step in earlier for row in of_step(pairs, step)], "earlier_steps": earlier,
        })  # fmt: skip
    return groups


def _against(last: Mapping[str, Any] | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """The step a sample is compared with, and the changes since; None of both at the first, or of what is no text."""
    if last is None or not (isinstance(last.get("text"), str) and isinstance(row.get("text"), str)):
        return {"against": None, "changes": None}
    return {"against": last["step"], "changes": word_diff(last["text"], row["text"])}


def sample_figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured of a sample or noted by a plugin, as name and value; what could not be measured is left out."""
    extra = row["extra"] if isinstance(row.get("extra"), Mapping) else {}  # as runs of before had it
    found = {**extra, **{name: value for name, value in row.items() if name not in SAMPLE_KEYS}}
    pairs = [(SHOWN_FIGURES.get(str(name), str(name)), name, value) for name, value in found.items()]
    return [
        (label, f"{shown(value)} nats" if name == "mean_entropy" else shown(value))
        for label, name, value in pairs
        if value is not None
    ]


def alignment(earlier: Sequence[str], words: Sequence[str]) -> SequenceMatcher[str] | None:
    """The words that two texts share in order (Ratcliff and Obershelp).

    Returns:
        None where it could take too long: one pass costs as many steps as there are pairs of equal words, of a text
        that repeats itself words x words, and there are up to as many passes as words.
    """
    before, after = Counter(earlier), Counter(words)
    pairs = sum(count * after[word] for word, count in before.items())
    if pairs * min(len(earlier), len(words)) > MOST_WORK:
        return None
    return SequenceMatcher(None, earlier, words, autojunk=False)


def word_diff(earlier: str, text: str) -> list[Change] | None:
    """The way from ``earlier`` to ``text``; all but ``gone`` joined is ``text``, all but ``new`` is ``earlier``.

    White space belongs to the word before it, so that a phrase written anew is one change.

    Returns:
        None of texts too long, or too repetitive, to be compared.
    """
    if len(earlier) + len(text) > LONGEST:
        return None
    old, new = PIECE.findall(earlier), PIECE.findall(text)
    aligned = alignment([piece.rstrip() for piece in old], [piece.rstrip() for piece in new])
    if aligned is None:
        return None
    changes: list[Change] = []
    gone = came = ""
    for kind, a, b, c, d in aligned.get_opcodes():
        if kind != "equal":
            gone, came = gone + "".join(old[a:b]), came + "".join(new[c:d])
            continue
        for before, after in zip(old[a:b], new[c:d], strict=True):
            changes += _change(gone, came)
            stays = before if before == after else before.rstrip()
            changes.append(("same", stays))
            gone, came = before[len(stays) :], after[len(stays) :]
    return _joined(changes + _change(gone, came))


def _joined(changes: Iterable[Change]) -> list[Change]:
    """Neighbours of one kind as one, none of them empty."""
    parts = (
        (kind, "".join(text for _, text in group)) for kind, group in groupby(changes, key=itemgetter(0))
    )
    return [(kind, text) for kind, text in parts if text]


def _change(gone: str, came: str) -> list[Change]:
    """A change, with the white space that ends both sides as what stays."""
    stays = ""
    while gone and came and gone[-1] == came[-1] and gone[-1].isspace():
        gone, came, stays = gone[:-1], came[:-1], gone[-1] + stays
    parts: list[Change] = [("gone", gone), ("new", came), ("same", stays)]
    return [part for part in parts if part[1]]
