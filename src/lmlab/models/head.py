"""From a batch to its loss as (sum, count): only supervised positions go through the output head, in chunks.

The gradient of the hidden states (and of the head, if it is trained) is made chunk by chunk in the forward pass, so
no more than one chunk of logits ever exists, and a frozen head costs no weight gradient. Scales, caps and biases of an
architecture's head are found once per model and held against the model's own logits; where they do not come out
equal, the model's own ``logits_to_keep`` is used instead: as exact, but all logits at once. The loss is a plain sum in
fp32; who divides by how many tokens is decided over the whole optimizer step (training/modules.py), never here.

Mechanism: Cut Your Losses in Large-Vocabulary Language Models (arXiv 2411.09009) and Liger (arXiv 2410.10989) fuse
head and loss on a GPU; this is the same idea in plain torch, for any device.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from lmlab.models import linear_loss
from lmlab.models.attention import NAME, Documents
from lmlab.models.footprint import is_fake
from lmlab.models.linear_loss import PLAIN_TAIL, HeadLoss, Tail
from lmlab.modes import evaluating
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


NLL = CrossEntropy(kind="cross_entropy", label_smoothing=0.0, z_loss=0.0)
"""Plain negative log-likelihood, what validation measures whatever is trained."""


class Supervised(NamedTuple):
    """``logits`` fp32 ``[n, vocab]`` and ``labels`` int64 ``[n]`` of a batch's n supervised positions."""

    logits: torch.Tensor
    labels: torch.Tensor


def loss_sum(model: Any, batch: PackedBatch, loss: LossConfig = NLL) -> torch.Tensor:
    """The sum of ``loss`` over the batch's supervised positions, an fp32 scalar; one forward pass.

    Args:
        model: a causal LM of transformers, quantized or not, or PEFT's around one.
        batch: flat (then under `attention.use_packed_attention`) or rectangular.
    """
    base = base_model(model)
    tail = _tail(base)
    if tail is None:
        return loss.total(*own_logits(model, batch))
    labels = batch.labels.flatten()[batch.supervised_index]
    hidden = _supervised_hidden(base, batch)
    settings = HeadLoss(loss.label_smoothing, loss.z_loss) if type(loss) is CrossEntropy else None
    head = base.get_output_embeddings()
    return linear_loss.total(hidden, labels, head=head, tail=tail, loss=loss.total, cross_entropy=settings)


def in_chunks(model: Any) -> bool:
    """Whether head and loss go chunk by chunk; False: by the model's own logits, as its head could not be told."""
    return _tail(base_model(model)) is not None


def supervised_logits(model: Any, batch: PackedBatch) -> Supervised:
    """One forward pass over a batch, head only where a label is trained; all of these logits at once."""
    base = base_model(model)
    tail = _tail(base)
    if tail is None:
        return own_logits(model, batch)
    hidden = _supervised_hidden(base, batch)
    logits = tail(linear_loss.head_output(base.get_output_embeddings(), hidden).float())
    return Supervised(logits, batch.labels.flatten()[batch.supervised_index])


def base_model(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(base: Any) -> Any:
    """The part of a causal LM that ends with its last norm, before the head."""
    found = base.get_decoder()
    return base.base_model if found is base else found


def _inputs(batch: PackedBatch) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.cu_seqlens is not None:
        arguments["position_ids"] = batch.position_ids
        arguments["lmlab_documents"] = Documents(batch.cu_seqlens, batch.input_ids.device)
    return arguments


def _supervised_hidden(base: Any, batch: PackedBatch) -> torch.Tensor:
    """Hidden states after the last norm, ``[n, hidden]``."""
    hidden = decoder(base)(**_inputs(batch)).last_hidden_state.flatten(0, 1)
    # All of them: no gather, whose backward would be an index_add over every position.
    return (
        hidden
        if len(batch.supervised_index) == len(hidden)
        else hidden.index_select(0, batch.supervised_index)
    )


def own_logits(model: Any, batch: PackedBatch) -> Supervised:
    """As the model itself makes them; ``logits_to_keep`` takes positions of one row only."""
    labels = batch.labels.flatten()[batch.supervised_index]
    keep = {"logits_to_keep": batch.supervised_index} if len(batch.input_ids) == 1 else {}
    logits = model(**_inputs(batch), **keep).logits.flatten(0, 1)
    if len(logits) != len(labels):
        logits = logits[batch.supervised_index]
    return Supervised(logits.float(), labels)


# --- what an architecture does to its logits -------------------------------------------------------------------------

_tails: WeakKeyDictionary[nn.Module, Tail | None] = WeakKeyDictionary()


def _tail(base: Any) -> Tail | None:
    """How ``base`` makes logits of its head's output, found at the first call; None: only it itself knows."""
    if base not in _tails:
        candidates = _candidates(base.config.get_text_config())
        if is_fake(base):  # nothing to compare: the memory plan
            _tails[base] = candidates[0]
        else:
            _tails[base] = next((tail for tail in candidates if _is_its_own(base, tail)), None)
    return _tails[base]


def _candidates(config: Any) -> list[Tail]:
    """By the names configs use; the name does not say whether a model multiplies or divides (Granite, HyperCLOVA X)."""
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            scales = [1 / value, value, 1.0] if name == "logits_scaling" else [value, 1 / value, 1.0]
    return [Tail(scale, cap) for scale in scales] + ([PLAIN_TAIL] if cap else [])


def _is_its_own(base: Any, tail: Tail) -> bool:
    """Whether decoder, head and ``tail`` give the logits of the model's own forward pass."""
    ids = torch.arange(8, device=base.device)[None] % base.config.get_text_config().vocab_size
    batch = PackedBatch(ids, ids, torch.arange(8, device=base.device)[None], None, ids[0], 8)
    if base.config._attn_implementation == NAME:
        batch.cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
    with evaluating(base), torch.no_grad():
        own = base(**_inputs(batch)).logits[0].float()
        hidden = decoder(base)(**_inputs(batch)).last_hidden_state
        if hidden.shape[-1] != getattr(base.get_output_embeddings(), "in_features", hidden.shape[-1]):
            return False  # a projection lies between (OPT-350m)
        ours = tail(linear_loss.head_output(base.get_output_embeddings(), hidden[0]).float())
    # The same products in the same type; a cap or scale may be rounded at another place in 16 bits.
    tolerance = 1e-5 if own.dtype == hidden.dtype == torch.float32 else 2e-2
    return bool((own - ours).abs().max() <= tolerance * own.abs().max().clamp(min=1e-30))
