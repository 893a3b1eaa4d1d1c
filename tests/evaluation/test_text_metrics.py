"""Metrics of generated texts, against Google's rouge-score, and sums that do not depend on who measured what."""

from __future__ import annotations

import pytest
import torch

from lmlab.evaluation.text import ROUGE_KEYS, make_exact_match, make_rouge

PAIRS = [
    ("The cat sat on the mat.", "the cat lay on a mat"),
    ("", "something"),
    ("identical words", "identical words"),
    ("one two three four", "four three two one"),
    ("a b c d e f g", "a x b y c z d"),
    ("Straße 12, Köln", "Strasse 12 in Köln"),
]
ABSOLUTE = 1e-6  # F-measures are fp32 in torchmetrics


@pytest.mark.parity
def test_against_rouge_score_f_measures() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is absent").RougeScorer(
        ROUGE_KEYS
    )
    metric = make_rouge()
    metric.update(*zip(*PAIRS, strict=True))
    expected = [scorer.score(reference, text) for text, reference in PAIRS]
    for key, value in metric.compute().items():
        mean = sum(each[key].fmeasure for each in expected) / len(PAIRS)
        assert float(value) == pytest.approx(mean, abs=ABSOLUTE), key


@pytest.mark.parametrize("make", [make_rouge, make_exact_match])
def test_parts_of_unequal_size_give_the_whole(make) -> None:
    """What ranks add up, whatever each had: here one with a single pair and one with none."""
    whole, parts = make(), [make() for _ in range(3)]
    whole.update(*zip(*PAIRS, strict=True))
    parts[0].update(*zip(*PAIRS[:1], strict=True))
    parts[1].update(*zip(*PAIRS[1:], strict=True))
    parts[2].update([], [])
    summed = make()
    for name in summed._defaults:
        setattr(summed, name, torch.stack([getattr(part, name) for part in parts]).sum(0))
    summed._update_count = 1
    assert torch.as_tensor(list(as_dict(summed.compute()).values())).tolist() == pytest.approx(
        torch.as_tensor(list(as_dict(whole.compute()).values())).tolist()
    )


def as_dict(value):
    return value if isinstance(value, dict) else {"": value}
