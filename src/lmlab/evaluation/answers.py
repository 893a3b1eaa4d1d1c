"""Answers a model writes to questions with a reference, and how near they come: exact match and ROUGE."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmlab.evaluation.text import make_exact_match, make_rouge
from lmlab.generation.samplers import SamplerConfig
from lmlab.generation.text import TextGenerator


@dataclass(frozen=True)
class Question:
    """A prompt as the model is given it, the right answer, and where both stand."""

    where: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class Answers:
    """What was written and its scores.

    Attributes:
        scores: exact_match, rouge1, rouge2, rougeL (F-measures), each in [0, 1], means over questions.
        rows: per question its place, prompt, reference, text, new_tokens, stop_reason, seed and own scores.
        seconds: generation took.
    """

    scores: dict[str, float]
    rows: list[dict[str, Any]]
    seconds: float

    def figures(self) -> dict[str, float | int]:
        """Scores, how many answers they are of, and the speed."""
        tokens = sum(row["new_tokens"] for row in self.rows)
        return {
            **self.scores,
            "answers": len(self.rows),
            "new_tokens": tokens,
            "new_tokens_per_second": tokens / max(1e-9, self.seconds),
        }


def answer(
    generator: TextGenerator, questions: Sequence[Question], *, sampler: SamplerConfig, seed: int
) -> Answers:
    """Generate for every question, batched, question i drawn from ``seed + i``, and score.

    Raises:
        UserError: a prompt fills the model's context.
    """
    started = time.monotonic()
    seeds = [seed + index for index in range(len(questions))]
    texts = generator([question.prompt for question in questions], sampler=sampler, seeds=seeds)
    seconds = time.monotonic() - started
    metrics = [make_exact_match(), make_rouge()]
    rows = []
    for question, text, drawn_from in zip(questions, texts, seeds, strict=True):
        own: dict[str, float] = {}
        for metric in metrics:
            own |= _named(metric(([text.text]), [question.reference]))
        row = {**asdict(question), "text": text.text, "new_tokens": text.new_tokens}
        rows.append({**row, "stop_reason": text.stop_reason, "seed": drawn_from, **own})
    scores: dict[str, float] = {}
    for metric in metrics:
        scores |= _named(metric.compute())
    return Answers(scores, rows, seconds)


def _named(value: Any) -> dict[str, float]:
    """A metric's value by name: ROUGE's is a dictionary, exact match's one number."""
    if isinstance(value, dict):
        return {name: float(each) for name, each in value.items()}
    return {"exact_match": float(value)}
