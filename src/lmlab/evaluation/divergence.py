"""How far two causal LMs' predictions lie apart on given texts: negative log-likelihoods, KL divergence, equal choices.

Both models are run on one batch at a time and their logits compared at once, in double precision and some positions at a
time, so memory does not grow with the texts and an almost equal pair is told from an equal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lmlab.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**25
"""Logits of one model at a time (128 MB in fp32), at least one row of them."""
POSITIONS_AT_ONCE = 128


@dataclass(frozen=True)
class Document:
    """Windows of one text: each overlaps the next by the token that the one predicts last and the other sees first."""

    windows: list[torch.Tensor]

    @property
    def predicted(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def encode_texts(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[list[Document], int]:
    """The texts as windows, and how many had nothing to predict.

    Raises:
        UserError: none had.
    """
    from lmlab.tokenizers import adds_bos, encode_document

    documents = []
    for text in texts:
        ids = torch.tensor(
            encode_document(tokenizer, text, add_bos=adds_bos(tokenizer))[0], dtype=torch.int64
        )
        windows = [ids[start : start + length + 1] for start in range(0, max(0, len(ids) - 1), length)]
        if windows:
            documents.append(Document(windows))
    if not documents:
        raise UserError("no text has two tokens", where="texts", fix="give texts with something to predict")
    return documents, len(texts) - len(documents)


def _batches(documents: Sequence[Document], vocabulary: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """(windows padded on the right with -1, the document of each); longest first, so that little is padded."""
    windows = [(window, index) for index, each in enumerate(documents) for window in each.windows]
    windows.sort(key=lambda pair: len(pair[0]), reverse=True)
    while windows:
        rows = max(1, LOGITS_AT_ONCE // (len(windows[0][0]) * vocabulary))
        taken, windows = windows[:rows], windows[rows:]
        ids = torch.nn.utils.rnn.pad_sequence([w for w, _ in taken], batch_first=True, padding_value=-1)
        yield ids, [index for _, index in taken]


@dataclass(frozen=True)
class Sums:
    """Per text, each ``[texts]`` in double precision: of nll in fp32 and over the kind, of KL; and equal choices in all."""

    reference_nll: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    same: int


@torch.no_grad()
def compare(reference: Any, stored: Any, documents: Sequence[Document]) -> Sums:
    """Run both models over all windows; two models that are one are run once."""
    sums = torch.zeros(3, len(documents), dtype=torch.float64)
    same = 0
    for ids, owners in _batches(documents, reference.config.get_text_config().vocab_size):
        ids = ids.to(reference.device)
        # Padding comes last, where no causal model looks back at it from.
        inputs, targets = ids[:, :-1].clamp(min=0), ids[:, 1:]
        logits = [_logits(model, inputs) for model in dict.fromkeys((reference, stored))]
        for row, owner in enumerate(owners):
            kept = targets[row] >= 0
            for part in kept.nonzero().flatten().split(POSITIONS_AT_ONCE):
                logs = [each[row, part].double().log_softmax(-1) for each in (logits[0], logits[-1])]
                picked = [-each.gather(1, targets[row, part, None]).sum() for each in logs]
                kl = (logs[0].exp() * (logs[0] - logs[1])).sum()
                sums[:, owner] += torch.stack([*picked, kl]).cpu()
                same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        del logits
    return Sums(sums[0], sums[1], sums[2], same)


def _logits(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    return model(input_ids=inputs, use_cache=False).logits.float()


def ratio(sums: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float | None]:
    """``sum(sums) / sum(tokens)`` and its standard error over the texts (Cochran, Sampling Techniques, section 2.11)."""
    mean = (sums.sum() / tokens.sum()).item()
    count = len(sums)
    if count < 2:
        return mean, None
    spread = (sums - mean * tokens).square().sum() * count / (count - 1)
    return mean, (spread.sqrt() / tokens.sum()).item()
