"""Room for added tokens: more embedding rows, and single rows that are trained over a frozen base.

The files are PEFT's (``trainable_token_indices``): the adapter carries the rows' values whole, so it loads over any
base that was resized to as many rows, whatever the new ones hold there. The arithmetic is lmlab's, since PEFT copies
the whole embedding matrix in every forward pass, leaves out an output head's bias, and does not know an embedding that
is stored in 16 bits; here only the rows in question are computed, and they replace the base's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from lmlab.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding, padded ones included."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def grow_embeddings(model: PreTrainedModel, rows: int, *, seed: int) -> int:
    """Make the input embedding and the head, tied or not, hold ``rows`` rows; returns how many are new.

    They never shrink: rows that a model keeps for padding stay. New rows are drawn by transformers around the mean of
    the old ones (Hewitt 2021, "Initializing new word embeddings for pretrained language models"), from ``seed``.
    """
    missing = rows - embedding_rows(model)
    if missing <= 0:
        return 0
    weight: Any = model.get_input_embeddings().weight
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=True)
    return missing


def token_row_targets(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """What PEFT's ``trainable_token_indices`` takes: the embedding, and the head where it is a matrix of its own.

    Raises:
        UserError: a head with a bias, which PEFT leaves out wherever it loads such an adapter.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"rows of added tokens cannot be trained in a {model.config.model_type} head, which has a bias",
            where="tokenizer.added_tokens",
            fix="use adapter=none, or leave the list empty",
        )
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is None or head.weight is embedding.weight
    return {names[id(module)]: list(ids) for module in ([embedding] if tied else [embedding, head])}


class TokenRows(TrainableTokensLayer):
    """An embedding or head of which some rows are trained: the base's result, with those rows' own in its place.

    Shapes: ids ``[...]`` -> ``[..., width]`` for an embedding; hidden states ``[..., width]`` -> ``[..., vocab]`` for
    a head. Rows are fp32 and come out in the type of the base's result. Several adapters have rows of their own each.
    """

    def row_ids(self, adapter: str) -> torch.Tensor:
        """int64 ``[n]``, the rows that ``adapter`` trains, on the module's device."""
        return getattr(self, f"row_ids_{adapter}")

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.disable_adapters or len(active_adapters) != 1 or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        base: Any = self.base_layer
        result = base(x, *args, **kwargs)
        rows, row_ids = self.trainable_tokens_delta[active_adapters[0]], self.row_ids(active_adapters[0])
        if isinstance(base, nn.Linear):
            own = F.linear(x, rows if torch.is_autocast_enabled(x.device.type) else rows.to(x.dtype))
            return result.index_copy_(-1, row_ids, own.to(result.dtype))  # in place: logits are large
        hits = x[..., None] == row_ids
        own = F.embedding(hits.to(torch.uint8).argmax(-1), rows).to(result.dtype)
        scale = self._get_embed_scale()
        if scale is not None:
            own = own * scale.to(own.dtype)
        return torch.where(hits.any(-1)[..., None], own, result)


def use_token_rows(model: nn.Module) -> None:
    """Give every trained-rows layer that PEFT put in lmlab's arithmetic, of all adapters; the files stay the same."""
    for module in list(model.modules()):
        if type(module) is not TrainableTokensLayer and not isinstance(module, TokenRows):
            continue
        layer: Any = module
        layer.__class__ = TokenRows
        for name, ids in layer.token_indices.items():
            values = torch.tensor(ids, device=layer.base_layer.weight.device)
            layer.register_buffer(f"row_ids_{name}", values, persistent=False)
