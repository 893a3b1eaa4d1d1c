"""From a batch to the logits of its supervised positions, and to the loss as (sum, count).

Only supervised positions go through the output head: the model's own ``logits_to_keep`` does it with every scale,
cap and bias of its architecture. The loss is a plain sum in fp32; who divides by how many tokens is decided over
the whole optimizer step (training/modules.py), never here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from lmlab.models.attention import document_groups
from lmlab.records import PackedBatch
from lmlab.registry import Config, losses


class LossConfig(Config):
    """What is minimised."""

    kind: str

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of the losses of ``logits`` ``[n, vocab]`` (fp32) against ``labels`` ``[n]``; a scalar."""
        raise NotImplementedError


@losses.register
class CrossEntropy(LossConfig):
    """Negative log-likelihood.

    Attributes:
        label_smoothing: share of the target spread evenly over the vocabulary.
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5); 0 leaves it out.
    """

    kind: Literal["cross_entropy"]
    label_smoothing: float = Field(ge=0, lt=1)
    z_loss: float = Field(ge=0)

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().sum()
        return loss


class Supervised(NamedTuple):
    """``logits`` fp32 ``[n, vocab]`` and ``labels`` int64 ``[n]`` of a batch's n supervised positions."""

    logits: torch.Tensor
    labels: torch.Tensor


def supervised_logits(model: torch.nn.Module | Any, batch: PackedBatch) -> Supervised:
    """One forward pass over a batch, head only where a label is trained."""
    labels = batch.labels.flatten()[batch.supervised_index]
    if batch.cu_seqlens is None:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        return Supervised(_kept(logits, batch.supervised_index).float(), labels)
    documents = document_groups(batch.cu_seqlens, batch.input_ids.device)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.supervised_index,
        lmlab_documents=documents,
    )
    return Supervised(_kept(output.logits[0], batch.supervised_index).float(), labels)


def _kept(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of ``index``; all of ``logits`` where the model's head has already left out the others."""
    return logits if len(logits) == len(index) else logits[index]
