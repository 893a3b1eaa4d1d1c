"""What is trained: everything (none), or low-rank updates over a frozen base (lora, qlora), through PEFT.

LoRA: Hu et al. 2021, arXiv 2106.09685 (y = Wx + (alpha / r) B A x, A random, B zero). QLoRA is LoRA over a 4-bit
base with an 8-bit paged optimizer (arXiv 2305.14314). Files are PEFT's own and load with PEFT alone; beside them lies
``lmlab.json`` with what PEFT does not record: the base's fingerprint, its quantization and the prompt template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lmlab.records import UserError
from lmlab.registry import Config, adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdapterConfig(Config):
    """Turns a base model into the model that is trained."""

    kind: str

    @property
    def freezes_base(self) -> bool:
        """Whether the base stays as it is (then it may be stored in few bits)."""
        return True

    def apply(self, model: PreTrainedModel, *, seed: int, token_rows: Sequence[int] = ()) -> Any:
        """The model to train; its trainable parameters are those with ``requires_grad``.

        Args:
            token_rows: ids of added tokens, whose rows of the embedding and of the head must be trained; left out
                where there are none.
        """
        raise NotImplementedError


@adapters.register
class NoAdapter(AdapterConfig):
    """Full training: every parameter of the base."""

    kind: Literal["none"]

    @property
    def freezes_base(self) -> bool:
        return False

    def apply(self, model: PreTrainedModel, *, seed: int, token_rows: Sequence[int] = ()) -> PreTrainedModel:
        model.requires_grad_(True)
        return model


@adapters.register
class Lora(AdapterConfig):
    """Low-rank adapters by PEFT.

    Attributes:
        rank: r, the inner dimension of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input, while training.
        target_modules: ``all-linear`` (every linear layer but the head), or names or a pattern as PEFT takes them.
    """

    kind: Literal["lora", "qlora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    target_modules: str | list[str]

    def apply(self, model: PreTrainedModel, *, seed: int, token_rows: Sequence[int] = ()) -> Any:
        """Freeze the base and put adapters on it; A is drawn from ``seed``, B is zero, both in fp32.

        Over a 16-bit base PEFT rounds A to those 16 bits once; over every other storage a seed gives the same A.

        Raises:
            UserError: target_modules matches nothing, or ``token_rows`` of a head with a bias.
        """
        import torch
        from peft import LoraConfig, TaskType, get_peft_model

        from lmlab.models.lora import use_fused_lora
        from lmlab.models.vocabulary import token_row_targets, use_token_rows

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it, any number does
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type=TaskType.CAUSAL_LM,
            trainable_token_indices=token_row_targets(model, token_rows) if token_rows else None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                seed
            )  # PEFT draws on the CPU; torch.manual_seed would reseed the GPUs
            try:
                adapted = get_peft_model(model, config)
            except ValueError as error:
                if "target modules" not in str(error).lower():
                    raise
                raise UserError(
                    f"target_modules={self.target_modules} matches no layer",
                    where="adapter.target_modules",
                    fix="use all-linear or names of its linear layers",
                ) from error
        use_token_rows(adapted)
        use_fused_lora(adapted)
        return adapted


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters; a packed weight counts its values, not its bytes."""
    import torch
    from torch import nn

    from lmlab.models.quantize import weight_shape

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = {id(m.weight): math.prod(weight_shape(m)) for m in linear if m.weight.dtype == torch.uint8}
    total = trainable = 0
    for parameter in model.parameters():
        count = packed.get(id(parameter), parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable
