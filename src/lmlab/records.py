"""What passes between lmlab's packages: errors, text segments, encoded examples, batches, samples.

This is the bottom of the import order: every package may import it and it imports none of them.
Conventions fixed here: labels are already shifted (``labels[t]`` is the id that position ``t`` must predict),
and a position that is not trained carries ``IGNORE_INDEX``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
"""Label of a position whose prediction is not trained (the value `torch.nn.functional.cross_entropy` skips)."""


STOPPED_CODES = (130, 138, 143)
"""Exit codes of a run that a signal stopped: Ctrl-C, SLURM's SIGUSR1, SIGTERM."""


OF_A_MULTIRUN = "LMLAB_OF_A_MULTIRUN"
"""Set in the environment of a multirun's jobs."""


class UserError(Exception):
    """Something the user can mend. Shown as one line ``error: what (where): what to do``, exit code 2.

    Args:
        what: what is wrong, with the value that was given.
        where: the key, file:line or directory it concerns.
        fix: what to type or change instead.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what + (f" ({self.where})" if self.where else "") + (f": {self.fix}" if self.fix else "")
        return " ".join(text.split())


class RefusedError(UserError):
    """A combination of options that cannot train; in a multirun a row ``refused: reason``, not a failure."""


class RunFailedError(Exception):
    """A failure while training that lmlab understands, shown as one line; exit code 1.

    Args:
        everywhere: every rank fails alike, so the first one says it for all.
        facts: more of it than fits into a line, for summary.json.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, everywhere: bool = False, facts: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.everywhere, self.facts = everywhere, facts or {}


@dataclass(frozen=True)
class Record:
    """One raw record of a data source, before any format or template.

    Attributes:
        fields: column name -> value, as read.
        where: the place a person would look it up, e.g. ``train.jsonl:17``.
        group: records of one group go to the same split; default is the record's own content.
    """

    fields: dict[str, Any]
    where: str
    group: str | None = None


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, and whether the model is trained to produce it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """A formatted record: its segments in order, and how generation would be asked for the trained part.

    Attributes:
        segments: joined, they are the whole text of the example.
        ends: whether EOS follows (and is trained) after the last segment.
        bos: whether the tokenizer's BOS may be put before; of a conversation the chat template alone is in charge.
        prompt: the text generation starts from; None for plain text.
        response: the reference answer; None for plain text.
    """

    segments: tuple[Segment, ...]
    ends: bool = True
    bos: bool = True
    prompt: str | None = None
    response: str | None = None


@dataclass(frozen=True)
class Example:
    """Token ids of one document or row and, for each position, the id it is trained to predict next.

    Attributes:
        input_ids: int64 ``[length]``.
        labels: int64 ``[length]``; ``labels[t]`` is the token after ``input_ids[t]`` or ``IGNORE_INDEX``.
        lengths: how many tokens each document inside this row has, in order (one entry: not packed).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]


@dataclass
class PackedBatch:
    """What a model is trained on in one forward pass.

    Two layouts share this class. *Flat*: all documents one after another in one row, ``cu_seqlens`` says where
    each starts, no padding anywhere. *Rectangular*: ``cu_seqlens`` is None, rows of equal width, padded at the
    right (causal attention never lets a real position see what is to its right, so no mask is needed).

    Attributes:
        input_ids: int64 ``[rows, width]``.
        labels: int64 ``[rows, width]``, already shifted.
        position_ids: int64 ``[rows, width]``, restarting at 0 with each document; None for plain rows.
        cu_seqlens: int32 ``[documents + 1]``, cumulative lengths, flat layout only.
        supervised_index: int64 ``[n]``, flat positions (row * width + column) whose label is trained.
        num_tokens: real tokens in the batch, padding not counted.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    supervised_index: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device) -> PackedBatch:
        """The batch with every tensor on ``device``, itself if it is there; cu_seqlens stays on the CPU, where lengths are read."""

        if device.type == "cpu" and self.input_ids.device.type == "cpu":
            return self

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return PackedBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=move(self.position_ids),
            cu_seqlens=self.cu_seqlens,
            supervised_index=self.supervised_index.to(device, non_blocking=True),
            num_tokens=self.num_tokens,
        )


SAMPLE_FIGURES = ("distinct_1", "distinct_2", "seq_rep_4", "mean_entropy", "similarity")
"""What is measured of a sample; `similarity` is to the same prompt's and sampler's text at the step before."""


@dataclass(frozen=True)
class Sample:
    """One text generated during or after training; a line of samples.jsonl and a row of the W&B table.

    Attributes:
        extra: what was measured of it (`SAMPLE_FIGURES`; None where there is nothing to measure) or noted by a plugin;
            flat in the line.
    """

    step: int
    prompt_id: int
    prompt: str
    sampler: str
    seed: int
    text: str
    new_tokens: int
    stop_reason: str
    extra: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The sample as plain JSON values, ``extra`` flat among them; a name of its own wins over one there."""
        values = asdict(self)
        extra = values.pop("extra")
        return {**values, **{name: value for name, value in extra.items() if name not in values}}
