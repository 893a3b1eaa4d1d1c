"""How well a model predicts given text: loss, perplexity, bits per byte, each token scored once.

Negative log-likelihood is summed over every supervised token and divided at the end (never a mean of means). Windows are
those of training: a text stream is cut every ``max_length`` tokens, and a token sees what stands before it in its window.
With a ``stride`` below that width windows overlap, and a token sees at least ``max_length - stride`` tokens before it:
transformers' perplexity guide for fixed-length models (huggingface.co/docs/transformers/perplexity), with windows of
``max_length + 1`` tokens there. Smaller strides give lower perplexities at ``max_length / stride`` times the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from lmlab.data.packing import (
    DocumentRows,
    MixedRows,
    StreamRows,
    blank_row,
    collate_flat,
    collate_padded,
    shifted,
)
from lmlab.data.prepared import PreparedData
from lmlab.data.shards import Shards
from lmlab.models.head import loss_sum
from lmlab.modes import evaluating
from lmlab.records import IGNORE_INDEX, Example, PackedBatch, UserError


@dataclass(frozen=True)
class Likelihood:
    """Sums over a data set.

    Attributes:
        nll: negative log-likelihood of all scored tokens, in nats.
        num_tokens: scored, each once.
        num_bytes: UTF-8 bytes of the text they spell; an end-of-text token adds to the nll and not to these.
        num_read: tokens the model read; with a stride more than once each.
        seconds: all of it took.
    """

    nll: float
    num_tokens: int
    num_bytes: int
    num_read: int
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Summed nll in bits over bytes; comparable across tokenizers. None for data without a count of bytes."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else None

    def figures(self) -> dict[str, float | int | None]:
        """By the names of val/ metrics, with what was counted."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "tokens_per_second": self.num_read / max(1e-9, self.seconds),
        }


class StridedRows(Dataset[Example]):
    """Overlapping windows over a stream; each scores the tokens that the one before it did not.

    Args:
        shards: of a stream, whose first token is there to predict from.
        max_length: tokens a window reads.
        stride: how far apart windows begin, 1 to ``max_length``; equal to it they are those of `StreamRows`.
    """

    def __init__(self, shards: Shards, *, max_length: int, stride: int) -> None:
        if not 1 <= stride <= max_length:
            raise UserError(
                f"a stride of {stride} with windows of {max_length} tokens",
                where="--stride",
                fix=f"1 to {max_length}, or other windows by --set data.max_length=N",
            )
        self.shards, self.max_length, self.stride = shards, max_length, stride

    def __len__(self) -> int:
        beyond_first = max(0, self.shards.num_tokens - 1 - self.max_length)
        return 1 + -(-beyond_first // self.stride)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        # Tokens 0..9, width 4, stride 2: windows score 1-4, 5-6, 7-8, 9 and begin to read at 0, 2, 4, 6.
        start = index * self.stride
        end = min(start + self.max_length, self.shards.num_tokens - 1)
        ids, labels = shifted(*self.shards.read(start, end + 1))
        if index:
            labels[: self.max_length - self.stride] = IGNORE_INDEX
        return Example(ids, labels, (len(ids),))


Rows = DocumentRows | StreamRows | MixedRows | StridedRows


def rows_to_score(prepared: PreparedData, *, stride: int | None = None, side: str = "val") -> Rows:
    """The rows of one side as validation has them, or overlapping ones.

    Raises:
        UserError: a stride over records, documents kept apart or a mix, or one out of range.
    """
    rows = prepared.rows(side)
    if stride is None:
        return rows
    if not isinstance(rows, StreamRows) or rows.apart:
        raise UserError(
            "overlapping windows are for a text stream whose documents see one another",
            where="--stride",
            fix="leave it out: every record is scored as a whole",
        )
    return StridedRows(rows.shards, max_length=rows.max_length, stride=stride)


def likelihood(
    model: Any, rows: Rows, *, num_bytes: int, batch_size: int, device: torch.device, flat: bool = False
) -> Likelihood:
    """Score every row once; the model's training flags are put back. Autocast is the caller's.

    Args:
        model: a causal LM, PEFT's around one or not; under packed attention if ``flat``.
        num_bytes: UTF-8 bytes of what is scored.
        batch_size: rows in one forward pass.
        flat: all documents of a batch in one row.

    Raises:
        UserError: no token to score.
    """
    nll, scored, read, started = 0.0, 0, 0, time.monotonic()
    with evaluating(model), torch.no_grad():
        for batch in _batches(rows, batch_size=batch_size, flat=flat):
            if len(batch.supervised_index):
                nll += float(loss_sum(model, batch.to(device)).double())
            scored += len(batch.supervised_index)
            read += batch.num_tokens
    if not scored:
        raise UserError(
            "no token to score",
            where="--data",
            fix="give text of at least one token, or records with a response",
        )
    return Likelihood(nll, scored, num_bytes, read, time.monotonic() - started)


def _batches(rows: Rows, *, batch_size: int, flat: bool) -> Iterator[PackedBatch]:
    order: Sequence[int] = range(len(rows))
    if isinstance(rows, DocumentRows) and not flat:  # neighbours of equal length need no padding
        lengths = rows.shards.lengths()
        order = sorted(order, key=lambda row: -int(sum(lengths[i] for i in rows.rows[row])))
    collate = collate_flat if flat else collate_padded
    for start in range(0, len(order), batch_size):
        yield collate([rows[i] for i in order[start : start + batch_size]] or [blank_row()])
