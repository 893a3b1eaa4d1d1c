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
        """A torchmetrics metric with ``update(texts, references)``, exact over ranks."""
        raise NotImplementedError


@metrics.register
class ExactMatchConfig(MetricConfig):
    """Share of texts equal to their reference, surrounding blanks aside."""

    kind: Literal["exact_match"]

    def build(self) -> Metric:
        return make_exact_match()


def make_exact_match() -> Any:
    """A torchmetrics metric: ``update(texts, references)``, ``compute()`` in [0, 1] over all ranks."""
    import torch
    from torchmetrics import Metric

    class ExactMatch(Metric):
        """Counts hits and cases; both are summed over ranks."""

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
