"""Metrics of generated text against references; each a config class that builds a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lmlab.registry import Config, metrics

if TYPE_CHECKING:
    from torchmetrics import Metric


class MetricConfig(Config):
    """A metric over (generated text, reference) pairs of validation records.

    Attributes:
        max_examples: how many validation records are generated for, the first ones.
        max_new_tokens: at most that long.
    """

    kind: str
    max_examples: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)

    def build(self) -> Metric:
        """A torchmetrics metric with ``update(texts, references)``, exact over ranks.

        Its ``compute()`` is one number, logged as ``val/<name>``, or a dictionary of them, logged as ``val/<key>``.
        """
        raise NotImplementedError


@metrics.register
class ExactMatchConfig(MetricConfig):
    """Share of texts equal to their reference, surrounding blanks aside."""

    kind: Literal["exact_match"]

    def build(self) -> Metric:
        return make_exact_match()


@metrics.register
class RougeConfig(MetricConfig):
    """ROUGE-1, ROUGE-2 and ROUGE-L: F-measures of common words, pairs of words and longest common subsequence.

    Lin 2004 (aclanthology.org/W04-1013), over lower-case words without stemming, as torchmetrics and Google's rouge-score
    have it; means over the texts.
    """

    kind: Literal["rouge"]

    def build(self) -> Metric:
        return make_rouge()


ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")
"""rougeLsum is left out: it cuts sentences with a model that nltk would download."""


def make_rouge() -> Any:
    """A torchmetrics metric: ``update(texts, references)``; ``compute()`` gives F-measures in [0, 1] by `ROUGE_KEYS`."""
    import torch
    from torchmetrics import Metric
    from torchmetrics.functional.text import rouge_score

    class Rouge(Metric):
        """Sums F-measures and cases over ranks: torchmetrics' own class keeps lists, which ranks of unequal share cannot gather."""

        full_state_update = False
        totals: torch.Tensor
        cases: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            zeros = torch.zeros(len(ROUGE_KEYS), dtype=torch.float64)
            self.add_state("totals", zeros, dist_reduce_fx="sum")
            self.add_state("cases", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
            for text, reference in zip(texts, references, strict=True):
                found = rouge_score(text, reference, rouge_keys=ROUGE_KEYS)
                own = torch.stack([found[f"{key}_fmeasure"] for key in ROUGE_KEYS])
                self.totals += own.to(self.totals)
                self.cases += 1

        def compute(self) -> dict[str, torch.Tensor]:
            means = self.totals / self.cases.clamp(min=1)
            return dict(zip(ROUGE_KEYS, means, strict=True))

    return Rouge()


def make_exact_match() -> Any:
    """A torchmetrics metric: ``update(texts, references)``, ``compute()`` in [0, 1] over all ranks."""
    import torch
    from torchmetrics import Metric

    class ExactMatch(Metric):
        """Counts hits and cases; both are summed over ranks."""

        full_state_update = False
        hits: torch.Tensor
        cases: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state("cases", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, texts: Sequence[str], references: Sequence[str]) -> None:
            self.hits += sum(
                text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)
            )
            self.cases += len(references)

        def compute(self) -> torch.Tensor:
            return self.hits / self.cases.clamp(min=1)

    return ExactMatch()
